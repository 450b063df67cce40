// Products with a frozen matrix of bytes, as an adapter learns over one: states by weights, and slopes by weights. For CPUs
// whose vectors multiply bytes four at a time (VNNI) and which have no AMX.
//
// The other side is rounded to bytes, block by block of what is summed over. A block's sums are whole numbers, exact; each
// is then worth the block's step and is added to a float. Where what is summed over runs along a weight's row, the row's
// scale multiplies what comes out; where it runs across rows, it multiplies the slopes before they are rounded: both are
// products with one and the same matrix. As in products.cpp each number is made by one thread, blocks in order.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "buffer.hpp"
#include "share.hpp"
#include "strips.hpp"

#ifdef CAMELID_BF16

#define TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))

namespace {

using Ints = Lanes<16>::Whole;  // an array of them stays in registers: of __m512i GCC keeps one in memory
constexpr std::int64_t BLOCK = 128;          // values of a row that share a step
constexpr std::int64_t TALL = 14, FOUR = 4;  // rows of C that the registers hold; bytes in a word
constexpr std::int64_t PASSING = 4 << 20, STAYING = 256 << 10;  // bytes of B's panels and of a block of A's rows

// A's rows as bytes: row r's at bytes + r * row, zeros after its end. What one of a block's is worth, and -128 times their
// sum, at r * blocks: the weights are read as unsigned, 128 too much.
struct Rounded {
    std::int8_t* bytes;
    float* steps;
    std::int32_t* sums;
    std::int64_t row, blocks;
};

struct States {
    const void* data;
    std::int64_t row;
    bool halves;
};

TARGET_VNNI INLINE __m512 load(const States& from, std::int64_t at, __mmask16 real) {
    if (!from.halves) return _mm512_maskz_loadu_ps(real, static_cast<const float*>(from.data) + at);
    const __m256i halves = _mm256_maskz_loadu_epi16(real, static_cast<const Half*>(from.data) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Rows [begin, end) of k values, each times its column's scale where there are scales: rint(x * 127 / most) by blocks. A
// block that holds no number, or an infinite one, is worth no number.
TARGET_VNNI __attribute__((noinline)) void round_rows(const States& from, std::int64_t k, const float* scale,
                                                      const Rounded& to, std::int64_t begin, std::int64_t end) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    for (std::int64_t r = begin; r < end; ++r)
        for (std::int64_t b = 0; b < to.blocks; ++b) {
            __m512 x[BLOCK / 16];
            __m512i most = _mm512_setzero_si512();
#pragma GCC unroll 16
            for (int i = 0; i < BLOCK / 16; ++i) {
                const std::int64_t column = b * BLOCK + 16 * i;
                const __mmask16 real = first_of(k - column, 0);
                x[i] = real ? load(from, r * from.row + column, real) : _mm512_setzero_ps();
                if (scale && real) x[i] = _mm512_mul_ps(x[i], _mm512_maskz_loadu_ps(real, scale + column));
                most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(x[i]), magnitude));
            }
            const std::int32_t bits = _mm512_reduce_max_epi32(most);
            float top;
            std::memcpy(&top, &bits, sizeof top);
            const bool real = bits < 0x7F800000;
            const float times = real && top >= 1e-30f ? 127.0f / top : 0.0f;
            to.steps[r * to.blocks + b] = !real ? __builtin_nanf("") : times > 0 ? top / 127.0f : 0.0f;
            const __m512 all = _mm512_set1_ps(times);
            __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 16
            for (int i = 0; i < BLOCK / 16; ++i) {
                const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], all));
                sum = _mm512_add_epi32(sum, whole);
                if (b * BLOCK + 16 * i < to.row)
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.bytes + r * to.row + b * BLOCK + 16 * i),
                                     _mm512_cvtsepi32_epi8(whole));
            }
            const std::uint32_t all_of_them = static_cast<std::uint32_t>(_mm512_reduce_add_epi32(sum));
            to.sums[r * to.blocks + b] = static_cast<std::int32_t>(-128u * all_of_them);  // wraps where a block is no number
        }
}

// B's words, four bytes that are summed over in each: panels of WIDE columns. `across`: B is [k, n], else [n, k].
struct Panels {
    const std::uint8_t* data;
    std::int64_t row, n, k, first, fours;
    bool across;
    Word* words;
};

TARGET_VNNI __attribute__((noinline)) void lay_rows(const Panels& p, std::int64_t begin, std::int64_t end) {
    for (std::int64_t s = begin; s < end; ++s)
        for (std::int64_t i = 0; i < p.fours; i += 16) {
            __m512i r[16];
            for (int j = 0; j < 16; ++j) {
                const std::int64_t row = p.first + s * STEP + j, left = p.k - FOUR * i;
                const __mmask64 real = row >= p.n ? 0 : left >= 64 ? ~0ull : (1ull << left) - 1;
                const std::uint8_t* at = p.data + (row < p.n ? row : 0) * p.row + FOUR * i;
                r[j] = _mm512_maskz_loadu_epi8(real, at);
                __builtin_prefetch(at + 128, 0, 3);
            }
            exchange(r);
            Word* const to = p.words + s / 2 * p.fours * WIDE + s % 2 * STEP;
            for (std::int64_t j = 0; j < std::min<std::int64_t>(16, p.fours - i); ++j)
                _mm512_storeu_si512(to + (i + j) * WIDE, r[j]);
        }
}

TARGET_VNNI __attribute__((noinline)) void lay_columns(const Panels& p, std::int64_t strips, std::int64_t begin,
                                                       std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
        for (std::int64_t s = 0; s < strips; ++s) {
            const std::int64_t column = p.first + s * STEP;
            const __mmask16 real = first_of(p.n - column, 0);
            __m512i words = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int j = 0; j < FOUR; ++j) {
                const std::int64_t row = FOUR * i + j;
                if (row >= p.k || !real) continue;
                const __m128i bytes = _mm_maskz_loadu_epi8(real, p.data + row * p.row + column);
                words = _mm512_or_si512(words, _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 8 * j));
            }
            _mm512_storeu_si512(p.words + s / 2 * p.fours * WIDE + i * WIDE + s % 2 * STEP, words);
        }
}

struct Out {
    void* data;
    std::int64_t row;
    bool halves;
    const float* scale;  // of each column
};

// R rows and WIDE columns of one block's sums, times the rows' steps, in `total` or added to it.
template <int R, bool FIRST>
TARGET_VNNI INLINE void byte_block(const std::int8_t* a, std::int64_t a_row, const Word* b, std::int64_t fours,
                                   const std::int32_t* sums, const float* steps, std::int64_t blocks, float* total) {
    Ints sum[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int x = 0; x < 2; ++x) sum[r][x] = Ints{} + sums[r * blocks];
    for (std::int64_t i = 0; i < fours; ++i, b += WIDE) {
        const __m512i line[2] = {_mm512_load_si512(b), _mm512_load_si512(b + 16)};
        for (int r = 0; r < R; ++r) {
            std::int32_t four;
            std::memcpy(&four, a + r * a_row + FOUR * i, sizeof four);
            const __m512i all = _mm512_set1_epi32(four);
            for (int x = 0; x < 2; ++x)
                sum[r][x] = reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum[r][x]), line[x], all));
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int x = 0; x < 2; ++x) {
            float* const to = total + r * WIDE + 16 * x;
            const __m512 number = _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sum[r][x]));
            const __m512 step = _mm512_set1_ps(steps[r * blocks]);
            _mm512_store_ps(to, FIRST ? _mm512_mul_ps(number, step) : _mm512_fmadd_ps(number, step, _mm512_load_ps(to)));
        }
}

// R rows and up to 32 columns of C, `width` where not WHOLE.
template <int R, bool WHOLE>
TARGET_VNNI __attribute__((noinline)) void byte_tile(const Rounded& a, std::int64_t row, const Word* b, std::int64_t fours,
                                                     const Out& out, std::int64_t column, std::int64_t width) {
    alignas(64) float total[R * WIDE];
    const std::int8_t* from = a.bytes + row * a.row;
    const std::int32_t* sums = a.sums + row * a.blocks;
    const float* steps = a.steps + row * a.blocks;
    constexpr std::int64_t each = BLOCK / FOUR;
    byte_block<R, true>(from, a.row, b, std::min(fours, each), sums, steps, a.blocks, total);
    for (std::int64_t block = 1; block < a.blocks; ++block)
        byte_block<R, false>(from + block * BLOCK, a.row, b + block * each * WIDE, std::min(fours - block * each, each),
                             sums + block, steps + block, a.blocks, total);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int x = 0; x < 2; ++x) {
            const std::int64_t to = (row + r) * out.row + column + 16 * x;
            const __mmask16 real = WHOLE ? 0xFFFF : first_of(width, 16 * x);
            __m512 value = _mm512_load_ps(total + r * WIDE + 16 * x);
            if (out.scale) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(real, out.scale + column + 16 * x));
            if (!out.halves) {
                _mm512_mask_storeu_ps(static_cast<float*>(out.data) + to, real, value);
                continue;
            }
            std::uint16_t some[16];
            Lanes<16>::store(reinterpret_cast<const Lanes<16>::Values*>(&value), some);
            __m256i halves;
            std::memcpy(&halves, some, sizeof halves);
            _mm256_mask_storeu_epi16(static_cast<Half*>(out.data) + to, real, halves);
        }
}

using ByteTile = void (*)(const Rounded&, std::int64_t, const Word*, std::int64_t, const Out&, std::int64_t, std::int64_t);
template <bool WHOLE>
constexpr ByteTile BYTE_TILES[] = {
    byte_tile<1, WHOLE>,  byte_tile<2, WHOLE>,  byte_tile<3, WHOLE>,  byte_tile<4, WHOLE>,  byte_tile<5, WHOLE>,
    byte_tile<6, WHOLE>,  byte_tile<7, WHOLE>,  byte_tile<8, WHOLE>,  byte_tile<9, WHOLE>,  byte_tile<10, WHOLE>,
    byte_tile<11, WHOLE>, byte_tile<12, WHOLE>, byte_tile<13, WHOLE>, byte_tile<14, WHOLE>};

void byte_rows(const Rounded& a, const Panels& p, std::int64_t last, const Out& out, std::int64_t begin, std::int64_t end) {
    const std::int64_t tiles = (end - begin + TALL - 1) / TALL, words = p.fours * WIDE;
    for (std::int64_t column = p.first; column < last; column += WIDE) {
        const std::int64_t width = std::min(WIDE, last - column);
        const Word* panel = p.words + (column - p.first) * p.fours;
        for (std::int64_t t = 0; t < tiles; ++t) {
            const std::int64_t row = begin + (end - begin) * t / tiles, next = begin + (end - begin) * (t + 1) / tiles;
            if (column + WIDE < last) {
                const std::int64_t from = words * t / tiles, to = words * (t + 1) / tiles;
                fetch(panel + words + from, 4 * (to - from));
            }
            (width == WIDE ? BYTE_TILES<true> : BYTE_TILES<false>)[next - row - 1](a, row, panel, p.fours, out, column, width);
        }
    }
}

// `out.scale` is of B's rows: of what is summed over where B is `across`.
void multiply(const States& a, const Rounded& rounded, Panels panels, std::int64_t m, Out out, int threads) {
    const std::int64_t n = panels.n, k = panels.k;
    const float* const before = panels.across ? out.scale : nullptr;
    if (panels.across) out.scale = nullptr;
    shared_out(m, 1, threads, [&](std::int64_t begin, std::int64_t end) { round_rows(a, k, before, rounded, begin, end); });
    const std::int64_t columns = std::min((n + WIDE - 1) / WIDE * WIDE, std::max(WIDE, PASSING / k / WIDE * WIDE));
    const std::int64_t block = std::max(TALL, STAYING / k / TALL * TALL);
    const std::int64_t parts = ((m + block - 1) / block + threads - 1) / threads * threads;
    Buffer<Word> room;
    panels.words = room.reserve(columns * panels.fours);
    for (std::int64_t first = 0; first < n; first += columns) {
        panels.first = first;
        const std::int64_t last = std::min(n, first + columns), strips = (last - first + WIDE - 1) / WIDE * 2;
        shared_out(panels.across ? panels.fours : strips, 1, threads, [&](std::int64_t begin, std::int64_t end) {
            panels.across ? lay_columns(panels, strips, begin, end) : lay_rows(panels, begin, end);
        });
        each(parts, threads, [&](std::int64_t i) {
            const std::int64_t begin = m * i / parts, end = m * (i + 1) / parts;
            if (begin < end) byte_rows(rounded, panels, last, out, begin, end);
        });
    }
}

}  // namespace
#endif

// Whether camelid_byte_product is there and faster than a product of the widened weight.
extern "C" int camelid_multiplies_bytes() {
#ifdef CAMELID_BF16
    return has_avx512() && __builtin_cpu_supports("avx512vnni") && !has_amx();
#else
    return 0;
#endif
}

// shape: m, n, k, what lies between two rows of a, b and c in elements, and of `bytes`: a multiple of 64 that k fits. a [m,
// k] and c [m, n] are float, or bfloat16 where `halves`; b's bytes, less 128, times their row's scale are the weights, [n, k]
// or `across` [k, n]. Room for a's rounding: bytes [m, shape[6]], steps and sums [m, blocks of 128 in k].
extern "C" void camelid_byte_product(const std::int64_t* shape, const void* a, const std::uint8_t* b, const float* scale,
                                     void* c, std::int8_t* bytes, float* steps, std::int32_t* sums, int halves, int across,
                                     int threads) {
#ifdef CAMELID_BF16
    const std::int64_t m = shape[0], n = shape[1], k = shape[2];
    const Rounded rounded = {bytes, steps, sums, shape[6], (k + BLOCK - 1) / BLOCK};
    multiply({a, shape[3], halves != 0}, rounded, {b, shape[4], n, k, 0, (k + FOUR - 1) / FOUR, across != 0, nullptr}, m,
             {c, shape[5], halves != 0, scale}, threads);
#endif
}
