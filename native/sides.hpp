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
template <>
struct Head<Half> {
    std::vector<Half> rows, columns;
    std::vector<std::uint32_t> size_pairs, token_pairs;  // [size / 2, padded] and [padded / 2, size]
    const std::uint32_t* over_size() const { return size_pairs.data(); }
    const std::uint32_t* over_tokens(std::int64_t from, std::int64_t size) const {
        return token_pairs.data() + from / 2 * size;
    }

    INLINE void load(const Tensor& from, std::int64_t b, std::int64_t h, const Shape& s, std::int64_t padded, int sides) {
        rows.resize(static_cast<std::size_t>(padded * s.size));
        for (std::int64_t t = 0; t < s.length; ++t)
            std::memcpy(rows.data() + t * s.size, from.row<Half>(b, h, t), static_cast<std::size_t>(s.size) * 2);
        if (sides & COLUMNS) {
            columns.resize(rows.size());
            transpose(rows.data(), padded, s.size, columns.data());
        }
        if (sides & OVER_SIZE) {
            size_pairs.resize(rows.size() / 2);
            transpose(rows.data(), padded, s.size / 2, size_pairs.data());
        }
        if (sides & OVER_TOKENS) {
            token_pairs.resize(rows.size() / 2);
            for (std::int64_t t = 0; t < padded; t += 2)
                paired(rows.data() + t * s.size, rows.data() + (t + 1) * s.size, s.size,
                       token_pairs.data() + t / 2 * s.size);
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
