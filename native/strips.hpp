// Matrices of bfloat16 laid out for `vdpbf16ps`: two values that are multiplied one after the other in a word, the words of
// 16 neighbours side by side.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "pairs.hpp"

#ifdef CAMELID_BF16

namespace {

constexpr std::int64_t WIDE = 32, STEP = 16;  // words of a panel's columns, and of A's rows, that lie together

using Word = std::uint32_t;

// A matrix of bfloat16, or of floats that are rounded when they are laid out. `across`: what is summed over runs from row
// to row, not along a row.
struct Side {
    const void* data;
    std::int64_t row;
    bool floats, across;
};

// Up to 32 values along a row, those from `count` on zero.
TARGET_BF16 inline __m512i some(const Side& from, std::int64_t row, std::int64_t column, std::int64_t count) {
    const __mmask32 real = count >= 32 ? 0xFFFFFFFFu : (1u << std::max<std::int64_t>(count, 0)) - 1;
    if (!from.floats) return _mm512_maskz_loadu_epi16(real, static_cast<const Half*>(from.data) + row * from.row + column);
    const float* at = static_cast<const float*>(from.data) + row * from.row + column;
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(real), at);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(real >> 16), at + 16);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// A stretch of memory, into the second cache.
INLINE void fetch(const void* from, std::int64_t bytes) {
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

// Of 16 columns of two rows two values in a word.
TARGET_BF16 inline __m512i words(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

TARGET_BF16 inline __m256i sixteen(const Half* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
TARGET_BF16 inline __m256i sixteen(const float* from) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
}

// `count` times so, of two rows further down each time; those `ahead` of them are fetched.
template <typename T>
TARGET_BF16 inline void lay_pairs(const T* from, std::int64_t row, std::int64_t count, std::int64_t ahead, Word* to,
                                  std::int64_t step) {
    for (std::int64_t i = 0; i < count; ++i, from += 2 * row, to += step) {
        __builtin_prefetch(from + 2 * ahead * row, 0, 3);
        __builtin_prefetch(from + (2 * ahead + 1) * row, 0, 3);
        _mm512_storeu_si512(to, words(sixteen(from), sixteen(from + row)));
    }
}

// The first `count` of 16 columns of a row, none if there is no such row.
TARGET_BF16 inline __m256i sixteen(const Side& from, std::int64_t row, bool real, std::int64_t column, std::int64_t count) {
    const __mmask16 mask = real ? first_of(count, 0) : 0;
    const std::int64_t at = real ? row * from.row + column : 0;
    if (!from.floats) return _mm256_maskz_loadu_epi16(mask, static_cast<const Half*>(from.data) + at);
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, static_cast<const float*>(from.data) + at)));
}

// Where the words of 16 columns at a time go: strip s of them begins at column(s), and its pair i goes to at(s) +
// i * step.
struct Strips {
    Word* words;
    std::int64_t first, last, strips, pairs, step;
    std::int64_t width = (last - first) / strips, wider = (last - first) % strips;  // so many are one column wider
    std::int64_t column(std::int64_t s) const { return first + width * s + std::min(s, wider); }
    Word* at(std::int64_t s) const {
        return step == STEP ? words + s * pairs * STEP : words + s / 2 * pairs * WIDE + s % 2 * STEP;
    }
};

// Of a matrix of `count` columns that is summed over from row to row: pairs [begin, end) of rows from `from` to `to`.
TARGET_BF16 __attribute__((noinline)) inline void lay_across(const Side& side, std::int64_t count, std::int64_t from, std::int64_t to,
                                                      const Strips& out, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t together = 8;  // pairs: a strip's words are then a stretch
    for (std::int64_t some = begin; some < end; some += together)
        for (std::int64_t s = 0; s < out.strips; ++s) {
            const std::int64_t column = out.column(s), here = count - column, last = std::min(end, some + together);
            Word* at = out.at(s) + some * out.step;
            const std::int64_t row = from + 2 * some, place = row * side.row + column;
            if (here < STEP || from + 2 * last > to)
                for (std::int64_t i = row; i < from + 2 * last; i += 2, at += out.step)
                    _mm512_storeu_si512(at, words(sixteen(side, i, true, column, here),
                                                  sixteen(side, i + 1, i + 1 < to, column, here)));
            else if (side.floats)
                lay_pairs(static_cast<const float*>(side.data) + place, side.row, last - some, together, at, out.step);
            else
                lay_pairs(static_cast<const Half*>(side.data) + place, side.row, last - some, together, at, out.step);
        }
}

// Of a matrix of `count` rows that is summed over along them: strips [begin, end).
TARGET_BF16 __attribute__((noinline)) inline void lay_along(const Side& side, std::int64_t count, std::int64_t from, std::int64_t to,
                                                     const Strips& out, std::int64_t begin, std::int64_t end) {
    for (std::int64_t s = begin; s < end; ++s)
        for (std::int64_t i = 0; i < out.pairs; i += 16) {
            __m512i r[16];
            for (int j = 0; j < 16; ++j) {
                const bool real = out.column(s) + j < count;
                const std::int64_t row = real ? out.column(s) + j : 0;
                r[j] = some(side, row, from + 2 * i, real ? to - from - 2 * i : 0);
                const char* at = static_cast<const char*>(side.data) + ((row + STEP) * side.row + from + 2 * i) * (side.floats ? 4 : 2);
                __builtin_prefetch(at, 0, 2);
                if (side.floats) __builtin_prefetch(at + 64, 0, 2);
            }
            exchange(r);
            for (std::int64_t j = 0; j < std::min<std::int64_t>(16, out.pairs - i); ++j)
                _mm512_storeu_si512(out.at(s) + (i + j) * out.step, r[j]);
        }
}

}  // namespace
#endif
