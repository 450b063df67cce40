// The functions of struct Level, for the instructions that the including file has switched on.
// Included with LEVEL (a function's name), LEVEL_NAME, and the HAS_… of what may be used.
#include "decoder.hpp"
#include "vector.hpp"

namespace {

using Values = Lanes<16>::Values;

#include "level_integers.hpp"
#include "level_products.hpp"
#include "level_attention.hpp"

void rms_norm_row(const float* row, const float* weight, std::int64_t size, float eps, float* out) {
    Values sum = {}, x, w;
    std::int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
        Lanes<16>::load(row + i, &x);
        sum += x * x;
    }
    float total = sum_of(sum);
    for (; i < size; ++i) total += row[i] * row[i];
    const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(size) + eps);
    for (i = 0; i + 16 <= size; i += 16) {
        Lanes<16>::load(row + i, &x);
        Lanes<16>::load(weight + i, &w);
        x = x * scale * w;
        Lanes<16>::store(&x, out + i);
    }
    for (; i < size; ++i) out[i] = row[i] * scale * weight[i];
}

void swiglu_row(const float* gate, const float* up, std::int64_t size, float* out) {
    for (std::int64_t i = 0; i < size; i += 16) {
        Values g, u, e;
        Lanes<16>::load(gate + i, &g);
        Lanes<16>::load(up + i, &u);
        e = g < 0.0f ? g : -g;  // e^-|g|
        exp_values<16>(&e);
        g = (g < 0.0f ? g * e : g) / (e + 1.0f) * u;
        Lanes<16>::store(&g, out + i);
    }
}

void rotate_head(float* head, const float* cos, const float* sin, std::int64_t head_dim) {
    const std::int64_t half = head_dim / 2;
    for (std::int64_t i = 0; i < half; i += 8) {
        Lanes<8>::Values first, second, c, s, turned;
        Lanes<8>::load(head + i, &first);
        Lanes<8>::load(head + half + i, &second);
        Lanes<8>::load(cos + i, &c);
        Lanes<8>::load(sin + i, &s);
        turned = first * c - second * s;
        Lanes<8>::store(&turned, head + i);
        turned = second * c + first * s;
        Lanes<8>::store(&turned, head + half + i);
    }
}

}  // namespace

const Level* LEVEL() {
    static const Level level = {LEVEL_NAME, prepare,     multiply, rms_norm_row,
                                swiglu_row, rotate_head, keep,     attend};
    return &level;
}
