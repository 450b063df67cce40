// Products of bfloat16 with float32 sums: B's rows come in pairs, two neighbours of a column in one word.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vector.hpp"
#if defined(CAMELID_X86) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the compiler's own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#define CAMELID_BF16
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#endif

namespace {

// [rows, width] to [width, rows]; rows is a multiple of 16.
INLINE void transpose(const float* from, std::int64_t rows, std::int64_t width, float* to) {
    for (std::int64_t r0 = 0; r0 < rows; r0 += 16)
        for (std::int64_t i = 0; i < width; ++i)
            for (std::int64_t r = r0; r < r0 + 16; ++r) to[i * rows + r] = from[r * width + i];
}

// Two rows of a multiple of 16 values as one of pairs.
INLINE void paired(const Half* even, const Half* odd, std::int64_t count, std::uint32_t* to) {
    for (std::int64_t i = 0; i < count; i += 16) {
        Lanes<16>::Halves halves;
        std::memcpy(&halves, odd + i, sizeof halves);
        Lanes<16>::Bits low, high;
        widen<16>(halves, &high);
        std::memcpy(&halves, even + i, sizeof halves);
        widen<16>(halves, &low);
        const Lanes<16>::Bits pairs = high << 16 | low;
        std::memcpy(to + i, &pairs, sizeof pairs);
    }
}

#ifdef CAMELID_BF16
INLINE std::uint16_t first_of(std::int64_t count, std::int64_t before) {
    return static_cast<std::uint16_t>((1u << std::clamp<std::int64_t>(count - before, 0, 16)) - 1);
}

// 16 registers of 16 words, exchanged.
TARGET_AVX512 inline void exchange(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

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
    for (; i + 8 <= m; i += 8) pair_tile<8, A>(pairs, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, add);
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
