// Fused passes over rows of logits, once for each width of registers, chosen by the CPU at load.
#include <cstdint>
#include <thread>
#include <vector>

#include "vector.hpp"

namespace {

constexpr std::int64_t BLOCK = 1024;  // values widened at a time: they stay in the first cache

// N values at a time, written out: left to itself, GCC makes loops over bfloat16 half as wide as they could be.
template <int N>
struct Kinds;
#define KINDS(N)                                                        \
    template <>                                                         \
    struct Kinds<N> {                                                   \
        typedef float Values __attribute__((vector_size(4 * N)));       \
        typedef std::int32_t Whole __attribute__((vector_size(4 * N))); \
        typedef std::uint32_t Bits __attribute__((vector_size(4 * N))); \
        typedef std::uint16_t Halves __attribute__((vector_size(2 * N))); \
    };
KINDS(4)
KINDS(8)
KINDS(16)

template <int N>
struct Lanes {
    using Values = typename Kinds<N>::Values;
    using Whole = typename Kinds<N>::Whole;
    using Bits = typename Kinds<N>::Bits;
    using Halves = typename Kinds<N>::Halves;

    INLINE static void load(const float* from, Values* out) { std::memcpy(out, from, sizeof *out); }
    INLINE static void load(const std::uint16_t* from, Values* out) {
        Halves halves;
        std::memcpy(&halves, from, sizeof halves);
        const Bits wide = __builtin_convertvector(halves, Bits) << 16;
        std::memcpy(out, &wide, sizeof *out);
    }
    INLINE static void store(const Values* values, float* to) { std::memcpy(to, values, sizeof *values); }
    INLINE static void store(const Values* values, std::uint16_t* to) {  // as narrow() rounds
        Bits bits;
        std::memcpy(&bits, values, sizeof bits);
        const Halves halves = __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, Halves);
        std::memcpy(to, &halves, sizeof halves);
    }
};

// exp_negative() of row[0 … N-1] - top.
template <int N, typename T>
INLINE void exp_below(const T* row, float top, typename Lanes<N>::Values* out) {
    using Values = typename Lanes<N>::Values;
    Values x;
    Lanes<N>::load(row, &x);
    x -= top;
    const Values y = x < -87.0f ? Values{} - 87.0f : x;
    const Values shifted = y * 1.44269504f + 12582912.0f;
    const Values n = shifted - 12582912.0f;
    const Values r = y - n * 0.693359375f + n * 2.12194440e-4f;
    Values p = Values{} + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const auto bits = (__builtin_convertvector(n, typename Lanes<N>::Whole) + 127) << 23;
    Values scale;
    std::memcpy(&scale, &bits, sizeof scale);
    *out = x < -87.0f ? Values{} : p * scale;
}

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
extern "C" void camelid_softmax_gradient(void* logits, int bfloat, const std::int64_t* labels, float* log_sums,
                                         std::int64_t rows, std::int64_t vocab, float z, int gradient, int threads) {
    const Rows all{logits, bfloat != 0, labels, log_sums, vocab, z, gradient != 0};
    const auto part = [&all, run = CHOSEN(part)](std::int64_t first, std::int64_t last) { run(all, first, last); };
    const std::int64_t shares = threads < rows ? threads : rows;
    std::vector<std::thread> others;
    for (std::int64_t i = 1; i < shares; ++i) others.emplace_back(part, rows * i / shares, rows * (i + 1) / shares);
    part(0, shares > 1 ? rows / shares : rows);
    for (auto& thread : others) thread.join();
}
