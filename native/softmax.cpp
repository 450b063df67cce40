// Softmax of rows of scores and its derivative, once for each width of registers, chosen by the CPU at load.
#include <cstdint>
#include <cstring>
#include <memory>

#include "pairs.hpp"
#include "share.hpp"

namespace {

constexpr std::int64_t BLOCK = 1024;  // powers of e whose sum is float32

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
INLINE double sum_of_exp(const T* row, std::int64_t size, float top, float* kept) {
    double total = 0;
    for (std::int64_t start = 0; start < size; start += BLOCK) {
        const std::int64_t end = start + BLOCK < size ? start + BLOCK : size;
        typename Lanes<N>::Values lanes = {};
        std::int64_t at = start;
        for (; at + N <= end; at += N) {
            typename Lanes<N>::Values values;
            exp_below<N>(row + at, top, &values);
            lanes += values;
            if (kept) Lanes<N>::store(&values, kept + at);
        }
        for (; at < end; ++at) {
            const float value = exp_negative(widened(row[at]) - top);
            lanes[0] += value;
            if (kept) kept[at] = value;
        }
        for (int i = 0; i < N; ++i) total += lanes[i];
    }
    return total;
}

#ifdef CAMELID_BF16
// What was kept times `each`, rounded by the CPU's own instruction.
TARGET_BF16 __attribute__((noinline)) void scale(const float* kept, std::int64_t size, float each, std::uint16_t* row) {
    const __m512 all = _mm512_set1_ps(each);
    std::int64_t at = 0;
    for (; at + 16 <= size; at += 16) {
        const __m256bh halves = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(kept + at), all));
        std::memcpy(row + at, &halves, sizeof halves);
    }
    for (; at < size; ++at) narrow(kept[at] * each, &row[at]);
}
#endif

// Where there is room for `size` powers of e in `kept`, each is found once.
template <int N, typename T>
INLINE void softmax_row(T* row, std::int64_t size, std::int64_t label, float z, bool gradient, float* log_sum, float* kept) {
    const float top = largest<N>(row, size);
    const double total = sum_of_exp<N>(row, size, top, kept);
    *log_sum = static_cast<float>(top + __builtin_log(total));
    if (!gradient) return;
    const float each = static_cast<float>((1.0 + 2.0 * z * *log_sum) / total);
    const float at_label = exp_negative(widened(row[label]) - top) * each - 1.0f;
#ifdef CAMELID_BF16
    if constexpr (sizeof(T) == 2)
        if (kept) {
            scale(kept, size, each, row);
            narrow(at_label, &row[label]);
            return;
        }
#endif
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
INLINE void softmax_rows(const Rows& all, std::int64_t first, std::int64_t last, float* kept = nullptr) {
    T* rows = static_cast<T*>(all.logits);
    for (std::int64_t r = first; r < last; ++r)
        softmax_row<N>(rows + r * all.vocab, all.vocab, all.labels[r], all.z, all.gradient, all.log_sums + r, kept);
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
#ifdef CAMELID_BF16
TARGET_BF16 void part_bf16(const Rows& all, std::int64_t first, std::int64_t last) {
    if (!all.bfloat || !all.gradient) return softmax_part<16>(all, first, last);
    const std::unique_ptr<float[]> kept(new float[static_cast<std::size_t>(all.vocab)]);
    softmax_rows<16, std::uint16_t>(all, first, last, kept.get());
}
#endif

auto chosen_part() {
#ifdef CAMELID_BF16
    if (has_bf16()) return part_bf16;
#endif
    return CHOSEN(part);
}

}  // namespace

// Each row of `logits` [rows, vocab], float or (bfloat) bfloat16: its log-sum-exp, and with `gradient` the row becomes
// (1 + 2 z lse) softmax - onehot(label). A row with NaN or infinity gives NaN or infinity, as it should.
extern "C" void camelid_softmax_gradient(void* logits, const std::int64_t* labels, float* log_sums, int bfloat,
                                         std::int64_t rows, std::int64_t vocab, float z, int gradient, int threads) {
    const Rows all{logits, bfloat != 0, labels, log_sums, vocab, z, gradient != 0};
    shared_out(rows, 1, threads,
               [&all, run = chosen_part()](std::int64_t first, std::int64_t last) { run(all, first, last); });
}
