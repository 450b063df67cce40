// RMSNorm, SwiGLU and the rotation of pairs in one pass each, forward and back, once for each width of registers: the
// widest that the CPU has is called. Arithmetic is float32; what is written is rounded as torch rounds it.
#include <cstdint>

#include "share.hpp"
#include "vector.hpp"

namespace {

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

template <int N>
INLINE float added(const typename Lanes<N>::Values* lanes) {
    float total = 0;
    for (int i = 0; i < N; ++i) total += (*lanes)[i];
    return total;
}

// out = weight * (x * scale) with scale = 1 / sqrt(mean(x^2) + eps) of each row, which is kept. Backward `slope` is the
// derivative by out; d_x is made, and d_weight of each stretch of rows.
struct Norm {
    const void* x;
    const float* weight;
    void* out;
    float* scales;
    std::int64_t rows, size, stretch;
    float eps;
    bool bfloat_in, bfloat_out, back;
    const void* slope;
    void* d_x;
    float* d_weight;
};

template <int N, typename In, typename Out>
INLINE void norm_rows(const Norm& n, std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) {
        const In* x = static_cast<const In*>(n.x) + r * n.size;
        Out* out = static_cast<Out*>(n.out) + r * n.size;
        typename Lanes<N>::Values lanes = {}, values, scaled;
        std::int64_t at = 0;
        for (; at + N <= n.size; at += N) {
            Lanes<N>::load(x + at, &values);
            lanes += values * values;
        }
        float total = added<N>(&lanes);
        for (; at < n.size; ++at) total += widened(x[at]) * widened(x[at]);
        const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(n.size) + n.eps);
        n.scales[r] = scale;
        for (at = 0; at + N <= n.size; at += N) {
            Lanes<N>::load(x + at, &values);
            values *= scale;
            rounded<N, In>(&values);
            Lanes<N>::load(n.weight + at, &scaled);
            scaled *= values;
            Lanes<N>::store(&scaled, out + at);
        }
        for (; at < n.size; ++at) narrow(n.weight[at] * rounded<In>(widened(x[at]) * scale), out + at);
    }
}

// With g = slope * weight: d_x = scale * g - x * scale^3 * mean(g x).
template <int N, typename In, typename Out>
INLINE void norm_back_rows(const Norm& n, std::int64_t first, std::int64_t last, float* d_weight) {
    using Values = typename Lanes<N>::Values;
    for (std::int64_t r = first; r < last; ++r) {
        const In* x = static_cast<const In*>(n.x) + r * n.size;
        const Out* slope = static_cast<const Out*>(n.slope) + r * n.size;
        In* d_x = static_cast<In*>(n.d_x) + r * n.size;
        const float scale = n.scales[r];
        Values lanes = {}, values, g, weight;
        std::int64_t at = 0;
        for (; at + N <= n.size; at += N) {
            Lanes<N>::load(x + at, &values);
            Lanes<N>::load(slope + at, &g);
            Lanes<N>::load(n.weight + at, &weight);
            const Values along = g * values;
            lanes += along * weight;
            if (!d_weight) continue;
            Values sum;
            Lanes<N>::load(d_weight + at, &sum);
            sum += along * scale;
            Lanes<N>::store(&sum, d_weight + at);
        }
        float total = added<N>(&lanes);
        for (; at < n.size; ++at) {
            const float along = widened(slope[at]) * widened(x[at]);
            total += along * n.weight[at];
            if (d_weight) d_weight[at] += along * scale;
        }
        const float pull = scale * scale * scale * total / static_cast<float>(n.size);
        for (at = 0; at + N <= n.size; at += N) {
            Lanes<N>::load(x + at, &values);
            Lanes<N>::load(slope + at, &g);
            Lanes<N>::load(n.weight + at, &weight);
            g = g * weight * scale - values * pull;
            Lanes<N>::store(&g, d_x + at);
        }
        for (; at < n.size; ++at) narrow(widened(slope[at]) * n.weight[at] * scale - widened(x[at]) * pull, d_x + at);
    }
}

template <int N>
INLINE void norm_part(const Norm& n, std::int64_t first, std::int64_t last) {
    if (!n.back) {
        if (n.bfloat_in) return norm_rows<N, Half, Half>(n, first, last);
        return n.bfloat_out ? norm_rows<N, float, Half>(n, first, last) : norm_rows<N, float, float>(n, first, last);
    }
    for (std::int64_t s = first; s < last; ++s) {  // of stretches
        const std::int64_t from = s * n.stretch, to = from + n.stretch < n.rows ? from + n.stretch : n.rows;
        float* d_weight = n.d_weight ? n.d_weight + s * n.size : nullptr;
        for (std::int64_t i = 0; d_weight && i < n.size; ++i) d_weight[i] = 0.0f;
        if (n.bfloat_in)
            norm_back_rows<N, Half, Half>(n, from, to, d_weight);
        else if (n.bfloat_out)
            norm_back_rows<N, float, Half>(n, from, to, d_weight);
        else
            norm_back_rows<N, float, float>(n, from, to, d_weight);
    }
}

// out = x + y, a residual stream and what a layer adds to it.
struct Sum {
    const float* x;
    const Half* y;
    float* out;
};

template <int N>
INLINE void sum_part(const Sum& s, std::int64_t first, std::int64_t last) {
    typename Lanes<N>::Values x, y;
    std::int64_t at = first;
    for (; at + N <= last; at += N) {
        Lanes<N>::load(s.x + at, &x);
        Lanes<N>::load(s.y + at, &y);
        x += y;
        Lanes<N>::store(&x, s.out + at);
    }
    for (; at < last; ++at) s.out[at] = s.x[at] + widened(s.y[at]);
}

struct Gate {
    const void *gate, *up;
    void* out;
    bool bfloat, back;
    const void* slope;
    void *d_gate, *d_up;
};

// 1 / (1 + e^-x), by an e to a power that is never positive.
template <int N>
INLINE void sigmoid(const typename Lanes<N>::Values* x, typename Lanes<N>::Values* out) {
    using Values = typename Lanes<N>::Values;
    Values e = *x < 0.0f ? *x : -*x;
    exp_values<N>(&e);
    *out = (*x < 0.0f ? e : Values{} + 1.0f) / (1.0f + e);
}

template <int N, typename T>
INLINE void gate_values(const Gate& g, std::int64_t first, std::int64_t last) {
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

// With s = sigmoid(gate): silu = gate s, and its derivative s (1 + gate (1 - s)).
template <int N, typename T>
INLINE void gate_back_values(const Gate& g, std::int64_t first, std::int64_t last) {
    using Values = typename Lanes<N>::Values;
    const T *gate = static_cast<const T*>(g.gate), *up = static_cast<const T*>(g.up),
            *slope = static_cast<const T*>(g.slope);
    T *d_gate = static_cast<T*>(g.d_gate), *d_up = static_cast<T*>(g.d_up);
    std::int64_t at = first;
    for (; at + N <= last; at += N) {
        Values x, other, y, s;
        Lanes<N>::load(gate + at, &x);
        Lanes<N>::load(up + at, &other);
        Lanes<N>::load(slope + at, &y);
        sigmoid<N>(&x, &s);
        const Values by_gate = y * other * s * (1.0f + x * (1.0f - s)), by_up = y * x * s;
        Lanes<N>::store(&by_gate, d_gate + at);
        Lanes<N>::store(&by_up, d_up + at);
    }
    for (; at < last; ++at) {
        const float x = widened(gate[at]), y = widened(slope[at]), e = exp_negative(x < 0 ? x : -x);
        const float s = (x < 0 ? e : 1.0f) / (1.0f + e);
        narrow(y * widened(up[at]) * s * (1.0f + x * (1.0f - s)), d_gate + at);
        narrow(y * x * s, d_up + at);
    }
}

template <int N>
INLINE void gate_part(const Gate& g, std::int64_t first, std::int64_t last) {
    if (g.back)
        g.bfloat ? gate_back_values<N, Half>(g, first, last) : gate_back_values<N, float>(g, first, last);
    else
        g.bfloat ? gate_values<N, Half>(g, first, last) : gate_values<N, float>(g, first, last);
}

// x [batch, heads, length, 2 half] with any strides but a contiguous last dimension, and out laid out likewise.
struct Turn {
    const void* x;
    void* out;
    std::int64_t x_strides[3], out_strides[3];
    const float *cos, *sin;     // [length, half], or a batch of them `apart`
    std::int64_t apart, heads, length, half;
    bool bfloat, back;
};

// Pairs i, i + half of a head from `i` on, N at a time; returns where fewer are left.
template <int N, typename T>
INLINE std::int64_t turned(const T* x, T* out, const float* cos, const float* sin, float way, std::int64_t half, std::int64_t i) {
    using Values = typename Lanes<N>::Values;
    for (; i + N <= half; i += N) {
        Values p, q, c, s;
        Lanes<N>::load(x + i, &p);
        Lanes<N>::load(x + half + i, &q);
        Lanes<N>::load(cos + i, &c);
        Lanes<N>::load(sin + i, &s);
        s *= way;
        const Values one = p * c - q * s, other = q * c + p * s;
        Lanes<N>::store(&one, out + i);
        Lanes<N>::store(&other, out + half + i);
    }
    return i;
}

template <int N, typename T>
INLINE void turn_values(const Turn& t, std::int64_t first, std::int64_t last) {
    const float way = t.back ? -1.0f : 1.0f;  // the derivative is the turn back
    for (std::int64_t token = first; token < last; ++token) {
        const std::int64_t b = token / t.length, at = token % t.length;
        const float *cos = t.cos + b * t.apart + at * t.half, *sin = t.sin + b * t.apart + at * t.half;
        for (std::int64_t h = 0; h < t.heads; ++h) {
            const T* x = static_cast<const T*>(t.x) + b * t.x_strides[0] + h * t.x_strides[1] + at * t.x_strides[2];
            T* out = static_cast<T*>(t.out) + b * t.out_strides[0] + h * t.out_strides[1] + at * t.out_strides[2];
            std::int64_t i = turned<N>(x, out, cos, sin, way, t.half, 0);
            if constexpr (N > 4) i = turned<N / 2>(x, out, cos, sin, way, t.half, i);
            for (; i < t.half; ++i) {
                const float p = widened(x[i]), q = widened(x[t.half + i]), s = sin[i] * way;
                narrow(p * cos[i] - q * s, out + i);
                narrow(q * cos[i] + p * s, out + t.half + i);
            }
        }
    }
}

template <int N>
INLINE void turn_part(const Turn& t, std::int64_t first, std::int64_t last) {
    t.bfloat ? turn_values<N, Half>(t, first, last) : turn_values<N, float>(t, first, last);
}

#define PASS(name, Kind)                                                                                        \
    void name##_plain(const Kind& k, std::int64_t first, std::int64_t last) { name##_part<4>(k, first, last); } \
    X86_PASS(name, Kind)                                                                                        \
    void name##_all(const Kind& k, std::int64_t count, std::int64_t least, int threads) {                       \
        shared_out(count, least, threads,                                                                       \
                   [&k, run = CHOSEN(name)](std::int64_t first, std::int64_t last) { run(k, first, last); });   \
    }
#ifdef CAMELID_X86
#define X86_PASS(name, Kind)                                                                                    \
    TARGET_AVX2 void name##_avx2(const Kind& k, std::int64_t first, std::int64_t last) {                        \
        name##_part<8>(k, first, last);                                                                         \
    }                                                                                                           \
    TARGET_AVX512 void name##_avx512(const Kind& k, std::int64_t first, std::int64_t last) {                    \
        name##_part<16>(k, first, last);                                                                        \
    }
#else
#define X86_PASS(name, Kind)
#endif

PASS(norm, Norm)
PASS(sum, Sum)
PASS(gate, Gate)
PASS(turn, Turn)

constexpr std::int64_t WORTH_A_THREAD = 1 << 17;  // values

}  // namespace

// RMSNorm of rows [rows, size]: weight * (x / sqrt(mean(x^2) + eps)), what is squared out of kept in `scales` [rows].
// x and out are float or bfloat16; out is bfloat16 where x is.
extern "C" void camelid_rms_norm(const void* x, const float* weight, void* out, float* scales, int bfloat_in,
                                 int bfloat_out, std::int64_t rows, std::int64_t size, float eps, int threads) {
    const Norm n{x,   weight,         out,             scales, rows,    size,    0,
                 eps, bfloat_in != 0, bfloat_out != 0, false,  nullptr, nullptr, nullptr};
    norm_all(n, rows, 1 + WORTH_A_THREAD / size, threads);
}

// Its derivatives by x (as x is) and, unless d_weight is null, by the weight: a row of d_weight [stretches, size] for
// each `stretch` rows of x, so that their sum does not depend on the threads.
extern "C" void camelid_rms_norm_back(const void* x, const float* weight, float* scales, const void* slope, void* d_x,
                                      float* d_weight, int bfloat_in, int bfloat_out, std::int64_t rows,
                                      std::int64_t size, std::int64_t stretch, int threads) {
    const Norm n{x,    weight,         nullptr,         scales, rows, size,    stretch,
                 0.0f, bfloat_in != 0, bfloat_out != 0, true,   slope, d_x,    d_weight};
    norm_all(n, (rows + stretch - 1) / stretch, 1 + WORTH_A_THREAD / (size * stretch), threads);
}

// out = x + y of `count` values: y is bfloat16, x and out are float.
extern "C" void camelid_add(const float* x, const void* y, float* out, std::int64_t count, int threads) {
    sum_all(Sum{x, static_cast<const Half*>(y), out}, count, WORTH_A_THREAD, threads);
}

// silu(gate) * up of `count` values.
extern "C" void camelid_swiglu(const void* gate, const void* up, void* out, int bfloat, std::int64_t count,
                               int threads) {
    gate_all(Gate{gate, up, out, bfloat != 0, false, nullptr, nullptr, nullptr}, count, WORTH_A_THREAD, threads);
}

// Its derivatives by gate and up, times `slope`.
extern "C" void camelid_swiglu_back(const void* gate, const void* up, const void* slope, void* d_gate, void* d_up,
                                    int bfloat, std::int64_t count, int threads) {
    gate_all(Gate{gate, up, nullptr, bfloat != 0, true, slope, d_gate, d_up}, count, WORTH_A_THREAD, threads);
}

// Pairs (i, i + half) of the last dimension turned by their position's angle, or back. shape: batch, heads, length, half,
// the elements between two rows' angles (0 where all rows have the same), and the strides of batch, head and token of x
// and of out, in elements.
extern "C" void camelid_turn_pairs(const void* x, void* out, const float* cos, const float* sin,
                                   const std::int64_t* shape, int bfloat, int back, int threads) {
    const Turn t{x,
                 out,
                 {shape[5], shape[6], shape[7]},
                 {shape[8], shape[9], shape[10]},
                 cos,
                 sin,
                 shape[4],
                 shape[1],
                 shape[2],
                 shape[3],
                 bfloat != 0,
                 back != 0};
    turn_all(t, shape[0] * t.length, 1 + WORTH_A_THREAD / (2 * t.heads * t.half), threads);
}
