// Products of bfloat16 with float32 sums: B's rows come in pairs, two neighbours of a column in one word.
#pragma once
#include <cstdint>
#include <cstring>

#include "vector.hpp"
#if defined(CAMELID_X86) && !defined(__clang__)
#include <immintrin.h>
#define CAMELID_BF16
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#endif

namespace {

// What lies there as T [rows, width] to [width, rows]; rows is a multiple of 16.
template <typename T>
INLINE void transpose(const void* from, std::int64_t rows, std::int64_t width, T* to) {
    for (std::int64_t r0 = 0; r0 < rows; r0 += 16)
        for (std::int64_t i = 0; i < width; ++i)
            for (std::int64_t r = r0; r < r0 + 16; ++r)
                std::memcpy(to + i * rows + r, static_cast<const char*>(from) + (r * width + i) * sizeof(T), sizeof(T));
}

// Two rows of a multiple of 16 values as one of pairs.
INLINE void paired(const Half* even, const Half* odd, std::int64_t count, std::uint32_t* to) {
    for (std::int64_t i = 0; i < count; i += 16) {
        Lanes<16>::Halves halves;
        std::memcpy(&halves, odd + i, sizeof halves);
        Lanes<16>::Bits pairs = __builtin_convertvector(halves, Lanes<16>::Bits) << 16;
        std::memcpy(&halves, even + i, sizeof halves);
        pairs |= __builtin_convertvector(halves, Lanes<16>::Bits);
        std::memcpy(to + i, &pairs, sizeof pairs);
    }
}

#ifdef CAMELID_BF16
inline bool has_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

TARGET_BF16 __attribute__((noinline)) inline void narrow_all(const float* from, std::int64_t count, Half* to) {
    for (std::int64_t i = 0; i < count; i += 16) {
        const __m256bh halves = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
        std::memcpy(to + i, &halves, sizeof halves);
    }
}

// R rows and A registers of C [R, 16 A] = or += A [R, 2 pairs] B [pairs, 16 A]. A function by itself, for what calls it
// is of CPUs without such products too.
template <int R, int A>
TARGET_BF16 __attribute__((noinline)) void pair_tile(std::int64_t pairs, const Half* a, std::int64_t a_row,
                                                     const std::uint32_t* b, std::int64_t b_row, float* c,
                                                     std::int64_t c_row, bool add) {
    __m512 sum[R][A];
    for (int r = 0; r < R; ++r)
        for (int x = 0; x < A; ++x) sum[r][x] = add ? _mm512_loadu_ps(c + r * c_row + x * 16) : _mm512_setzero_ps();
    for (std::int64_t i = 0; i < pairs; ++i) {
        __m512bh line[A];
        for (int x = 0; x < A; ++x) line[x] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + i * b_row + x * 16));
        for (int r = 0; r < R; ++r) {
            std::int32_t two;
            std::memcpy(&two, a + r * a_row + 2 * i, sizeof two);
            const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
            for (int x = 0; x < A; ++x) sum[r][x] = _mm512_dpbf16_ps(sum[r][x], both, line[x]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int x = 0; x < A; ++x) _mm512_storeu_ps(c + r * c_row + x * 16, sum[r][x]);
}

template <int A>
INLINE void pair_stripe(std::int64_t m, std::int64_t pairs, const Half* a, std::int64_t a_row, const std::uint32_t* b,
                        std::int64_t b_row, float* c, std::int64_t c_row, bool add) {
    constexpr int rows = 24 / A;
    std::int64_t i = 0;
    for (; i + rows <= m; i += rows)
        pair_tile<rows, A>(pairs, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, add);
    for (; i + 4 <= m; i += 4) pair_tile<4, A>(pairs, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, add);
    for (; i < m; ++i) pair_tile<1, A>(pairs, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, add);
}

// C [m, n] = or += A [m, k] B [k, n], B in pairs of rows; n is a multiple of 16, k of 2.
template <typename K>
INLINE void product(std::int64_t m, std::int64_t n, std::int64_t k, const Half* a, std::int64_t a_row,
                    const std::uint32_t* b, std::int64_t b_row, float* c, std::int64_t c_row, bool add) {
    std::int64_t j = 0;
    for (; j + 48 <= n && (n - j) % 32; j += 48) pair_stripe<3>(m, k / 2, a, a_row, b + j, b_row, c + j, c_row, add);
    for (; j + 32 <= n; j += 32) pair_stripe<2>(m, k / 2, a, a_row, b + j, b_row, c + j, c_row, add);
    for (; j < n; j += 16) pair_stripe<1>(m, k / 2, a, a_row, b + j, b_row, c + j, c_row, add);
}
#endif

}  // namespace
