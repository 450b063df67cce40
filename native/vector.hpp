// Arithmetic that several kernels share, written so that the compiler widens it to the registers it may use.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#define INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__)
#define CAMELID_X86
#include <cpuid.h>
#endif

// The same code for each kind of CPU, as NAME_plain, NAME_avx2 and NAME_avx512: CHOSEN(NAME) is the one for this CPU.
#ifdef CAMELID_X86
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define CHOSEN(name) (has_avx512() ? name##_avx512 : has_avx2() ? name##_avx2 : name##_plain)
#else
#define CHOSEN(name) name##_plain
#endif

namespace {

#ifdef CAMELID_X86
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
inline bool has_avx512() {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
inline bool from_amd() { return __builtin_cpu_is("amd"); }
inline bool has_amx() {  // tiles of bytes and of bfloat16; whether the system gives them to a process is asked of it
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned bfloats = 1u << 22, tiles = 1u << 24, bytes = 1u << 25, all = bfloats | tiles | bytes;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & all) == all;
}
#else
inline bool from_amd() { return false; }
#endif

using Half = std::uint16_t;  // a bfloat16
typedef float vector4 __attribute__((vector_size(16)));
typedef float vector8 __attribute__((vector_size(32)));
typedef float vector16 __attribute__((vector_size(64)));

// A kind of CPU for products: its register, and how many rows of how many registers it can keep of C.
template <typename V, int R, int A>
struct Kind {
    using Vector = V;
    static constexpr int lanes = sizeof(V) / 4, rows = R, across = A, width = lanes * A;
};
struct Sse : Kind<vector4, 2, 4> {
    using Narrow = Sse;  // what takes the last columns where `width` does not divide them
};
struct Avx2 : Kind<vector8, 6, 2> {
    using Narrow = Avx2;
};
struct Avx512Narrow : Kind<vector16, 12, 1> {
    using Narrow = Avx512Narrow;
};
struct Avx512 : Kind<vector16, 8, 2> {
    using Narrow = Avx512Narrow;
};

// p(r), about e^r, of a value or of many at once.
template <typename V>
INLINE void exp_series(const V* at, V* out) {
    const V r = *at;
    V p = V{} + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    *out = p;
}

// e^x for x <= 0: 2^n p(r) with a polynomial of degree 6 on |r| <= ln(2)/2, relative error below 3e-7; 0 below -87.
INLINE float exp_negative(float x) {
    const float y = x < -87.0f ? -87.0f : x;
    const float shifted = y * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
    const float n = shifted - 12582912.0f;
    const float r = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p;
    exp_series(&r, &p);
    const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) * (1 << 23);
    float scale;
    std::memcpy(&scale, &bits, 4);
    return x < -87.0f ? 0.0f : p * scale;
}

INLINE float widened(float value) { return value; }
INLINE float widened(std::uint16_t value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

INLINE float half_to_float(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    float value;
    if (magnitude >= 0x7C00u) {  // infinity, or no number
        const std::uint32_t bits = sign | 0x7F800000u | (magnitude & 0x3FFu) << 13;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    if (magnitude < 0x400u) {  // below float16's normal numbers, by one of float32's: a thread may take those below for 0
        value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    } else {
        const std::uint32_t bits = (magnitude << 13) + 0x38000000u;
        std::memcpy(&value, &bits, 4);
    }
    return sign ? -value : value;
}

// A float16: to nearest, ties to even.
INLINE std::uint16_t float_to_half(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const std::uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude >= 0x7F800000) return static_cast<std::uint16_t>(sign | 0x7C00 | (magnitude > 0x7F800000 ? 0x200 : 0));
    if (magnitude < 0x38800000) {  // below the normal ones: steps of 2^-24
        float size;
        std::memcpy(&size, &magnitude, 4);
        return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(size * 16777216.0f + 12582912.0f - 12582912.0f));
    }
    const std::uint32_t half = (magnitude + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    return static_cast<std::uint16_t>(sign | (half < 0x1C000 + 0x7C00 ? half - 0x1C000 : 0x7C00));
}

INLINE void narrow(float value, float* out) { *out = value; }
constexpr std::uint16_t NO_NUMBER = 0x7FC0;  // of a NaN whose bits are all ones, rounding would make 0
INLINE void narrow(float value, std::uint16_t* out) {  // round to nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    *out = value != value ? NO_NUMBER : static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// N values at a time, written out: left to itself, GCC makes loops over bfloat16 half as wide as they could be.
template <int N>
struct Kinds;
#define KINDS(N)                                                          \
    template <>                                                           \
    struct Kinds<N> {                                                     \
        typedef float Values __attribute__((vector_size(4 * N)));         \
        typedef std::int32_t Whole __attribute__((vector_size(4 * N)));   \
        typedef std::uint32_t Bits __attribute__((vector_size(4 * N)));   \
        typedef std::uint16_t Halves __attribute__((vector_size(2 * N))); \
        typedef std::uint8_t Bytes __attribute__((vector_size(N)));       \
    };
KINDS(4)
KINDS(8)
KINDS(16)

#if defined(CAMELID_X86) && !defined(__clang__)
#define WIDEST(N) (N == 16)  // where AVX-512 does at once what GCC makes of several: for its targets only
#else
#define WIDEST(N) false
#endif

// Halves in words of their own.
template <int N>
INLINE void widen(const typename Kinds<N>::Halves& halves, typename Kinds<N>::Bits* words) {
#ifdef CAMELID_X86
    if constexpr (WIDEST(N)) {
        asm("vpmovzxwd %1, %0" : "=v"(*words) : "v"(halves));
        return;
    }
#endif
    *words = __builtin_convertvector(halves, typename Kinds<N>::Bits);
}

template <int N>
struct Lanes {
    using Values = typename Kinds<N>::Values;
    using Whole = typename Kinds<N>::Whole;
    using Bits = typename Kinds<N>::Bits;
    using Halves = typename Kinds<N>::Halves;
    using Bytes = typename Kinds<N>::Bytes;

    INLINE static void load(const float* from, Values* out) { std::memcpy(out, from, sizeof *out); }
    INLINE static void load(const std::uint16_t* from, Values* out) {
        Halves halves;
        std::memcpy(&halves, from, sizeof halves);
        Bits wide;
        widen<N>(halves, &wide);
        wide <<= 16;
        std::memcpy(out, &wide, sizeof *out);
    }
    INLINE static void store(const Values* values, float* to) { std::memcpy(to, values, sizeof *values); }
    INLINE static void store(const Values* values, std::uint16_t* to) {  // as narrow() rounds
        Bits bits;
        std::memcpy(&bits, values, sizeof bits);
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        bits = *values != *values ? Bits{} + NO_NUMBER : bits;
        const Halves halves = __builtin_convertvector(bits, Halves);
        std::memcpy(to, &halves, sizeof halves);
    }
};

// 2^n p with whole n from -126 to 127, or any where it is an instruction.
template <int N>
INLINE void scaled(const typename Kinds<N>::Values& p, const typename Kinds<N>::Values& n, typename Kinds<N>::Values* out) {
#ifdef CAMELID_X86
    if constexpr (WIDEST(N)) {
        asm("vscalefps %2, %1, %0" : "=v"(*out) : "v"(p), "v"(n));
        return;
    }
#endif
    const auto bits = (__builtin_convertvector(n, typename Kinds<N>::Whole) + 127) << 23;
    typename Kinds<N>::Values scale;
    std::memcpy(&scale, &bits, sizeof scale);
    *out = p * scale;
}

// exp_negative() of each value.
template <int N>
INLINE void exp_values(typename Lanes<N>::Values* values) {
    using Values = typename Lanes<N>::Values;
    const Values x = *values;
    const Values y = WIDEST(N) ? x : x < -87.0f ? Values{} - 87.0f : x;
    const Values shifted = y * 1.44269504f + 12582912.0f;
    const Values n = shifted - 12582912.0f;
    const Values r = y - n * 0.693359375f + n * 2.12194440e-4f;
    Values p;
    exp_series(&r, &p);
    scaled<N>(p, n, &p);
    *values = x < -87.0f ? Values{} : p;
}

// e^(value - top) of row[0 … N-1].
template <int N, typename T>
INLINE void exp_below(const T* row, float top, typename Lanes<N>::Values* out) {
    Lanes<N>::load(row, out);
    *out -= top;
    exp_values<N>(out);
}

// The greatest and the sum of a register's values, halves at a time. Through memory, as GCC before 12 has to do it, each
// half waits for the whole to be written.
template <typename Part, typename Wide>
INLINE void halve(const Wide& values, Part* low, Part* high) {
#if defined(__clang__) || __GNUC__ >= 12
    if constexpr (sizeof(Wide) == 64) {
        *low = __builtin_shufflevector(values, values, 0, 1, 2, 3, 4, 5, 6, 7);
        *high = __builtin_shufflevector(values, values, 8, 9, 10, 11, 12, 13, 14, 15);
    } else {
        *low = __builtin_shufflevector(values, values, 0, 1, 2, 3);
        *high = __builtin_shufflevector(values, values, 4, 5, 6, 7);
    }
#else
    std::memcpy(low, &values, sizeof *low);
    std::memcpy(high, reinterpret_cast<const char*>(&values) + sizeof *low, sizeof *high);
#endif
}

template <typename V>
using HalfOf = std::conditional_t<std::is_same_v<V, typename Lanes<sizeof(V) / 4>::Values>,
                                  typename Lanes<sizeof(V) / 8>::Values, typename Lanes<sizeof(V) / 8>::Whole>;

// Of four values v, v2 v3 v0 v1.
template <typename V>
INLINE void turn(const V& v, V* out) {
    *out = V{v[2], v[3], v[0], v[1]};
}

template <typename V>
INLINE auto greatest(const V& values) {
    if constexpr (sizeof(V) == 16) {
        V turned;
        turn(values, &turned);
        turned = values > turned ? values : turned;
        return turned[0] > turned[1] ? turned[0] : turned[1];
    } else {
        HalfOf<V> a, b;
        halve(values, &a, &b);
        a = a > b ? a : b;
        return greatest(a);
    }
}

template <typename V>
INLINE auto sum_of(const V& values) {
    if constexpr (sizeof(V) == 16) {
        V turned;
        turn(values, &turned);
        turned += values;
        return turned[0] + turned[1];
    } else {
        HalfOf<V> a, b;
        halve(values, &a, &b);
        a += b;
        return sum_of(a);
    }
}

// R rows of C [R, width] = or += A [R, k] B [k, width], row-major with the given row lengths.
template <typename K, int R>
INLINE void tile(std::int64_t k, const float* a, std::int64_t a_row, const float* b, std::int64_t b_row, float* c,
                 std::int64_t c_row, bool add) {
    using V = typename K::Vector;
    V sum[R][K::across];
    for (int r = 0; r < R; ++r)
        for (int x = 0; x < K::across; ++x)
            if (add)
                std::memcpy(&sum[r][x], c + r * c_row + x * K::lanes, sizeof(V));  // may be unaligned
            else
                sum[r][x] = V{};
    for (std::int64_t i = 0; i < k; ++i) {
        V line[K::across];
        for (int x = 0; x < K::across; ++x) std::memcpy(&line[x], b + i * b_row + x * K::lanes, sizeof(V));
        for (int r = 0; r < R; ++r)
            for (int x = 0; x < K::across; ++x) sum[r][x] += a[r * a_row + i] * line[x];
    }
    for (int r = 0; r < R; ++r)
        for (int x = 0; x < K::across; ++x) std::memcpy(c + r * c_row + x * K::lanes, &sum[r][x], sizeof(V));
}

template <typename K>
INLINE void stripe(std::int64_t m, std::int64_t k, const float* a, std::int64_t a_row, const float* b,
                   std::int64_t b_row, float* c, std::int64_t c_row, bool add) {
    std::int64_t i = 0;
    for (; i + K::rows <= m; i += K::rows)
        tile<K, K::rows>(k, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, add);
    for (; i + 2 <= m; i += 2) tile<K, 2>(k, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, add);
    for (; i < m; ++i) tile<K, 1>(k, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, add);
}

// C [m, n] = or += A [m, k] B [k, n]; n is a multiple of 16.
template <typename K>
INLINE void product(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t a_row, const float* b,
                    std::int64_t b_row, float* c, std::int64_t c_row, bool add) {
    using Last = typename K::Narrow;
    std::int64_t j = 0;
    for (; j + K::width <= n; j += K::width) stripe<K>(m, k, a, a_row, b + j, b_row, c + j, c_row, add);
    for (; j < n; j += Last::width) stripe<Last>(m, k, a, a_row, b + j, b_row, c + j, c_row, add);
}

}  // namespace
