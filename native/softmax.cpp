// Softmax of rows of scores and its derivative, once for each width of registers, chosen by the CPU at load.
#include <cstdint>

#include "share.hpp"
#include "vector.hpp"

namespace {

constexpr std::int64_t BLOCK = 1024;  // values widened at a time: they stay in the first cache

template <int N, typename T>
INLINE float largest(const T* row, std::int64_t size) {
    typename Lanes<N>::Values lanes = typename Lanes<N>::Values{} - 3.4e38f;
    std::int64_t at = 0;
    for (; at + N <= size; at += N) {
        typename Lanes<N>::Values values;
        Lanes<N>::load(row + at, &values);
        lanes = values > lanes ? values : lanes;
    }
    float best = -3.4e38f;
    for (int i = 0; i < N; ++i) best = lanes[i] > best ? lanes[i] : best;
    for (; at < size; ++at) best = widened(row[at]) > best ? widened(row[at]) : best;
    return best;
}

template <int N, typename T>
INLINE double sum_of_exp(const T* row, std::int64_t size, float top) {
    double total = 0;
    for (std::int64_t start = 0; start < size; start += BLOCK) {
        const std::int64_t end = start + BLOCK < size ? start + BLOCK : size;
        typename Lanes<N>::Values lanes = {};
        std::int64_t at = start;
        for (; at + N <= end; at += N) {
            typename Lanes<N>::Values values;
            exp_below<N>(row + at, top, &values);
            lanes += values;
        }
        for (; at < end; ++at) lanes[0] += exp_negative(widened(row[at]) - top);
        for (int i = 0; i < N; ++i) total += lanes[i];
    }
    return total;
}

template <int N, typename T>
INLINE void softmax_row(T* row, std::int64_t size, std::int64_t label, float z, bool gradient, float* log_sum) {
    const float top = largest<N>(row, size);
    const double total = sum_of_exp<N>(row, size, top);
    *log_sum = static_cast<float>(top + __builtin_log(total));
    if (!gradient) return;
    const float each = static_cast<float>((1.0 + 2.0 * z * *log_sum) / total);
    const float at_label = exp_negative(widened(row[label]) - top) * each - 1.0f;
    std::int64_t at = 0;
    for (; at + N <= size; at += N) {
        typename Lanes<N>::Values values;
        exp_below<N>(row + at, top, &values);
        values *= each;
        Lanes<N>::store(&values, row + at);
    }
    for (; at < size; ++at) narrow(exp_negative(widened(row[at]) - top) * each, &row[at]);
    narrow(at_label, &row[label]);
}

struct Rows {
    void* logits;
    bool bfloat;
    const std::int64_t* labels;
    float* log_sums;
    std::int64_t vocab;
    float z;
    bool gradient;
};

template <int N, typename T>
INLINE void softmax_rows(const Rows& all, std::int64_t first, std::int64_t last) {
    T* rows = static_cast<T*>(all.logits);
    for (std::int64_t r = first; r < last; ++r)
        softmax_row<N>(rows + r * all.vocab, all.vocab, all.labels[r], all.z, all.gradient, all.log_sums + r);
}

template <int N>
INLINE void softmax_part(const Rows& all, std::int64_t first, std::int64_t last) {
    all.bfloat ? softmax_rows<N, std::uint16_t>(all, first, last) : softmax_rows<N, float>(all, first, last);
}

void part_plain(const Rows& all, std::int64_t first, std::int64_t last) { softmax_part<4>(all, first, last); }
#ifdef CAMELID_X86
TARGET_AVX2 void part_avx2(const Rows& all, std::int64_t first, std::int64_t last) {
    softmax_part<8>(all, first, last);
}
TARGET_AVX512 void part_avx512(const Rows& all, std::int64_t first, std::int64_t last) {
    softmax_part<16>(all, first, last);
}
#endif

}  // namespace

// Each row of `logits` [rows, vocab], float or (bfloat) bfloat16: its log-sum-exp, and with `gradient` the row becomes
// (1 + 2 z lse) softmax - onehot(label). A row with NaN or infinity gives NaN or infinity, as it should.
extern "C" void camelid_softmax_gradient(void* logits, const std::int64_t* labels, float* log_sums, int bfloat,
                                         std::int64_t rows, std::int64_t vocab, float z, int gradient, int threads) {
    const Rows all{logits, bfloat != 0, labels, log_sums, vocab, z, gradient != 0};
    shared_out(rows, 1, threads,
               [&all, run = CHOSEN(part)](std::int64_t first, std::int64_t last) { run(all, first, last); });
}
