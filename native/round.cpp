// Weights to whole numbers with a scale for each group, once for each width of registers, chosen by the CPU at load.
#include <atomic>
#include <cstdint>
#include <cstring>

#include "share.hpp"
#include "vector.hpp"

namespace {

struct Float16 {
    std::uint16_t bits;
};

template <int N, typename T>
INLINE void load_as_floats(const T* from, typename Lanes<N>::Values* out) {
    if constexpr (std::is_same_v<T, Float16>) {  // as half_to_float() says
        using Bits = typename Lanes<N>::Bits;
        typename Lanes<N>::Halves halves;
        std::memcpy(&halves, from, sizeof halves);
        const Bits half = __builtin_convertvector(halves, Bits), magnitude = half & 0x7FFF;
        Bits bits = (magnitude << 13) + 0x38000000;
        bits = magnitude >= 0x7C00 ? magnitude << 13 | 0x7F800000 : bits;
        typename Lanes<N>::Values normal, small;
        std::memcpy(&normal, &bits, sizeof normal);
        small = __builtin_convertvector(magnitude, typename Lanes<N>::Values) * 5.9604644775390625e-8f;
        normal = magnitude < 0x400 ? small : normal;
        std::memcpy(&bits, &normal, sizeof bits);
        bits |= (half & 0x8000) << 16;
        std::memcpy(out, &bits, sizeof bits);
    } else {
        Lanes<N>::load(from, out);
    }
}

// The first `count` of N values; the others are 0.
template <int N, typename T>
INLINE void load_some(const T* from, std::int64_t count, typename Lanes<N>::Values* out) {
    if (count >= N) return load_as_floats<N>(from, out);
    T part[N] = {};
    std::memcpy(part, from, static_cast<std::size_t>(count) * sizeof(T));
    load_as_floats<N>(part, out);
}

// Whole numbers below 256 as bytes.
template <int N>
INLINE void store_bytes(const typename Lanes<N>::Whole& whole, std::int64_t count, std::uint8_t* to) {
    const auto bytes = __builtin_convertvector(whole, typename Lanes<N>::Bytes);
    std::memcpy(to, &bytes, static_cast<std::size_t>(count < N ? count : N));
}

// Whole numbers below 16 two a byte, the even one low.
template <int N>
INLINE void store_nibbles(const typename Lanes<N>::Whole& whole, std::int64_t count, std::uint8_t* to) {
    const auto words = __builtin_convertvector(whole, typename Lanes<N>::Halves);
    typename Lanes<N / 2>::Bits pairs;
    std::memcpy(&pairs, &words, sizeof pairs);
    pairs = (pairs | pairs >> 12) & 0xFF;
    const auto bytes = __builtin_convertvector(pairs, typename Lanes<N / 2>::Bytes);
    std::memcpy(to, &bytes, static_cast<std::size_t>((count < N ? count : N) / 2));
}

// The least float16 that is not below a positive number.
std::uint16_t half_above(float value) {
    const float least = 6.103515625e-05f;  // 2^-14, of the normal ones
    if (value < least) {
        const float steps = value * 16777216.0f;
        const auto whole = static_cast<std::uint16_t>(steps);
        return static_cast<std::uint16_t>(whole + (static_cast<float>(whole) < steps));
    }
    std::uint32_t word;
    std::memcpy(&word, &value, 4);
    const std::uint32_t half = (word >> 13) - (112u << 10) + ((word & 0x1FFF) != 0);
    return static_cast<std::uint16_t>(half < 0x7C00 ? half : 0x7C00);
}

// `poison` stays 0 unless a weight is no number, or infinite.
template <int N, typename T>
INLINE void round_group(const T* weight, std::int64_t group, int bits, std::uint8_t* q, std::uint16_t* scale,
                        typename Lanes<N>::Values* poison) {
    using Values = typename Lanes<N>::Values;
    Values x, low = {}, high = {};
    for (std::int64_t i = 0; i < group; i += N) {
        load_some<N>(weight + i, group - i, &x);
        low = x < low ? x : low;
        high = x > high ? x : high;
        *poison += x * 0.0f;
    }
    const float middle = static_cast<float>(1 << (bits - 1)), most = 2 * middle - 1, above = greatest(high);
    low = -low;
    const float below = greatest(low);
    float step = above / (middle - 1) > below / middle ? above / (middle - 1) : below / middle;
    step = step > 5.9604644775390625e-08f ? step : 5.9604644775390625e-08f;  // 2^-24, the least that float16 holds
    *scale = half_above(step);
    const float wide = half_to_float(*scale);
    for (std::int64_t i = 0; i < group; i += N) {
        load_some<N>(weight + i, group - i, &x);
        Values steps = x / wide + 12582912.0f - 12582912.0f + middle;  // to the nearest whole number
        steps = steps < 0.0f ? Values{} : steps;
        steps = steps > most ? Values{} + most : steps;
        const auto whole = __builtin_convertvector(steps, typename Lanes<N>::Whole);
        bits == 8 ? store_bytes<N>(whole, group - i, q + i) : store_nibbles<N>(whole, group - i, q + i / 2);
    }
}

struct Rounding {
    const void* weight;
    int dtype, bits;
    std::int64_t columns, group;
    std::uint8_t* q;
    std::uint16_t* scales;
};

// Whether all of their weights are finite.
template <int N, typename T>
INLINE bool round_rows(const Rounding& r, std::int64_t first, std::int64_t last) {
    const std::int64_t groups = r.columns / r.group, group_bytes = r.group * r.bits / 8;
    typename Lanes<N>::Values poison = {};
    for (std::int64_t g = first * groups; g < last * groups; ++g)
        round_group<N>(static_cast<const T*>(r.weight) + g * r.group, r.group, r.bits, r.q + g * group_bytes, r.scales + g,
                       &poison);
    return sum_of(poison) == 0.0f;
}

template <int N>
INLINE bool part(const Rounding& r, std::int64_t first, std::int64_t last) {
    return r.dtype == 0   ? round_rows<N, float>(r, first, last)
           : r.dtype == 1 ? round_rows<N, Float16>(r, first, last)
                          : round_rows<N, Half>(r, first, last);
}

bool part_plain(const Rounding& r, std::int64_t first, std::int64_t last) { return part<8>(r, first, last); }
#ifdef CAMELID_X86
TARGET_AVX2 bool part_avx2(const Rounding& r, std::int64_t first, std::int64_t last) { return part<8>(r, first, last); }
TARGET_AVX512 bool part_avx512(const Rounding& r, std::int64_t first, std::int64_t last) {
    return part<16>(r, first, last);
}
#endif

}  // namespace

// What `round_to_nearest` of camelid/model/quantized.py says without zeros, bit for bit: q [rows, columns * bits / 8], of 4
// bits two a byte, and scales [rows, columns / group] float16, from float (dtype 0), float16 (1) or bfloat16 (2). Returns 0
// when a weight is no number or infinite.
extern "C" int camelid_round(const void* weight, int dtype, std::int64_t rows, std::int64_t columns, std::int64_t group,
                             int bits, std::uint8_t* q, std::uint16_t* scales, int threads) {
    const Rounding all{weight, dtype, bits, columns, group, q, scales};
    std::atomic<bool> finite{true};
    shared_out(rows, 1, threads, [&, run = CHOSEN(part)](std::int64_t first, std::int64_t last) {
        if (!run(all, first, last)) finite = false;
    });
    return finite;
}
