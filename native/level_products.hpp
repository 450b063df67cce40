// Products of packed matrices with rows of activations, a panel of 32 rows and a few tokens at a time.

constexpr float LEAST = 1e-30f;  // as camelid/kernels/packed.py says

// rint(x * 127 / max |x|) of each of `count` values, a multiple of LANES, and their sum; returns what one is worth.
INLINE float as_bytes(const float* from, std::int64_t count, std::int8_t* to, std::int32_t* sum) {
    Register::Whole top = {};  // of the bits of |x|: what is no number or infinite is above all others
    for (std::int64_t i = 0; i < count; i += LANES) {
        Register::Whole size;
        std::memcpy(&size, from + i, sizeof size);
        size &= 0x7FFFFFFF;
        top = size > top ? size : top;
    }
    const std::int32_t bits = greatest(top);
    float most;
    std::memcpy(&most, &bits, sizeof most);
    most = most < LEAST ? 0.0f : most - (bits < 0x7F800000 ? 0.0f : most);  // infinite less infinite: no number
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    Register::Whole sums = {};
    for (std::int64_t i = 0; i < count; i += LANES) {
        Values x;
        Register::load(from + i, &x);
        const Values scaled = x * inverse + WHOLE_FLOAT;  // rounds to a whole number
        Register::Whole whole;
        std::memcpy(&whole, &scaled, sizeof whole);
        whole -= WHOLE;
        sums += whole;
        store_bytes(whole, to + i);
    }
    *sum = sum_of(sums);
    return most / 127.0f;
}

// A number of 22 bits, so that 1.5 * 2^23 of it are exact.
INLINE float without_two_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits &= ~3u;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

// One row of floats in the form that `kind` is multiplied by, as row `at`. A block's bytes are rint(x * 127 / max |x|).
void prepare(Number kind, const float* row, const Activations& to, std::int64_t at) {
    const std::int64_t columns = to.columns;
    if (kind == FLOAT32 || kind == FLOAT16) {
        std::memcpy(static_cast<float*>(to.values) + at * columns, row, static_cast<std::size_t>(columns) * 4);
        return;
    }
    if (kind == BFLOAT16) {
        std::uint16_t* out = static_cast<std::uint16_t*>(to.values) + at * columns;
        for (std::int64_t i = 0; i < columns; i += LANES) {
            Values x;
            Register::load(row + i, &x);
            narrow_lanes(x, out + i);
        }
        return;
    }
    std::int8_t* out = static_cast<std::int8_t*>(to.values) + at * columns;
    const std::int64_t blocks = columns / BLOCK;
    for (std::int64_t b = 0; b < blocks; ++b) {
        std::int32_t sum;
        const float one = without_two_bits(as_bytes(row + b * BLOCK, BLOCK, out + b * BLOCK, &sum));
        to.scales[at * blocks + b] = one;
        const float together = one * static_cast<float>(sum), less = -WHOLE_FLOAT * one;
        std::int32_t* const sums = to.sums + (at * blocks + b) * SUMS;
        sums[0] = WHOLE - 128 * sum;
        sums[1] = WHOLE - 8 * sum;
        std::memcpy(sums + 2, &together, sizeof together);
        std::memcpy(sums + 3, &less, sizeof less);
    }
}

// One block of activations: of the first token, with how far the next one's lie behind.
struct Block {
    const std::int8_t* bytes;
    const float* scales;
    const std::int32_t* starts;
    std::int64_t row, blocks;
};

// sum[t][part …] += a block of ABREAST registers of a panel's rows times T tokens' blocks. `scale` and `zeros`, which are
// bytes or halves, are the weights'; whoever is FIRST fetches the data `ahead` bytes behind this block's meanwhile.
template <Number K, Zero Z, int T, bool FIRST>
INLINE void integer_rows(const Values* scale, const std::uint8_t* zeros, const std::uint8_t* data, std::int64_t ahead,
                         const Block& by, int part, Values (*sum)[PARTS]) {
    Sums sums[T][ABREAST];
    constexpr int less = K == INT8 ? LESS : 0;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        const std::int32_t* from = by.starts + SUMS * t * by.blocks;
        for (int h = 0; h < ABREAST; ++h)
            if (Z == BYTES)
                start(zeros + (part + h) * LANES, less, (WHOLE - from[1]) / 8, &sums[t][h]);
            else
                start(Z == LEASTS || less ? &WHOLE : K == INT4 ? from + 1 : from, &sums[t][h]);
    }
    constexpr int together = K == INT4 ? 2 : 1;  // fours of columns that share a register of weights
#pragma GCC unroll 8
    for (int k = 0; k < BLOCK / 4; k += together) {
        Weights w[2][ABREAST];
        for (int h = 0; h < ABREAST; ++h) {
            const std::uint8_t* at = data + (k / together * PARTS + part + h) * LANES * 4;
            if (FIRST && (part + h) * LANES * 4 % 64 == 0) __builtin_prefetch(at + ahead, 0, 2);
            K == INT4 ? load_nibbles(at, &w[0][h], &w[1][h]) : load(at, &w[0][h]);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
            for (int i = 0; i < together; ++i) {
                Four four;
                load(by.bytes + t * by.row + (k + i) * 4, &four);
                for (int h = 0; h < ABREAST; ++h) add(w[i][h], four, &sums[t][h]);
            }
    }
    Values product, least[ABREAST];
    if (Z == LEASTS)
        for (int h = 0; h < ABREAST; ++h) load_halves(zeros + (part + h) * LANES * 2, &least[h]);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
        for (int h = 0; h < ABREAST; ++h) {
            float together, less;
            std::memcpy(&together, by.starts + SUMS * t * by.blocks + 2, sizeof together);
            std::memcpy(&less, by.starts + SUMS * t * by.blocks + 3, sizeof less);
            times(sums[t][h], by.scales[t * by.blocks], less, &product);
            sum[t][part + h] += product * scale[part + h];
            if (Z == LEASTS) sum[t][part + h] += least[h] * together;
        }
}

// Words of two bfloat16 each, ready to be multiplied: the products of a word's two come one after the other.
struct Words {
#ifdef HAS_BF16
    __m512bh both;
#else
    Values even, odd;
#endif
};

INLINE void spread(const Register::Bits& words, Words* out) {
#ifdef HAS_BF16
    out->both = reinterpret_cast<__m512bh>(words);
#else
    const Register::Bits even = words << 16, odd = words & 0xFFFF0000u;
    std::memcpy(&out->even, &even, sizeof even);
    std::memcpy(&out->odd, &odd, sizeof odd);
#endif
}
INLINE void spread(std::uint32_t word, Words* out) { spread(Register::Bits{} + word, out); }

INLINE void add_products(const Words& a, const Words& b, Values* sum) {
#ifdef HAS_BF16
    *sum = reinterpret_cast<Values>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(*sum), a.both, b.both));
#else
    *sum += a.even * b.even;
    *sum += a.odd * b.odd;
#endif
}

template <int T>
INLINE void bfloat_block(const Matrix& m, const std::uint8_t* data, std::int64_t b, const Activations& by,
                         std::int64_t token, Values (*sum)[PARTS]) {
    const std::uint16_t* a = static_cast<const std::uint16_t*>(by.values) + token * m.columns + b * BLOCK;
    for (int part = 0; part < PARTS; part += 2)
        for (int k = 0; k < BLOCK; k += 2) {
            Words w[2], two;
            for (int h = 0; h < 2; ++h) {
                Register::Bits pairs;
                std::memcpy(&pairs, data + (k / 2 * PARTS + part + h) * LANES * 4, sizeof pairs);
                spread(pairs, &w[h]);
            }
            for (int t = 0; t < T; ++t) {
                std::uint32_t word;
                std::memcpy(&word, a + t * m.columns + k, 4);
                spread(word, &two);
                for (int h = 0; h < 2; ++h) add_products(w[h], two, &sum[t][part + h]);
            }
        }
}

template <int T>
INLINE void float_block(const Matrix& m, const std::uint8_t* data, std::int64_t b, const Activations& by,
                        std::int64_t token, Values (*sum)[PARTS]) {
    const float* a = static_cast<const float*>(by.values) + token * m.columns + b * BLOCK;
    for (int part = 0; part < PARTS; part += 2)
        for (int k = 0; k < BLOCK; ++k)
            for (int h = part; h < part + 2; ++h) {
                Values w;
                if (m.kind == FLOAT16)
                    load_halves(data + (k * PARTS + h) * LANES * 2, &w);
                else
                    std::memcpy(&w, data + (k * PARTS + h) * LANES * 4, sizeof w);
                for (int t = 0; t < T; ++t) sum[t][h] += w * a[t * m.columns + k];
            }
}

// So many bytes are fetched before their turn, into the second cache: the first has too few places for what is under way.
// Where memory is waited for, a long lead is in the way of what AMD's CPUs fetch by themselves; with more tokens they do
// not. Of half bytes that meet one token Intel's want a longer one (docs/decisions.md has the figures).
template <Number K, int T>
INLINE std::int64_t lead() {
    if (from_amd()) return T == 1 ? (K == INT8 ? 2048 : 1024) : T <= (K == INT8 ? 4 : 2) ? 1024 : 8192;
    return T > 1 ? 8192 : K == INT8 ? 2048 : 4096;
}

// From here on sums live in registers, where there are enough of them: whatever takes the address of all of them, a loop that is not unrolled or an array's
// `= {}`, has GCC keep them in memory, too, and fill that at each tile with an operation that waits for the last one's stores.
template <int T>
INLINE void begin_rows(Values (*sum)[PARTS], float* out, std::int64_t out_row) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t, out += out_row)
#pragma GCC unroll 8
        for (int h = 0; h < PARTS; ++h) {
            sum[t][h] = Values{};
            if (T > 1 && h * LANES % 16 == 0) __builtin_prefetch(out + LANES * h, 1, 3);  // to be there when it is written
        }
}

template <int T>
INLINE void keep_rows(const Values (*sum)[PARTS], float* out, std::int64_t out_row, std::int64_t rows) {
    float some[PANEL];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t, out += out_row) {
        float* to = rows == PANEL ? out : some;
#pragma GCC unroll 8
        for (int h = 0; h < PARTS; ++h) Register::store(&sum[t][h], to + LANES * h);
        if (to == some) std::memcpy(out, some, static_cast<std::size_t>(rows) * sizeof(float));
    }
}

// out [T, rows of a panel] = a panel times T rows of bytes. Whoever comes FIRST over a panel fetches what follows.
template <Number K, Zero Z, int T, bool FIRST>
void integer_tile(const Matrix& m, const std::uint8_t* panel, const Activations& by, std::int64_t token, float* out,
                  std::int64_t out_row, std::int64_t rows) {
    constexpr int before = Z == MIDDLE ? 64 : 128, step = BLOCK * PANEL * (K == INT8 ? 2 : 1) / 2;
    const std::int64_t ahead = FIRST ? lead<K, T>() : 0;
    const std::int64_t together = m.group / BLOCK, blocks = m.columns / BLOCK;
    Block block = {static_cast<const std::int8_t*>(by.values) + token * m.columns, by.scales + token * blocks,
                   by.sums + SUMS * token * blocks, m.columns, blocks};
    Values sum[T][PARTS], scale[PARTS];
    begin_rows<T>(sum, out + token * out_row, out_row);
    for (std::int64_t b = 0; b < blocks;) {
        for (int h = 0; h < PARTS; ++h) load_halves(panel + h * LANES * 2, &scale[h]);
        const std::uint8_t* zeros = panel + 64;
        if (FIRST)
            for (int i = 0; i < before; i += 64) __builtin_prefetch(panel + i + ahead, 0, 2);
        panel += before;
        for (const std::int64_t end = b + together; b < end; ++b, panel += step) {
            for (int part = 0; part < PARTS; part += ABREAST)
                integer_rows<K, Z, T, FIRST>(scale, zeros, panel, ahead, block, part, sum);
            block.bytes += BLOCK;
            block.scales += 1;
            block.starts += SUMS;
        }
    }
    keep_rows<T>(sum, out + token * out_row, out_row, rows);
}

template <Number K, int T>
void float_tile(const Matrix& m, const std::uint8_t* panel, const Activations& by, std::int64_t token, float* out,
                std::int64_t out_row, std::int64_t rows) {
    Matrix known = m;
    known.kind = K;
    const std::int64_t step = m.panel_bytes() / (m.columns / BLOCK);
    Values sum[T][PARTS];
    begin_rows<T>(sum, out + token * out_row, out_row);
    for (std::int64_t b = 0; b < m.columns / BLOCK; ++b, panel += step)
        K == BFLOAT16 ? bfloat_block<T>(known, panel, b, by, token, sum) : float_block<T>(known, panel, b, by, token, sum);
    keep_rows<T>(sum, out + token * out_row, out_row, rows);
}

using Tile = void (*)(const Matrix&, const std::uint8_t*, const Activations&, std::int64_t, float*, std::int64_t,
                      std::int64_t);

template <Number K>
constexpr int MOST = LANES == 16 ? (K >= INT8 ? 6 : 8) : (K >= INT8 && ABREAST == 1 ? 5 : 4);  // tokens that the registers hold

template <Number K, Zero Z, int T, bool FIRST>
constexpr Tile tile_of() {
    if constexpr (T > MOST<K>)
        return nullptr;
    else if constexpr (K >= INT8)
        return integer_tile<K, Z, T, FIRST>;
    else
        return float_tile<K, T>;
}

template <Number K, Zero Z, bool FIRST>
constexpr Tile TILES[] = {tile_of<K, Z, 1, FIRST>(), tile_of<K, Z, 2, FIRST>(), tile_of<K, Z, 3, FIRST>(),
                          tile_of<K, Z, 4, FIRST>(), tile_of<K, Z, 5, FIRST>(), tile_of<K, Z, 6, FIRST>(),
                          tile_of<K, Z, 7, FIRST>(), tile_of<K, Z, 8, FIRST>()};

template <Number K, Zero Z>
void multiply_kind(const Matrix& m, const Activations& by, std::int64_t tokens, std::int64_t from, std::int64_t to,
                   float* out, std::int64_t out_row) {
    const std::int64_t panel_bytes = m.panel_bytes();
    for (std::int64_t p = from; p < to; ++p) {
        const std::int64_t rows = m.rows_of(p);
        for (std::int64_t token = 0; token < tokens; token += MOST<K>) {
            const std::int64_t some = tokens - token < MOST<K> ? tokens - token : MOST<K>;
            const Tile tile = (token ? TILES<K, Z, false> : TILES<K, Z, true>)[some - 1];
            tile(m, m.data + p * panel_bytes, by, token, out + p * PANEL, out_row, rows);
        }
    }
}

void multiply(const Matrix& m, const Activations& by, std::int64_t tokens, std::int64_t from, std::int64_t to, float* out,
              std::int64_t out_row) {
    using Multiply = decltype(&multiply_kind<FLOAT32, MIDDLE>);
    static constexpr Multiply kinds[][3] = {
        {multiply_kind<FLOAT32, MIDDLE>},
        {multiply_kind<FLOAT16, MIDDLE>},
        {multiply_kind<BFLOAT16, MIDDLE>},
        {multiply_kind<INT8, MIDDLE>, multiply_kind<INT8, BYTES>},
        {multiply_kind<INT4, MIDDLE>, multiply_kind<INT4, BYTES>, multiply_kind<INT4, LEASTS>},
    };
    kinds[m.kind][m.zero](m, by, tokens, from, to, out, out_row);
}
