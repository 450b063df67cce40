// Products of packed matrices with rows of activations, a panel of 32 rows and a few tokens at a time.

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
        Values x[2], top = {};
        for (int h = 0; h < 2; ++h) {
            Lanes<16>::load(row + b * BLOCK + 16 * h, &x[h]);
            const Values size = x[h] < 0.0f ? -x[h] : x[h];
            top = size > top ? size : top;
        }
        const float most = greatest(top);
        const float inverse = most > 0 ? 127.0f / most : 0.0f;
        Lanes<16>::Whole sums = {};
        for (int h = 0; h < 2; ++h) {
            const Values scaled = x[h] * inverse + WHOLE_FLOAT;  // rounds to a whole number
            Lanes<16>::Whole whole;
            std::memcpy(&whole, &scaled, sizeof whole);
            whole -= WHOLE;
            sums += whole;
            store_bytes(whole, out + b * BLOCK + 16 * h);
        }
        const std::int32_t sum = sum_of(sums);
        to.scales[at * blocks + b] = most / 127.0f;
        to.sums[(at * blocks + b) * 2] = WHOLE - 128 * sum;
        to.sums[(at * blocks + b) * 2 + 1] = WHOLE - 8 * sum;
    }
}

// sum[t][h] += block b of a panel times block b of T tokens, for each kind of matrix. `scales` and `zeros` are the
// block's own.

template <int T>
INLINE void integer_block(const Matrix& m, const std::uint8_t* scales, const std::uint8_t* zeros,
                          const std::uint8_t* data, std::int64_t b, const Activations& by, std::int64_t token,
                          Values (*sum)[2]) {
    const std::int64_t blocks = m.columns / BLOCK;
    Sums sums[T][2];
    for (int t = 0; t < T; ++t) {
        const std::int32_t* from = by.sums + ((token + t) * blocks + b) * 2;
        for (int h = 0; h < 2; ++h)
            if (m.zeros)
                start(zeros + 16 * h, (WHOLE - from[1]) / 8, &sums[t][h]);
            else
                start(m.kind == INT4 ? from + 1 : from, &sums[t][h]);
    }
    const std::int8_t* a = static_cast<const std::int8_t*>(by.values) + token * m.columns + b * BLOCK;
    if (m.kind == INT8) {
#pragma GCC unroll 8
        for (int k = 0; k < BLOCK; k += 4)
            for (int h = 0; h < 2; ++h) {
                Weights w;
                load(data + k * PANEL + 64 * h, &w);
                for (int t = 0; t < T; ++t) add(w, a + t * m.columns + k, &sums[t][h]);
            }
    } else {
#pragma GCC unroll 8
        for (int k = 0; k < BLOCK; k += 8)
            for (int h = 0; h < 2; ++h) {
                Weights low, high;
                load_nibbles(data + k / 2 * PANEL + 64 * h, &low, &high);
                for (int t = 0; t < T; ++t) {
                    add(low, a + t * m.columns + k, &sums[t][h]);
                    add(high, a + t * m.columns + k + 4, &sums[t][h]);
                }
            }
    }
    for (int h = 0; h < 2; ++h) {
        Values scale, product;
        load_halves(scales + 32 * h, &scale);
        for (int t = 0; t < T; ++t) {
            as_floats(sums[t][h], &product);
            sum[t][h] += product * (scale * by.scales[(token + t) * blocks + b]);
        }
    }
}

template <int T>
INLINE void bfloat_block(const Matrix& m, const std::uint8_t* data, std::int64_t b, const Activations& by,
                         std::int64_t token, Values (*sum)[2]) {
    const std::uint16_t* a = static_cast<const std::uint16_t*>(by.values) + token * m.columns + b * BLOCK;
    for (int k = 0; k < BLOCK; k += 2)
        for (int h = 0; h < 2; ++h) {
            Lanes<16>::Bits pairs;
            std::memcpy(&pairs, data + k * PANEL * 2 + 64 * h, 64);
#ifdef HAS_BF16
            for (int t = 0; t < T; ++t) {
                std::uint32_t two;
                std::memcpy(&two, a + t * m.columns + k, 4);
                sum[t][h] = reinterpret_cast<Values>(
                    _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum[t][h]), reinterpret_cast<__m512bh>(pairs),
                                     reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(two)))));
            }
#else
            const Lanes<16>::Bits even = pairs << 16, odd = pairs & 0xFFFF0000u;
            Values first, second;
            std::memcpy(&first, &even, 64);
            std::memcpy(&second, &odd, 64);
            for (int t = 0; t < T; ++t) {
                sum[t][h] += first * widened(a[t * m.columns + k]);
                sum[t][h] += second * widened(a[t * m.columns + k + 1]);
            }
#endif
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

template <Number K, int T>
void tile(const Matrix& m, const std::uint8_t* panel, const Activations& by, std::int64_t token, float* out,
          std::int64_t out_row, std::int64_t rows) {
    Matrix known = m;
    known.kind = K;
    const std::uint8_t* data = panel + m.scale_bytes();
    const std::int64_t step = (m.panel_bytes() - m.scale_bytes()) / (m.columns / BLOCK);
    Values sum[T][2] = {};
    if (K < INT8) {
        for (std::int64_t b = 0; b < m.columns / BLOCK; ++b, data += step)
            K == BFLOAT16 ? bfloat_block<T>(known, data, b, by, token, sum) : float_block<T>(known, data, b, by, token, sum);
    } else {
        const std::uint8_t *scales = panel, *zeros = panel + m.columns / m.group * PANEL * 2;
        const std::int64_t together = m.group / BLOCK;
        for (std::int64_t b = 0; b < m.columns / BLOCK; scales += PANEL * 2, zeros += PANEL)
            for (const std::int64_t end = b + together; b < end; ++b, data += step) {
                for (std::int64_t i = 0; i < step; i += 64) __builtin_prefetch(data + AHEAD + i);
                integer_block<T>(known, scales, zeros, data, b, by, token, sum);
            }
    }
    for (int t = 0; t < T; ++t) {
        float* to = out + (token + t) * out_row;
        if (rows == PANEL) {
            Lanes<16>::store(&sum[t][0], to);
            Lanes<16>::store(&sum[t][1], to + 16);
        } else {
            for (std::int64_t i = 0; i < rows; ++i) to[i] = sum[t][i / 16][i % 16];
        }
    }
}



// As many tokens as registers: sums of bytes need two each.
template <Number K>
void multiply_kind(const Matrix& m, const Activations& by, std::int64_t tokens, std::int64_t from, std::int64_t to,
                   float* out, std::int64_t out_row) {
    using Tile = void (*)(const Matrix&, const std::uint8_t*, const Activations&, std::int64_t, float*, std::int64_t,
                          std::int64_t);
    constexpr bool integers = K >= INT8;
    constexpr int most = integers ? 4 : 8;
    static constexpr Tile tiles[] = {tile<K, 1>, tile<K, 2>, tile<K, 3>, tile<K, 4>, tile<K, integers ? 4 : 5>,
                                     tile<K, integers ? 4 : 6>, tile<K, integers ? 4 : 7>, tile<K, most>};
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
    switch (m.kind) {
        case FLOAT32: return multiply_kind<FLOAT32>(m, by, tokens, from, to, out, out_row);
        case FLOAT16: return multiply_kind<FLOAT16>(m, by, tokens, from, to, out, out_row);
        case BFLOAT16: return multiply_kind<BFLOAT16>(m, by, tokens, from, to, out, out_row);
        case INT8: return multiply_kind<INT8>(m, by, tokens, from, to, out, out_row);
        case INT4: return multiply_kind<INT4>(m, by, tokens, from, to, out, out_row);
    }
}
