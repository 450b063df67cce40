// Products by AMX's tiles, with AMX_TILES for what does them: bfloat16 always, for a token alone must come out as it does
// among others; bytes where there are enough tokens, for sums of whole numbers are the same by any instruction.

constexpr std::int64_t TILE = 16;           // tokens of a tile of activations, and rows of a tile of sums
constexpr std::int64_t LEAST_TILED = 8;     // tokens, of whole numbers
constexpr std::int64_t CHUNK = 1 << 20;     // bytes of activations that stay in the second cache
constexpr std::int64_t SOME_COLUMNS = 512;  // of a panel in bfloat16 that stay in the first
constexpr std::int64_t AHEAD = 8192;        // bytes of weights fetched before their turn
constexpr int SOME_BLOCKS = 8;              // whose sums of whole numbers stay in the first cache
constexpr std::int64_t SOME_TOKENS = 64;    // that share unpacked halves of bytes
static_assert(BLOCK == 32 && PANEL == 2 * TILE && LANES == TILE, "a tile has a block's columns and half a panel's rows");

// f(tiles, a panel's number, from, to, count, whether to fetch): panel after panel for so many tokens as have `each` bytes
// and stay in a cache, at least SOME_TOKENS; of these as many at a time as `most` in tiles of equal shape, then the rest.
template <typename F>
INLINE void by_tiles(std::int64_t tokens, std::int64_t each, std::int64_t most, int wide, std::int64_t from,
                     std::int64_t to, const F& f) {
    const std::int64_t fitting = CHUNK / each / SOME_TOKENS * SOME_TOKENS, chunk = fitting ? fitting : SOME_TOKENS;
    for (std::int64_t begin = 0; begin < tokens; begin += chunk) {
        const std::int64_t end = tokens - begin < chunk ? tokens : begin + chunk;
        const std::int64_t whole = begin + (end - begin) / most * most;
        for (std::int64_t p = from; p < to; ++p) {
            const auto shaped = [&](std::int64_t count, std::int64_t t0, std::int64_t t1) {
                const std::int64_t first = count < TILE ? count : TILE;
                AMX_TILES tiles(static_cast<int>(first), static_cast<int>(count - first), wide);
                f(tiles, p, t0, t1, count, t0 == begin);
            };
            if (whole > begin) shaped(most, begin, whole);
            if (end > whole) shaped(end - whole, whole, end);
        }
    }
}

// Some columns of some tokens, up to 32, with a panel.
struct BfloatTile {
    const std::uint8_t* panel;
    const std::uint16_t* a;  // [tokens, columns]
    std::int64_t columns, from, to;
    float* out;
    std::int64_t out_row;
};

// out [TWO tiles or one of tokens, 32 rows] += products of the tile's columns, or = where they are the first ones. Whoever
// comes FIRST over a panel fetches what follows.
template <bool TWO, bool FIRST>
void bfloat_tile(AMX_TILES& tiles, const BfloatTile& by) {
    constexpr std::int64_t step = BLOCK * PANEL * 2, weights_row = PANEL * 4;
    float* const second = by.out + TILE * by.out_row;
    if (by.from == 0) {
        tiles.template zero<0>();
        tiles.template zero<1>();
        if (TWO) tiles.template zero<2>();
        if (TWO) tiles.template zero<3>();
    } else {
        tiles.template load<0>(by.out, by.out_row * 4);
        tiles.template load<1>(by.out + TILE, by.out_row * 4);
        if (TWO) tiles.template load<2>(second, by.out_row * 4);
        if (TWO) tiles.template load<3>(second + TILE, by.out_row * 4);
    }
    const std::uint8_t* panel = by.panel + by.from / BLOCK * step;
    for (std::int64_t k = by.from; k < by.to; k += BLOCK, panel += step) {
        tiles.template load<6>(panel, weights_row);
        tiles.template load<7>(panel + 64, weights_row);
        if (FIRST)
            for (int i = 0; i < step; i += 64) __builtin_prefetch(panel + i + AHEAD, 0, 2);
        tiles.template load<4>(by.a + k, by.columns * 2);
        tiles.template add_bfloats<0, 4, 6>();
        tiles.template add_bfloats<1, 4, 7>();
        if (!TWO) continue;
        tiles.template load<5>(by.a + TILE * by.columns + k, by.columns * 2);
        tiles.template add_bfloats<2, 5, 6>();
        tiles.template add_bfloats<3, 5, 7>();
    }
    tiles.template store<0>(by.out, by.out_row * 4);
    tiles.template store<1>(by.out + TILE, by.out_row * 4);
    if (TWO) tiles.template store<2>(second, by.out_row * 4);
    if (TWO) tiles.template store<3>(second + TILE, by.out_row * 4);
}

void bfloat_products(const Matrix& m, const Activations& by, std::int64_t tokens, std::int64_t from, std::int64_t to,
                     float* out, std::int64_t out_row) {
    const auto* a = static_cast<const std::uint16_t*>(by.values);
    const auto panel = [&](AMX_TILES& tiles, std::int64_t p, std::int64_t t0, std::int64_t t1, std::int64_t count,
                           bool fetch) {
        const auto later = count > TILE ? bfloat_tile<true, false> : bfloat_tile<false, false>;
        const auto first = !fetch ? later : count > TILE ? bfloat_tile<true, true> : bfloat_tile<false, true>;
        const std::int64_t rows = m.rows_of(p), some = rows == PANEL && t1 - t0 > count ? SOME_COLUMNS : m.columns;
        for (std::int64_t k = 0; k < m.columns; k += some)
            for (std::int64_t t = t0; t < t1; t += count) {
                float whole[2 * TILE][PANEL];  // in place of a panel of which some rows are not there
                float* const place = out + t * out_row + p * PANEL;
                BfloatTile tile = {m.data + p * m.panel_bytes(), a + t * m.columns, m.columns, k, k + some, place, out_row};
                if (tile.to > m.columns) tile.to = m.columns;
                if (rows < PANEL) tile.out = whole[0], tile.out_row = PANEL;
                (t == t0 ? first : later)(tiles, tile);
                for (std::int64_t i = 0; i < count && rows < PANEL; ++i)
                    std::memcpy(place + i * out_row, whole[i], static_cast<std::size_t>(rows) * sizeof(float));
            }
    };
    by_tiles(tokens, m.columns * 2, 2 * TILE, BLOCK * 2, from, to, panel);
}

// Some blocks of a panel: their bytes, scales and zeros, and the sums of products with a tile of tokens.
struct Blocks {
    alignas(64) std::int32_t sums[SOME_BLOCKS][2][TILE][TILE];
    alignas(64) std::uint8_t unpacked[SOME_BLOCKS][BLOCK * PANEL];
    const std::uint8_t* bytes[SOME_BLOCKS];
    const std::uint8_t* zeros[SOME_BLOCKS];
    Values scale[SOME_BLOCKS][PARTS], least[SOME_BLOCKS][PARTS];
};

template <Number K, Zero Z>
INLINE void take_blocks(const Matrix& m, const std::uint8_t* panel, std::int64_t first, int count, bool fetch,
                        Blocks* blocks) {
    constexpr std::int64_t step = BLOCK * PANEL * (K == INT8 ? 2 : 1) / 2;
    const std::int64_t together = m.group / BLOCK;
    for (int i = 0; i < count; ++i) {
        const std::uint8_t* group = panel + (first + i) / together * m.group_bytes();
        const std::uint8_t* data = group + m.scale_bytes() + (first + i) % together * step;
        for (int h = 0; h < PARTS; ++h) load_halves(group + h * LANES * 2, &blocks->scale[i][h]);
        for (int h = 0; h < PARTS && Z == LEASTS; ++h) load_halves(group + 64 + h * LANES * 2, &blocks->least[i][h]);
        blocks->zeros[i] = group + 64;
        blocks->bytes[i] = K == INT8 ? data : blocks->unpacked[i];
        if (fetch)
            for (int at = 0; at < step + 128; at += 64) __builtin_prefetch(data + at + AHEAD, 0, 2);
        if (K == INT8) continue;
        for (int at = 0; at < step; at += 64) {  // a row of words: low halves are four columns, high ones the next
            Weights low, high;
            load_nibbles(data + at, &low, &high);
            std::uint8_t* to = blocks->unpacked[i] + at / 128 * 256 + at % 128;
            std::memcpy(to, &low, sizeof low);
            std::memcpy(to + 128, &high, sizeof high);
        }
    }
}

// total[t][part] += what the blocks' sums are worth, by the very operations of integer_rows.
template <Number K, Zero Z>
INLINE void add_sums(const Blocks& blocks, int count, const float* scales, const std::int32_t* starts, std::int64_t t,
                     Values* total) {
    for (int i = 0; i < count; ++i, starts += SUMS) {
        float together, less;
        std::memcpy(&together, starts + 2, sizeof together);
        std::memcpy(&less, starts + 3, sizeof less);
#pragma GCC unroll 2
        for (int h = 0; h < PARTS; ++h) {
            Sums sum;
            Values product;
            if (Z == BYTES)
                start(blocks.zeros[i] + h * LANES, 0, (WHOLE - starts[1]) / 8, &sum);
            else
                start(Z == LEASTS ? &WHOLE : K == INT4 ? starts + 1 : starts, &sum);
            sum.lanes = _mm512_add_epi32(sum.lanes, _mm512_load_si512(blocks.sums[i][h][t]));
            times(sum, scales[i], less, &product);
            total[h] += product * blocks.scale[i][h];
            if (Z == LEASTS) total[h] += blocks.least[i][h] * together;
        }
    }
}

// out [from … to, rows] of a panel, of up to SOME_TOKENS in tiles of `count`.
template <Number K, Zero Z>
void integer_panel(AMX_TILES& tiles, const Matrix& m, const std::uint8_t* panel, const Activations& by, std::int64_t from,
                   std::int64_t to, std::int64_t count, bool fetch, float* out, std::int64_t out_row, std::int64_t rows) {
    const std::int64_t all = m.columns / BLOCK;
    const auto* bytes = static_cast<const std::int8_t*>(by.values);
    Values total[SOME_TOKENS][PARTS];
    Blocks blocks;
    for (std::int64_t t = from; t < to; ++t)
        for (int h = 0; h < PARTS; ++h) total[t - from][h] = Values{};
    for (std::int64_t first = 0; first < all; first += SOME_BLOCKS) {
        const int some = static_cast<int>(all - first < SOME_BLOCKS ? all - first : SOME_BLOCKS);
        take_blocks<K, Z>(m, panel, first, some, fetch, &blocks);
        for (std::int64_t part = from; part < to; part += count) {
            for (int i = 0; i < some; ++i) {
                tiles.template zero<0>();
                tiles.template zero<1>();
                tiles.template load<4>(bytes + part * m.columns + (first + i) * BLOCK, m.columns);
                tiles.template load<6>(blocks.bytes[i], PANEL * 4);
                tiles.template load<7>(blocks.bytes[i] + 64, PANEL * 4);
                tiles.template add_bytes<0, 4, 6>();
                tiles.template add_bytes<1, 4, 7>();
                tiles.template store<0>(blocks.sums[i][0], 64);
                tiles.template store<1>(blocks.sums[i][1], 64);
            }
            for (std::int64_t t = 0; t < count; ++t) {
                const std::int64_t at = (part + t) * all + first;
                add_sums<K, Z>(blocks, some, by.scales + at, by.sums + SUMS * at, t, total[part + t - from]);
            }
        }
    }
    for (std::int64_t t = from; t < to; ++t)
        std::memcpy(out + t * out_row, total[t - from], static_cast<std::size_t>(rows) * sizeof(float));
}

template <Number K, Zero Z>
void integer_products(const Matrix& m, const Activations& by, std::int64_t tokens, std::int64_t from, std::int64_t to,
                      float* out, std::int64_t out_row) {
    constexpr std::int64_t besides = sizeof(float) + SUMS * sizeof(std::int32_t);  // a block's scale and sums
    const auto panel = [&](AMX_TILES& tiles, std::int64_t p, std::int64_t t0, std::int64_t t1, std::int64_t count,
                           bool fetch) {
        for (std::int64_t t = t0; t < t1; t += SOME_TOKENS)
            integer_panel<K, Z>(tiles, m, m.data + p * m.panel_bytes(), by, t, t1 - t < SOME_TOKENS ? t1 : t + SOME_TOKENS,
                                count, fetch && t == t0, out + p * PANEL, out_row, m.rows_of(p));
    };
    by_tiles(tokens, m.columns / BLOCK * (BLOCK + besides), TILE, BLOCK, from, to, panel);
}

void multiply_tiled(const Matrix& m, const Activations& by, std::int64_t tokens, std::int64_t from, std::int64_t to,
                    float* out, std::int64_t out_row) {
    using Multiply = decltype(&multiply);
    static constexpr Multiply integers[][3] = {
        {integer_products<INT8, MIDDLE>, integer_products<INT8, BYTES>},
        {integer_products<INT4, MIDDLE>, integer_products<INT4, BYTES>, integer_products<INT4, LEASTS>},
    };
    const bool bytes = m.kind >= INT8 && tokens >= LEAST_TILED;
    const Multiply chosen = m.kind == BFLOAT16 ? bfloat_products : bytes ? integers[m.kind - INT8][m.zero] : multiply;
    chosen(m, by, tokens, from, to, out, out_row);
}
