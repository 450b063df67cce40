// Matrices into the layout that decoder.hpp describes.
#include <cstdint>
#include <cstring>

#include "decoder.hpp"
#include "pool.hpp"
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
    Pool(threads).run(m.panels(), [&](std::int64_t p) {
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

// q [rows, columns] in 0 … 255 or 0 … 15, scales [rows, columns / group] float16, zeros likewise in bytes or null.
void camelid_pack_integers(int kind, const std::uint8_t* q, const std::uint16_t* scales, const std::uint8_t* zeros,
                           std::int64_t rows, std::int64_t columns, std::int64_t group, std::uint8_t* out, int threads) {
    const Matrix m = described(kind, rows, columns, group, zeros != nullptr);
    const std::int64_t groups = columns / group;
    Pool(threads).run(m.panels(), [&](std::int64_t p) {
        std::uint8_t* to = out + p * m.panel_bytes();
        std::memset(to, 0, static_cast<std::size_t>(m.panel_bytes()));
        const std::int64_t filled = rows - p * PANEL < PANEL ? rows - p * PANEL : PANEL;
        for (std::int64_t r = 0; r < filled; ++r) {
            const std::int64_t row = p * PANEL + r;
            for (std::int64_t g = 0; g < groups; ++g) {
                std::memcpy(to + (g * PANEL + r) * 2, scales + row * groups + g, 2);
                if (zeros) to[groups * PANEL * 2 + g * PANEL + r] = zeros[row * groups + g];
            }
            std::uint8_t* data = to + m.scale_bytes() + r * 4;
            const std::uint8_t* from = q + row * columns;
            if (kind == INT8)
                for (std::int64_t k = 0; k < columns; k += 4) std::memcpy(data + k * PANEL, from + k, 4);
            else
                for (std::int64_t k = 0; k < columns; k += 8)
                    for (int i = 0; i < 4; ++i)
                        data[k / 2 * PANEL + i] = static_cast<std::uint8_t>(from[k + i] | from[k + 4 + i] << 4);
        }
    });
}

}
