// Products of packed matrices with rows of activations, a panel of 32 rows and a few tokens at a time.

constexpr float LEAST = 1e-30f;  // as camelid/kernels/packed.py says

// rint(x * 127 / max |x|) of each of `count` values, a multiple of 16, and their sum; returns what one is worth.
INLINE float as_bytes(const float* from, std::int64_t count, std::int8_t* to, std::int32_t* sum) {
    Values top = {}, poison = {};
    for (std::int64_t i = 0; i < count; i += 16) {
        Values x;
        Lanes<16>::load(from + i, &x);
        const Values size = x < 0.0f ? -x : x;
        top = size > top ? size : top;
        poison += x * 0.0f;  // nothing, but for what is no number or infinite: the comparison would miss it
    }
    float most = greatest(top);
    most = most < LEAST ? 0.0f : most;
    most += sum_of(poison);
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    Lanes<16>::Whole sums = {};
    for (std::int64_t i = 0; i < count; i += 16) {
        Values x;
        Lanes<16>::load(from + i, &x);
        const Values scaled = x * inverse + WHOLE_FLOAT;  // rounds to a whole number
        Lanes<16>::Whole whole;
        std::memcpy(&whole, &scaled, sizeof whole);
        whole -= WHOLE;
        sums += whole;
        store_bytes(whole, to + i);
    }
    *sum = sum_of(sums);
    return most / 127.0f;
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
        for (std::int64_t i = 0; i < columns; i += 16) {
            Values x;
            Lanes<16>::load(row + i, &x);
            Lanes<16>::store(&x, out + i);
        }
        return;
    }
    std::int8_t* out = static_cast<std::int8_t*>(to.values) + at * columns;
    const std::int64_t blocks = columns / BLOCK;
    for (std::int64_t b = 0; b < blocks; ++b) {
        std::int32_t sum;
        to.scales[at * blocks + b] = as_bytes(row + b * BLOCK, BLOCK, out + b * BLOCK, &sum);
        to.sums[(at * blocks + b) * 2] = WHOLE - 128 * sum;
        to.sums[(at * blocks + b) * 2 + 1] = WHOLE - 8 * sum;
    }
}

// One block of activations: of the first token, with how far the next one's lie behind.
struct Block {
    const std::int8_t* bytes;
    const float* scales;
    const std::int32_t* starts;
    std::int64_t row, blocks;
};

// sum[t] += a block of a panel times T tokens' blocks. `scales` and `zeros` are the weights'.
template <Number K, bool ZEROS, int T>
INLINE void integer_block(const std::uint8_t* scales, const std::uint8_t* zeros, const std::uint8_t* data, const Block by,
                          Values (*sum)[2]) {
    Sums sums[T][2];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        const std::int32_t* from = by.starts + 2 * t * by.blocks;
        for (int h = 0; h < 2; ++h)
            if (ZEROS)
                start(zeros + 16 * h, (WHOLE - from[1]) / 8, &sums[t][h]);
            else
                start(K == INT4 ? from + 1 : from, &sums[t][h]);
    }
    constexpr int together = K == INT4 ? 2 : 1;  // fours of columns that share a register of weights
#pragma GCC unroll 8
    for (int k = 0; k < BLOCK / 4; k += together) {
        Weights w[2][2];
        for (int h = 0; h < 2; ++h) {
            const std::uint8_t* at = data + (k / together * 2 + h) * 64;
            K == INT4 ? load_nibbles(at, &w[0][h], &w[1][h]) : load(at, &w[0][h]);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
            for (int i = 0; i < together; ++i) {
                Four four;
                load(by.bytes + t * by.row + (k + i) * 4, &four);
                add(w[i][0], four, &sums[t][0]);
                add(w[i][1], four, &sums[t][1]);
            }
    }
    Values scale[2], product;
    for (int h = 0; h < 2; ++h) load_halves(scales + 32 * h, &scale[h]);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
        for (int h = 0; h < 2; ++h) {
            as_floats(sums[t][h], &product);
            sum[t][h] += product * (scale[h] * by.scales[t * by.blocks]);
        }
}

// sum += the products of two neighbours: of each lane's word, and of `two`.
INLINE void add_products(const Lanes<16>::Bits& words, std::uint32_t two, Values* sum) {
#ifdef HAS_BF16
    *sum = reinterpret_cast<Values>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(*sum), reinterpret_cast<__m512bh>(words),
                         reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(two)))));
#else
    const Lanes<16>::Bits even = words << 16, odd = words & 0xFFFF0000u;
    Values first, second;
    std::memcpy(&first, &even, 64);
    std::memcpy(&second, &odd, 64);
    *sum += first * widened(static_cast<Half>(two));
    *sum += second * widened(static_cast<Half>(two >> 16));
#endif
}

template <int T>
INLINE void bfloat_block(const Matrix& m, const std::uint8_t* data, std::int64_t b, const Activations& by,
                         std::int64_t token, Values (*sum)[2]) {
    const std::uint16_t* a = static_cast<const std::uint16_t*>(by.values) + token * m.columns + b * BLOCK;
    for (int k = 0; k < BLOCK; k += 2)
        for (int h = 0; h < 2; ++h) {
            Lanes<16>::Bits pairs;
            std::memcpy(&pairs, data + k * PANEL * 2 + 64 * h, 64);
            for (int t = 0; t < T; ++t) {
                std::uint32_t two;
                std::memcpy(&two, a + t * m.columns + k, 4);
                add_products(pairs, two, &sum[t][h]);
            }
        }
}

template <int T>
INLINE void float_block(const Matrix& m, const std::uint8_t* data, std::int64_t b, const Activations& by,
                        std::int64_t token, Values (*sum)[2]) {
    const float* a = static_cast<const float*>(by.values) + token * m.columns + b * BLOCK;
    for (int k = 0; k < BLOCK; ++k)
        for (int h = 0; h < 2; ++h) {
            Values w;
            if (m.kind == FLOAT16)
                load_halves(data + (k * PANEL + 16 * h) * 2, &w);
            else
                std::memcpy(&w, data + k * PANEL * 4 + 64 * h, 64);
            for (int t = 0; t < T; ++t) sum[t][h] += w * a[t * m.columns + k];
        }
}

constexpr std::int64_t AHEAD = 8192;  // bytes that are fetched before their turn: a page's end stops the CPU's own fetching

template <Number K, bool ZEROS, int T>
void tile(const Matrix& m, const std::uint8_t* panel, const Activations& by, std::int64_t token, float* out,
          std::int64_t out_row, std::int64_t rows) {
    Matrix known = m;
    known.kind = K;
    const std::uint8_t* data = panel + m.scale_bytes();
    const std::int64_t step = (m.panel_bytes() - m.scale_bytes()) / (m.columns / BLOCK);
    Values sum[T][2] = {};
    if constexpr (K >= INT8) {
        const std::uint8_t *scales = panel, *zeros = panel + m.columns / m.group * PANEL * 2;
        const std::int64_t together = m.group / BLOCK, blocks = m.columns / BLOCK;
        Block block = {static_cast<const std::int8_t*>(by.values) + token * m.columns, by.scales + token * blocks,
                       by.sums + 2 * token * blocks, m.columns, blocks};
        for (std::int64_t b = 0; b < blocks; scales += PANEL * 2, zeros += PANEL)
            for (const std::int64_t end = b + together; b < end; ++b, data += step) {
                if (token == 0)  // later tokens find it near
                    for (std::int64_t i = 0; i < step; i += 64) __builtin_prefetch(data + AHEAD + i);
                integer_block<K, ZEROS, T>(scales, zeros, data, block, sum);
                block.bytes += BLOCK;
                block.scales += 1;
                block.starts += 2;
            }
    } else {
        for (std::int64_t b = 0; b < m.columns / BLOCK; ++b, data += step)
            K == BFLOAT16 ? bfloat_block<T>(known, data, b, by, token, sum) : float_block<T>(known, data, b, by, token, sum);
    }
    for (int t = 0; t < T; ++t)
        std::memcpy(out + (token + t) * out_row, &sum[t], static_cast<std::size_t>(rows) * sizeof(float));
}

template <Number K, bool ZEROS>
void multiply_kind(const Matrix& m, const Activations& by, std::int64_t tokens, std::int64_t from, std::int64_t to,
                   float* out, std::int64_t out_row) {
    using Tile = void (*)(const Matrix&, const std::uint8_t*, const Activations&, std::int64_t, float*, std::int64_t,
                          std::int64_t);
    constexpr int most = K >= INT8 ? 6 : 8;  // what the registers hold
    static constexpr Tile tiles[] = {tile<K, ZEROS, 1>, tile<K, ZEROS, 2>, tile<K, ZEROS, 3>, tile<K, ZEROS, 4>,
                                         tile<K, ZEROS, 5>, tile<K, ZEROS, 6>, tile<K, ZEROS, 7>, tile<K, ZEROS, 8>};
    for (std::int64_t p = from; p < to; ++p) {
        const std::int64_t rows = m.rows - p * PANEL < PANEL ? m.rows - p * PANEL : PANEL;
        for (std::int64_t token = 0; token < tokens; token += most) {
            const std::int64_t some = tokens - token < most ? tokens - token : most;
            tiles[some - 1](m, m.data + p * m.panel_bytes(), by, token, out + p * PANEL, out_row, rows);
        }
    }
}

void multiply(const Matrix& m, const Activations& by, std::int64_t tokens, std::int64_t from, std::int64_t to, float* out,
              std::int64_t out_row) {
    using Multiply = decltype(&multiply_kind<FLOAT32, false>);
    static constexpr Multiply kinds[][2] = {
        {multiply_kind<FLOAT32, false>, nullptr},
        {multiply_kind<FLOAT16, false>, nullptr},
        {multiply_kind<BFLOAT16, false>, nullptr},
        {multiply_kind<INT8, false>, multiply_kind<INT8, true>},
        {multiply_kind<INT4, false>, multiply_kind<INT4, true>},
    };
    kinds[m.kind][m.zeros ? 1 : 0](m, by, tokens, from, to, out, out_row);
}
