// The functions of struct Level, for the instructions that the including file has switched on.
// Included with LEVEL (a function's name), LEVEL_NAME, the HAS_… of what may be used, and AMX_TILES where there are any.
#include "decoder.hpp"
#include "vector.hpp"

namespace {

// A register holds so many floats; a panel's rows, or a page's tokens, are so many registers.
#if defined(HAS_VNNI)
constexpr int LANES = 16;
#elif defined(HAS_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PARTS = PANEL / LANES;
static_assert(PANEL == PAGE);
using Register = Lanes<LANES>;
using Values = Register::Values;

#include "level_integers.hpp"
#include "level_products.hpp"
#ifdef AMX_TILES
#include "level_tiles.hpp"
constexpr auto MULTIPLY = multiply_tiled;
#else
constexpr auto MULTIPLY = multiply;
#endif
#include "level_attention.hpp"

void rms_norm_row(const float* row, const float* weight, std::int64_t size, float eps, float* out) {
    Values sum = {}, x, w;
    std::int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        Register::load(row + i, &x);
        sum += x * x;
    }
    float total = sum_of(sum);
    for (; i < size; ++i) total += row[i] * row[i];
    const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(size) + eps);
    for (i = 0; i + LANES <= size; i += LANES) {
        Register::load(row + i, &x);
        Register::load(weight + i, &w);
        x = x * scale * w;
        Register::store(&x, out + i);
    }
    for (; i < size; ++i) out[i] = row[i] * scale * weight[i];
}

void swiglu_row(const float* gate, const float* up, std::int64_t size, float* out) {
    for (std::int64_t i = 0; i < size; i += LANES) {
        Values g, u, e;
        Register::load(gate + i, &g);
        Register::load(up + i, &u);
        e = g < 0.0f ? g : -g;  // e^-|g|
        exp_values<LANES>(&e);
        g = (g < 0.0f ? g * e : g) / (e + 1.0f) * u;
        Register::store(&g, out + i);
    }
}

void rotate_head(float* head, const float* cos, const float* sin, std::int64_t head_dim) {
    const std::int64_t half = head_dim / 2;
    constexpr int some = LANES < 8 ? LANES : 8;  // of what `half` is a multiple
    for (std::int64_t i = 0; i < half; i += some) {
        Lanes<some>::Values first, second, c, s, turned;
        Lanes<some>::load(head + i, &first);
        Lanes<some>::load(head + half + i, &second);
        Lanes<some>::load(cos + i, &c);
        Lanes<some>::load(sin + i, &s);
        turned = first * c - second * s;
        Lanes<some>::store(&turned, head + i);
        turned = second * c + first * s;
        Lanes<some>::store(&turned, head + half + i);
    }
}

std::int64_t likeliest(const float* scores, std::int64_t size) {
    constexpr std::int64_t stretch = 1024;  // whose greatest is found before it is looked for
    std::int64_t where = 0, i = 0;
    float best = scores[0];
    bool real = true;
    for (; i < size; i += stretch) {
        const float* part = scores + i;
        const std::int64_t here = size - i < stretch ? size - i : stretch;
        Values x, most = Values{} + part[0];
        Register::Whole odd = {};
        std::int64_t j = 0;
        for (; j + LANES <= here; j += LANES) {
            Register::load(part + j, &x);
            most = x > most ? x : most;
            odd |= x != x;
        }
        float found = greatest(most);
        for (int l = 0; l < LANES; ++l) real = real && !odd[l];
        for (; j < here; ++j) {
            found = part[j] > found ? part[j] : found;
            real = real && part[j] == part[j];
        }
        if (found > best) {
            best = found;
            where = i;
        }
    }
    if (!real) return -1;
    while (scores[where] != best) ++where;  // in that stretch: it was the first to have it
    return where;
}

}  // namespace

const Level* LEVEL() {
    static const Level level = {LEVEL_NAME,  prepare, MULTIPLY, rms_norm_row, swiglu_row,
                                rotate_head, keep,    attend,   likeliest};
    return &level;
}
