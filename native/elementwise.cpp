// Fused passes over large tensors, once for each width of registers, chosen by the CPU at load.
#include <cstdint>
#include <thread>
#include <vector>

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

// Values as the tensor's kind keeps them: a product of two is rounded before it is used again.
template <int N, typename T>
INLINE void rounded(typename Lanes<N>::Values* values) {
    T kept[N];
    Lanes<N>::store(values, kept);
    Lanes<N>::load(kept, values);
}

template <typename T>
INLINE float rounded(float value) {
    T kept;
    narrow(value, &kept);
    return widened(kept);
}

struct Norm {
    const void* x;
    const void* weight;
    void* out;
    bool bfloat;
    std::int64_t size;
    float eps;
};

template <int N, typename T>
INLINE void norm_rows(const Norm& n, std::int64_t first, std::int64_t last) {
    const T* weight = static_cast<const T*>(n.weight);
    for (std::int64_t r = first; r < last; ++r) {
        const T* x = static_cast<const T*>(n.x) + r * n.size;
        T* out = static_cast<T*>(n.out) + r * n.size;
        typename Lanes<N>::Values lanes = {}, values, scaled;
        std::int64_t at = 0;
        for (; at + N <= n.size; at += N) {
            Lanes<N>::load(x + at, &values);
            lanes += values * values;
        }
        float total = 0;
        for (int i = 0; i < N; ++i) total += lanes[i];
        for (; at < n.size; ++at) total += widened(x[at]) * widened(x[at]);
        const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(n.size) + n.eps);
        for (at = 0; at + N <= n.size; at += N) {
            Lanes<N>::load(x + at, &values);
            values *= scale;
            rounded<N, T>(&values);
            Lanes<N>::load(weight + at, &scaled);
            scaled *= values;
            Lanes<N>::store(&scaled, out + at);
        }
        for (; at < n.size; ++at) narrow(widened(weight[at]) * rounded<T>(widened(x[at]) * scale), out + at);
    }
}

template <int N>
INLINE void norm_part(const Norm& n, std::int64_t first, std::int64_t last) {
    n.bfloat ? norm_rows<N, std::uint16_t>(n, first, last) : norm_rows<N, float>(n, first, last);
}

struct Gated {
    const void* gate;
    const void* up;
    void* out;
    bool bfloat;
};

// silu(gate) = gate / (1 + e^-gate), by an e to a power that is never positive.
template <int N, typename T>
INLINE void gated_values(const Gated& g, std::int64_t first, std::int64_t last) {
    using Values = typename Lanes<N>::Values;
    const T *gate = static_cast<const T*>(g.gate), *up = static_cast<const T*>(g.up);
    T* out = static_cast<T*>(g.out);
    std::int64_t at = first;
    for (; at + N <= last; at += N) {
        Values x, other;
        Lanes<N>::load(gate + at, &x);
        Lanes<N>::load(up + at, &other);
        Values e = x < 0.0f ? x : -x;
        exp_values<N>(&e);
        Values silu = (x < 0.0f ? x * e : x) / (1.0f + e);
        rounded<N, T>(&silu);
        silu *= other;
        Lanes<N>::store(&silu, out + at);
    }
    for (; at < last; ++at) {
        const float x = widened(gate[at]), e = exp_negative(x < 0 ? x : -x);
        narrow(rounded<T>((x < 0 ? x * e : x) / (1.0f + e)) * widened(up[at]), out + at);
    }
}

template <int N>
INLINE void gated_part(const Gated& g, std::int64_t first, std::int64_t last) {
    g.bfloat ? gated_values<N, std::uint16_t>(g, first, last) : gated_values<N, float>(g, first, last);
}

void norm_plain(const Norm& n, std::int64_t first, std::int64_t last) { norm_part<4>(n, first, last); }
void gated_plain(const Gated& g, std::int64_t first, std::int64_t last) { gated_part<4>(g, first, last); }
#ifdef CAMELID_X86
TARGET_AVX2 void norm_avx2(const Norm& n, std::int64_t first, std::int64_t last) { norm_part<8>(n, first, last); }
TARGET_AVX2 void gated_avx2(const Gated& g, std::int64_t first, std::int64_t last) { gated_part<8>(g, first, last); }
TARGET_AVX512 void norm_avx512(const Norm& n, std::int64_t first, std::int64_t last) { norm_part<16>(n, first, last); }
TARGET_AVX512 void gated_avx512(const Gated& g, std::int64_t first, std::int64_t last) {
    gated_part<16>(g, first, last);
}
#endif

// `run` over 0 … count, a stretch for each thread; a thread is worth its start from `least` on.
template <typename Run>
void shared_out(std::int64_t count, std::int64_t least, int threads, const Run& run) {
    std::int64_t shares = count / least < threads ? count / least : threads;
    if (shares < 1) shares = 1;
    std::vector<std::thread> others;
    for (std::int64_t i = 1; i < shares; ++i) others.emplace_back(run, count * i / shares, count * (i + 1) / shares);
    run(0, count / shares);
    for (auto& thread : others) thread.join();
}

}  // namespace

// Each row of `logits` [rows, vocab], float or (bfloat) bfloat16: its log-sum-exp, and with `gradient` the row becomes
// (1 + 2 z lse) softmax - onehot(label). A row with NaN or infinity gives NaN or infinity, as it should.
extern "C" void camelid_softmax_gradient(void* logits, int bfloat, const std::int64_t* labels, float* log_sums,
                                         std::int64_t rows, std::int64_t vocab, float z, int gradient, int threads) {
    const Rows all{logits, bfloat != 0, labels, log_sums, vocab, z, gradient != 0};
    shared_out(rows, 1, threads,
               [&all, run = CHOSEN(part)](std::int64_t first, std::int64_t last) { run(all, first, last); });
}

// RMSNorm of rows [rows, size], float or (bfloat) bfloat16: weight * (x / sqrt(mean(x^2) + eps)), rounded as torch does.
extern "C" void camelid_rms_norm(const void* x, const void* weight, void* out, int bfloat, std::int64_t rows,
                                 std::int64_t size, float eps, int threads) {
    const Norm all{x, weight, out, bfloat != 0, size, eps};
    shared_out(rows, 1 + (1 << 17) / size, threads,
               [&all, run = CHOSEN(norm)](std::int64_t first, std::int64_t last) { run(all, first, last); });
}

// silu(gate) * up of `count` values, rounded as torch does.
extern "C" void camelid_swiglu(const void* gate, const void* up, void* out, int bfloat, std::int64_t count,
                               int threads) {
    const Gated all{gate, up, out, bfloat != 0};
    shared_out(count, 1 << 17, threads,
               [&all, run = CHOSEN(gated)](std::int64_t first, std::int64_t last) { run(all, first, last); });
}
