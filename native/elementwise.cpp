// Fused passes over rows of logits: plain loops that the compiler widens for the CPU it finds at load (target_clones).
#include <cstdint>
#include <thread>
#include <vector>

#include "vector.hpp"

namespace {

constexpr std::int64_t BLOCK = 1024;  // values widened at a time: they stay in the first cache

template <typename T>
INLINE float largest(const T* row, std::int64_t size) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = -3.4e38f;
    std::int64_t at = 0;
    for (; at + 16 <= size; at += 16)
        for (int i = 0; i < 16; ++i) {
            const float value = widened(row[at + i]);
            lanes[i] = value > lanes[i] ? value : lanes[i];
        }
    float best = -3.4e38f;
    for (int i = 0; i < 16; ++i) best = lanes[i] > best ? lanes[i] : best;
    for (; at < size; ++at) best = widened(row[at]) > best ? widened(row[at]) : best;
    return best;
}

template <typename T>
INLINE double sum_of_exp(const T* row, std::int64_t size, float top) {
    double total = 0;
    for (std::int64_t start = 0; start < size; start += BLOCK) {
        const std::int64_t end = start + BLOCK < size ? start + BLOCK : size;
        float lanes[16] = {};
        std::int64_t at = start;
        for (; at + 16 <= end; at += 16)
            for (int i = 0; i < 16; ++i) lanes[i] += exp_negative(widened(row[at + i]) - top);
        for (; at < end; ++at) lanes[0] += exp_negative(widened(row[at]) - top);
        for (int i = 0; i < 16; ++i) total += lanes[i];
    }
    return total;
}

template <typename T>
INLINE void softmax_row(T* row, std::int64_t size, std::int64_t label, float z, bool gradient, float* log_sum) {
    const float top = largest(row, size);
    const double total = sum_of_exp(row, size, top);
    *log_sum = static_cast<float>(top + __builtin_log(total));
    if (!gradient) return;
    const float each = static_cast<float>((1.0 + 2.0 * z * *log_sum) / total);
    const float at_label = exp_negative(widened(row[label]) - top) * each - 1.0f;
    for (std::int64_t at = 0; at < size; ++at) narrow(exp_negative(widened(row[at]) - top) * each, &row[at]);
    narrow(at_label, &row[label]);
}

WIDE void rows_float(float* rows, const std::int64_t* labels, float* log_sums, std::int64_t first, std::int64_t last,
                     std::int64_t vocab, float z, bool gradient) {
    for (std::int64_t r = first; r < last; ++r)
        softmax_row(rows + r * vocab, vocab, labels[r], z, gradient, log_sums + r);
}

WIDE void rows_bfloat(std::uint16_t* rows, const std::int64_t* labels, float* log_sums, std::int64_t first,
                      std::int64_t last, std::int64_t vocab, float z, bool gradient) {
    for (std::int64_t r = first; r < last; ++r)
        softmax_row(rows + r * vocab, vocab, labels[r], z, gradient, log_sums + r);
}

}  // namespace

// Each row of `logits` [rows, vocab], float or (bfloat) bfloat16: its log-sum-exp, and with `gradient` the row becomes
// (1 + 2 z lse) softmax - onehot(label). A row with NaN or infinity gives NaN or infinity, as it should.
extern "C" void camelid_softmax_gradient(void* logits, int bfloat, const std::int64_t* labels, float* log_sums,
                                         std::int64_t rows, std::int64_t vocab, float z, int gradient, int threads) {
    const auto part = [=](std::int64_t first, std::int64_t last) {
        if (bfloat)
            rows_bfloat(static_cast<std::uint16_t*>(logits), labels, log_sums, first, last, vocab, z, gradient);
        else
            rows_float(static_cast<float*>(logits), labels, log_sums, first, last, vocab, z, gradient);
    };
    const std::int64_t shares = threads < rows ? threads : rows;
    std::vector<std::thread> others;
    for (std::int64_t i = 1; i < shares; ++i) others.emplace_back(part, rows * i / shares, rows * (i + 1) / shares);
    part(0, shares > 1 ? rows / shares : rows);
    for (auto& thread : others) thread.join();
}
