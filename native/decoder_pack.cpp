// Matrices into the layout that decoder.hpp describes.
#include <cstdint>
#include <cstring>
#include <vector>

#include "decoder.hpp"
#include "share.hpp"
#include "vector.hpp"

namespace {

Matrix described(int kind, std::int64_t rows, std::int64_t columns, std::int64_t group, int zeros) {
    return {nullptr, rows, columns, group, static_cast<Number>(kind), zeros != 0};
}

// [columns / together][32 rows][together] of a panel, from weights of the same or another type.
template <typename From, typename To>
void pack_panel(const Matrix& m, const From* weight, std::int64_t panel, int together, To* to) {
    for (std::int64_t k = 0; k < m.columns; k += together)
        for (std::int64_t r = 0; r < PANEL; ++r)
            for (int i = 0; i < together; ++i, ++to) {
                const std::int64_t row = panel * PANEL + r;
                if (row >= m.rows)
                    *to = To{};
                else if constexpr (sizeof(From) == sizeof(To))
                    std::memcpy(to, weight + row * m.columns + k + i, sizeof(To));
                else
                    narrow(widened(weight[row * m.columns + k + i]), to);
            }
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

void round_group(const float* weight, std::int64_t group, int bits, std::uint8_t* q, std::uint16_t* scale) {
    float low = 0, high = 0;
    for (std::int64_t i = 0; i < group; ++i) {
        low = weight[i] < low ? weight[i] : low;
        high = weight[i] > high ? weight[i] : high;
    }
    const float middle = static_cast<float>(1 << (bits - 1)), most = 2 * middle - 1;
    float step = high / (middle - 1) > -low / middle ? high / (middle - 1) : -low / middle;
    step = step > 5.9604644775390625e-08f ? step : 5.9604644775390625e-08f;  // 2^-24, the least that float16 holds
    *scale = half_above(step);
    const float wide = half_to_float(*scale);
    for (std::int64_t i = 0; i < group; ++i) {
        float steps = weight[i] / wide + 12582912.0f - 12582912.0f + middle;  // to the nearest whole number
        steps = steps < 0 ? 0 : steps > most ? most : steps;
        const auto whole = static_cast<std::uint8_t>(steps);
        if (bits == 8)
            q[i] = whole;
        else
            q[i / 2] = static_cast<std::uint8_t>(i % 2 ? q[i / 2] | whole << 4 : whole);
    }
}

// One row's columns of a group, four to every PANEL * 4 bytes.
void pack_group(const Matrix& m, const std::uint8_t* q, std::uint8_t* to) {
    if (m.kind == INT8) {
        for (std::int64_t k = 0; k < m.group; k += 4, to += PANEL * 4) std::memcpy(to, q + k, 4);
        return;
    }
    for (std::int64_t k = 0; k < m.group; k += 8, q += 4, to += PANEL * 4)
        for (int i = 0; i < 2; ++i) {
            to[2 * i] = static_cast<std::uint8_t>((q[i] & 15) | q[2 + i] << 4);
            to[2 * i + 1] = static_cast<std::uint8_t>(q[i] >> 4 | (q[2 + i] & 0xF0));
        }
}

}  // namespace

extern "C" {

std::int64_t camelid_packed_bytes(int kind, std::int64_t rows, std::int64_t columns, std::int64_t group, int zeros) {
    const Matrix m = described(kind, rows, columns, group, zeros);
    return m.panels() * m.panel_bytes();
}

// `weight` [rows, columns] as FLOAT32 or BFLOAT16 from float or bfloat16, or as FLOAT16 from float16. `halves`: it has
// two bytes a value.
void camelid_pack_floats(int kind, const void* weight, int halves, std::int64_t rows, std::int64_t columns,
                         std::uint8_t* out, int threads) {
    const Matrix m = described(kind, rows, columns, columns, 0);
    const float* floats = static_cast<const float*>(weight);
    const std::uint16_t* words = static_cast<const std::uint16_t*>(weight);
    each(m.panels(), threads, [&](std::int64_t p) {
        std::uint8_t* to = out + p * m.panel_bytes();
        if (kind == FLOAT32)
            halves ? pack_panel(m, words, p, 1, reinterpret_cast<float*>(to))
                   : pack_panel(m, floats, p, 1, reinterpret_cast<float*>(to));
        else if (kind == FLOAT16)
            pack_panel(m, words, p, 1, reinterpret_cast<std::uint16_t*>(to));
        else
            halves ? pack_panel(m, words, p, 2, reinterpret_cast<std::uint16_t*>(to))
                   : pack_panel(m, floats, p, 2, reinterpret_cast<std::uint16_t*>(to));
    });
}

// q [rows, columns * bits / 8]: bytes, or of 4 bits two a byte, the even column low; scales [rows, columns / group] float16,
// zeros likewise in bytes or null.
void camelid_pack_integers(int kind, const std::uint8_t* q, const std::uint16_t* scales, const std::uint8_t* zeros,
                           std::int64_t rows, std::int64_t columns, std::int64_t group, std::uint8_t* out, int threads) {
    const Matrix m = described(kind, rows, columns, group, zeros != nullptr);
    const std::int64_t groups = columns / group, bits = kind == INT8 ? 8 : 4;
    each(m.panels(), threads, [&](std::int64_t p) {
        std::uint8_t* to = out + p * m.panel_bytes();
        std::memset(to, 0, static_cast<std::size_t>(m.panel_bytes()));
        const std::int64_t filled = rows - p * PANEL < PANEL ? rows - p * PANEL : PANEL;
        for (std::int64_t r = 0; r < filled; ++r) {
            const std::int64_t row = p * PANEL + r;
            for (std::int64_t g = 0; g < groups; ++g) {
                std::uint8_t* here = to + g * m.group_bytes();
                std::memcpy(here + r * 2, scales + row * groups + g, 2);
                if (zeros) here[64 + r] = zeros[row * groups + g];
                pack_group(m, q + (row * columns + g * group) * bits / 8, here + m.scale_bytes() + r * 4);
            }
        }
    });
}

// What `round_to_nearest` of camelid/model/quantized.py says without zeros, bit for bit: q and scales as above, from float
// (dtype 0), float16 (1) or bfloat16 (2).
void camelid_round(const void* weight, int dtype, std::int64_t rows, std::int64_t columns, std::int64_t group, int bits,
                   std::uint8_t* q, std::uint16_t* scales, int threads) {
    const std::int64_t groups = columns / group, row_bytes = columns * bits / 8, some = 16;
    each((rows + some - 1) / some, threads, [&](std::int64_t task) {
        const std::int64_t end = (task + 1) * some < rows ? (task + 1) * some : rows;
        std::vector<float> wide(static_cast<std::size_t>(group));
        for (std::int64_t row = task * some; row < end; ++row)
            for (std::int64_t g = 0; g < groups; ++g) {
                const std::int64_t at = row * columns + g * group;
                const auto* halves = static_cast<const std::uint16_t*>(weight) + at;
                if (dtype == 0)
                    std::memcpy(wide.data(), static_cast<const float*>(weight) + at, wide.size() * sizeof(float));
                else
                    for (std::int64_t i = 0; i < group; ++i)
                        wide[static_cast<std::size_t>(i)] = dtype == 1 ? half_to_float(halves[i]) : widened(halves[i]);
                std::uint8_t* to = q + row * row_bytes + g * group * bits / 8;
                round_group(wide.data(), group, bits, to, scales + row * groups + g);
            }
    });
}
}
