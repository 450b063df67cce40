// Matrices into the layout that decoder.hpp describes.
#include <cstdint>
#include <cstring>

#include "decoder.hpp"
#include "share.hpp"
#include "vector.hpp"

namespace {

Matrix described(int kind, std::int64_t rows, std::int64_t columns, std::int64_t group, int zero) {
    return {nullptr, rows, columns, group, static_cast<Number>(kind), static_cast<Zero>(zero)};
}

// to [count][32 rows] = load(row, 0 … count - 1), of rows that are not there 0. A line of each row at a time: rows often lie
// a power of two apart, and then the first cache cannot hold a line of all of them.
template <typename To, typename Load>
INLINE void side_by_side(std::int64_t count, std::int64_t filled, To* to, const Load& load) {
    constexpr std::int64_t line = 64 / sizeof(To);
    for (std::int64_t start = 0; start < count; start += line) {
        const std::int64_t end = start + line < count ? start + line : count;
        for (std::int64_t r = 0; r < PANEL; ++r)
            for (std::int64_t k = start; k < end; ++k) to[k * PANEL + r] = r < filled ? load(r, k) : To{};
    }
}

template <typename T>
INLINE T read(const void* from, std::int64_t at) {
    T found;
    std::memcpy(&found, static_cast<const T*>(from) + at, sizeof found);
    return found;
}

// From c0 c1, c2 c3, c4 c5, c6 c7 to c0 c4, c1 c5, c2 c6, c3 c7: eight columns of a row, two a byte.
INLINE std::uint32_t four_apart(std::uint32_t word) {
    const std::uint32_t even = word & 0x0F0F0F0F, odd = word >> 4 & 0x0F0F0F0F;  // c0 c2 c4 c6 and c1 c3 c5 c7
    const auto spread = [](std::uint32_t two) { return (two | two << 8) & 0x00FF00FF; };
    const std::uint32_t low = spread(even & 0xFFFF) | spread(odd & 0xFFFF) << 8;
    const std::uint32_t high = spread(even >> 16) | spread(odd >> 16) << 8;
    return low | high << 4;
}

// A panel of floats, from `weight` at its first row.
void pack_panel(const Matrix& m, const void* weight, bool halves, std::int64_t filled, std::uint8_t* out) {
    const std::int64_t row = m.columns, half = row / 2;
    auto* const words = reinterpret_cast<std::uint32_t*>(out);
    if (m.kind == FLOAT16)
        side_by_side(row, filled, reinterpret_cast<std::uint16_t*>(out),
                     [=](std::int64_t r, std::int64_t k) { return read<std::uint16_t>(weight, r * row + k); });
    else if (m.kind == BFLOAT16 && halves)
        side_by_side(half, filled, words,
                     [=](std::int64_t r, std::int64_t k) { return read<std::uint32_t>(weight, r * half + k); });
    else if (m.kind == BFLOAT16)
        side_by_side(half, filled, words, [=](std::int64_t r, std::int64_t k) {
            std::uint16_t two[2];
            for (int i = 0; i < 2; ++i) narrow(read<float>(weight, r * row + 2 * k + i), &two[i]);
            return read<std::uint32_t>(two, 0);
        });
    else if (halves)
        side_by_side(row, filled, reinterpret_cast<float*>(out),
                     [=](std::int64_t r, std::int64_t k) { return widened(read<std::uint16_t>(weight, r * row + k)); });
    else
        side_by_side(row, filled, words,
                     [=](std::int64_t r, std::int64_t k) { return read<std::uint32_t>(weight, r * row + k); });
}

// A group of a panel, [group / 4 or 8][32 rows][4 bytes], from the rows' bytes, of which a row has `row_words` times four.
void pack_group(const Matrix& m, const std::uint8_t* q, std::int64_t row_words, std::int64_t filled, std::uint8_t* out) {
    auto* const words = reinterpret_cast<std::uint32_t*>(out);
    if (m.kind == INT8)
        side_by_side(m.group / 4, filled, words,
                     [=](std::int64_t r, std::int64_t k) { return read<std::uint32_t>(q, r * row_words + k); });
    else
        side_by_side(m.group / 8, filled, words,
                     [=](std::int64_t r, std::int64_t k) { return four_apart(read<std::uint32_t>(q, r * row_words + k)); });
}

}  // namespace

extern "C" {

std::int64_t camelid_packed_bytes(int kind, std::int64_t rows, std::int64_t columns, std::int64_t group, int zero) {
    const Matrix m = described(kind, rows, columns, group, zero);
    return m.panels() * m.panel_bytes();
}

// `weight` [rows, columns] as FLOAT32 or BFLOAT16 from float or bfloat16, or as FLOAT16 from float16. `halves`: it has
// two bytes a value.
void camelid_pack_floats(int kind, const void* weight, int halves, std::int64_t rows, std::int64_t columns,
                         std::uint8_t* out, int threads) {
    const Matrix m = described(kind, rows, columns, columns, MIDDLE);
    const auto* bytes = static_cast<const std::uint8_t*>(weight);
    const std::int64_t panel_rows = PANEL * columns * (halves ? 2 : 4);
    each(m.panels(), threads, [&](std::int64_t p) {
        const std::int64_t filled = m.rows_of(p);
        pack_panel(m, bytes + p * panel_rows, halves != 0, filled, out + p * m.panel_bytes());
    });
}

// q [rows, columns * bits / 8]: bytes, or of 4 bits two a byte, the even column low; scales [rows, columns / group] float16,
// zeros likewise, in bytes (`zero` BYTES) or float16 (LEASTS).
void camelid_pack_integers(int kind, const std::uint8_t* q, const std::uint16_t* scales, int zero, const void* zeros,
                           std::int64_t rows, std::int64_t columns, std::int64_t group, std::uint8_t* out, int threads) {
    const Matrix m = described(kind, rows, columns, group, zero);
    const int zero_bytes = zero == MIDDLE ? 0 : zero == BYTES ? 1 : 2;
    const std::int64_t groups = columns / group, row_bytes = columns * (kind == INT8 ? 2 : 1) / 2;
    each(m.panels(), threads, [&](std::int64_t p) {
        std::uint8_t* to = out + p * m.panel_bytes();
        const std::int64_t first = p * PANEL, filled = m.rows_of(p);
        for (std::int64_t g = 0; g < groups; ++g, to += m.group_bytes()) {
            std::memset(to, 0, static_cast<std::size_t>(m.scale_bytes()));
            for (std::int64_t r = 0; r < filled; ++r) {
                const std::int64_t at = (first + r) * groups + g;
                std::memcpy(to + r * 2, scales + at, 2);
                if (zeros)
                    std::memcpy(to + 64 + r * zero_bytes, static_cast<const std::uint8_t*>(zeros) + at * zero_bytes,
                                static_cast<std::size_t>(zero_bytes));
            }
            pack_group(m, q + first * row_bytes + g * row_bytes / groups, row_bytes / 4, filled, to + m.scale_bytes());
        }
    });
}
}
