// Attention's tensors, and what is multiplied of them: a head's tokens, and a block of weights.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "pairs.hpp"

namespace {

constexpr int BLOCK = 64;  // queries or keys at a time

struct Shape {
    std::int64_t batch, heads, kv_heads, length, size;  // size: of a head, a multiple of 16
    float scale;
};

// A [batch, heads, length, size] tensor of float or bfloat16 with any strides but a contiguous last dimension.
struct Tensor {
    void* data;
    std::int64_t batch_stride, head_stride, row_stride;
    int bfloat;

    template <typename T>
    T* row(std::int64_t b, std::int64_t h, std::int64_t t) const {
        return static_cast<T*>(data) + b * batch_stride + h * head_stride + t * row_stride;
    }
};

INLINE void read(const Tensor& from, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t size, float* to) {
    if (from.bfloat)
        for (std::int64_t i = 0; i < size; ++i) to[i] = widened(from.row<Half>(b, h, t)[i]);
    else
        std::memcpy(to, from.row<float>(b, h, t), static_cast<std::size_t>(size) * sizeof(float));
}

INLINE void write(const Tensor& to, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t size,
                  const float* from) {
    if (to.bfloat)
        for (std::int64_t i = 0; i < size; ++i) narrow(from[i], to.row<Half>(b, h, t) + i);
    else
        std::memcpy(to.row<float>(b, h, t), from, static_cast<std::size_t>(size) * sizeof(float));
}

// One head's tokens as sides of a product A B; those past the end are zero. `rows` [padded, size] and `columns` [size,
// padded] are A's. What B is of depends on what is summed over: the size of a head, or the tokens.
enum Side { ROWS = 1, COLUMNS = 2, OVER_SIZE = 4, OVER_TOKENS = 8 };

template <typename T>
struct Head;

template <>
struct Head<float> {
    std::vector<float> rows, columns;
    const float* over_size() const { return columns.data(); }
    const float* over_tokens(std::int64_t from, std::int64_t size) const { return rows.data() + from * size; }

    INLINE void load(const Tensor& from, std::int64_t b, std::int64_t h, const Shape& s, std::int64_t padded, int sides) {
        rows.resize(static_cast<std::size_t>(padded * s.size));  // the padding is zero and stays so
        for (std::int64_t t = 0; t < s.length; ++t) read(from, b, h, t, s.size, rows.data() + t * s.size);
        if (!(sides & (COLUMNS | OVER_SIZE))) return;
        columns.resize(rows.size());
        transpose(rows.data(), padded, s.size, columns.data());
    }
};

#ifdef CAMELID_BF16
// `count` rows of so many words, `row` halves apart, to [words, count], `to_row` words apart; what fills the last 16 rows
// up is zero.
TARGET_BF16 __attribute__((noinline)) inline void words_across(const Half* from, std::int64_t row, std::int64_t count,
                                                               std::int64_t words, std::uint32_t* to, std::int64_t to_row) {
    for (std::int64_t t = 0; t < count; t += 16)
        for (std::int64_t w = 0; w < words; w += 16) {
            __m512i r[16];
            for (std::int64_t j = 0; j < 16; ++j) {
                const bool real = t + j < count;
                r[j] = _mm512_maskz_loadu_epi32(real ? first_of(words, w) : 0, from + (real ? (t + j) * row : 0) + 2 * w);
            }
            exchange(r);
            for (std::int64_t j = 0; j < std::min<std::int64_t>(16, words - w); ++j)
                _mm512_storeu_si512(to + (w + j) * to_row + t, r[j]);
        }
}

template <>
struct Head<Half> {
    std::vector<Half> rows, columns, nothing;
    std::vector<std::uint32_t> size_pairs, token_pairs;  // [size / 2, padded] and [padded / 2, size]
    const std::uint32_t* over_size() const { return size_pairs.data(); }
    const std::uint32_t* over_tokens(std::int64_t from, std::int64_t size) const {
        return token_pairs.data() + from / 2 * size;
    }

    INLINE void load(const Tensor& from, std::int64_t b, std::int64_t h, const Shape& s, std::int64_t padded, int sides) {
        const std::size_t values = static_cast<std::size_t>(padded * s.size);  // those of the padding are zero and stay so
        const Half* const first = from.row<Half>(b, h, 0);
        if (sides & ROWS) {
            rows.resize(values);
            for (std::int64_t t = 0; t < s.length; ++t)
                std::memcpy(rows.data() + t * s.size, first + t * from.row_stride, static_cast<std::size_t>(s.size) * 2);
        }
        if (sides & OVER_SIZE) {
            size_pairs.resize(values / 2);
            words_across(first, from.row_stride, s.length, s.size / 2, size_pairs.data(), padded);
        }
        if (sides & (OVER_TOKENS | COLUMNS)) {
            token_pairs.resize(values / 2);
            nothing.resize(static_cast<std::size_t>(s.size));
            for (std::int64_t t = 0; t < s.length; t += 2) {
                const Half* const even = first + t * from.row_stride;
                paired(even, t + 1 < s.length ? even + from.row_stride : nothing.data(), s.size,
                       token_pairs.data() + t / 2 * s.size);
            }
        }
        if (sides & COLUMNS) {
            columns.resize(values);
            words_across(reinterpret_cast<const Half*>(token_pairs.data()), 2 * s.size, padded / 2, s.size,
                         reinterpret_cast<std::uint32_t*>(columns.data()), padded / 2);
        }
    }
};
#endif

// A block of weights or slopes [BLOCK, BLOCK] as sides of a product.
template <typename T>
struct Square;

template <>
struct Square<float> {
    const float* values;
    INLINE void take(const float* from, std::int64_t) { values = from; }
    const float* rows() const { return values; }
    INLINE const float* over_rows(std::int64_t) { return values; }
};

#ifdef CAMELID_BF16
template <>
struct Square<Half> {
    Half values[BLOCK * BLOCK];
    std::uint32_t pairs[BLOCK * BLOCK / 2];
    INLINE void take(const float* from, std::int64_t rows) { narrow_all(from, rows * BLOCK, values); }
    const Half* rows() const { return values; }
    INLINE const std::uint32_t* over_rows(std::int64_t rows) {
        for (std::int64_t r = 0; r < rows; r += 2)
            paired(values + r * BLOCK, values + (r + 1) * BLOCK, BLOCK, pairs + r / 2 * BLOCK);
        return pairs;
    }
};
#endif

INLINE std::int64_t even(std::int64_t count) { return (count + 1) / 2 * 2; }

}  // namespace
