// Products of large bfloat16 matrices with float32 sums, as a training step multiplies: states by weights, slopes by
// weights, and slopes by states, a weight's gradient. For CPUs that multiply bfloat16 in their vectors, where oneDNN
// leaves a tenth of the peak; those with AMX are torch's.
//
// C [m, n] = or += A [m, k] B [k, n]. A stretch of B is laid out in panels of 32 columns, two of its rows in a word, by
// all threads; then each takes blocks of A's rows, which stay in its second cache while the panels pass (Goto and van de
// Geijn, Anatomy of high-performance matrix multiplication, 2008, with the two matrices' parts exchanged). Each number
// of C is made by one thread, columns in order, so that no bit of it depends on how many there are.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "buffer.hpp"
#include "share.hpp"
#include "strips.hpp"

#ifdef CAMELID_BF16

namespace {

constexpr std::int64_t TALL = 14;     // rows of C that the registers hold, WIDE columns of each
constexpr std::int64_t AT_ONCE = 16;  // pairs of a row, between which lines are fetched
constexpr std::int64_t DEEP = 2048, DEEP_ACROSS = 1024;  // of k at a time; less where A is laid out anew
constexpr std::int64_t PASSING = 4 << 20, STAYING = 352 << 10;  // bytes of B's panels and of a block of A's rows
constexpr std::int64_t FEW = 32;                                // tiles for a thread
constexpr std::int64_t MOST_ROWS = 2048;                        // of C at a time where its sums lie aside

struct Out {
    void* data;
    std::int64_t row;
    bool halves;
};

// C's rows in blocks of up to `most`, which threads take one after the other, larger ones first. A block is of whole tiles,
// which are the fastest, but where there are few of them threads share rows out more evenly.
struct Blocks {
    std::int64_t rows, count, whole;

    Blocks(std::int64_t rows, std::int64_t most, int threads)
        : rows(rows), count(((rows + most - 1) / most + threads - 1) / threads * threads),
          whole(threads == 1 || rows >= FEW * TALL * threads ? TALL : 1) {}

    std::int64_t start(std::int64_t block) const {
        const std::int64_t parts = (rows + whole - 1) / whole, i = std::min(block, count);
        return std::min(rows, (parts / count * i + std::min(i, parts % count)) * whole);
    }
};

// What comes into the second cache, a few lines at a time, while tiles are multiplied: `left` stretches of `bytes`, `row`
// bytes apart. Fetched at once they would keep the multiplying waiting.
struct Ahead {
    const char* at;
    std::int64_t bytes, row, left, at_once, done = 0;  // at_once: lines, for each AT_ONCE pairs

    INLINE void fetch() {
        for (std::int64_t i = 0; i < at_once && left > 0; ++i) {
            __builtin_prefetch(at + done, 0, 2);
            if ((done += 64) >= bytes) done = 0, at += row, --left;
        }
    }
};

// R rows and up to 32 columns of C, `width` where not WHOLE: what A times a panel of B adds to `sums`, or to nothing. A's
// words are row r's of pair i where they lie, or those of all rows side by side where they are LAID out. What of C follows,
// at `next`, is fetched before, what is `ahead` meanwhile.
template <int R, bool LAID, bool WHOLE>
TARGET_BF16 __attribute__((noinline)) void tile(std::int64_t pairs, const void* a, std::int64_t a_row, const Word* b,
                                                const float* sums, std::int64_t sums_row, const Out& out,
                                                Ahead (&ahead)[2], const char* next, std::int64_t width) {
    __m512 sum[R][2];
    for (int r = 0; r < R; ++r)
        for (int x = 0; x < (out.halves ? 1 : 2); ++x)
            __builtin_prefetch(next + r * out.row * (out.halves ? 2 : 4) + 64 * x, 1, 3);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int x = 0; x < 2; ++x)
            sum[r][x] = !sums   ? _mm512_setzero_ps()
                        : WHOLE ? _mm512_loadu_ps(sums + r * sums_row + 16 * x)
                                : _mm512_maskz_loadu_ps(first_of(width, 16 * x), sums + r * sums_row + 16 * x);
    for (std::int64_t from = 0; from < pairs; from += AT_ONCE) {
        ahead[0].fetch();
        ahead[1].fetch();
        const std::int64_t to = std::min(pairs, from + AT_ONCE);
        for (std::int64_t i = from; i < to; ++i, b += WIDE) {
            const __m512bh line[2] = {reinterpret_cast<__m512bh>(_mm512_load_si512(b)),
                                      reinterpret_cast<__m512bh>(_mm512_load_si512(b + 16))};
            for (int r = 0; r < R; ++r) {
                std::int32_t two;
                if (LAID)
                    std::memcpy(&two, static_cast<const Word*>(a) + i * STEP + r, sizeof two);
                else
                    std::memcpy(&two, static_cast<const Half*>(a) + r * a_row + 2 * i, sizeof two);
                const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
                for (int x = 0; x < 2; ++x) sum[r][x] = _mm512_dpbf16_ps(sum[r][x], both, line[x]);
            }
        }
    }
    if (out.halves) {
        Half* const to = static_cast<Half*>(out.data);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int x = 0; x < 2; ++x) {
                const __m256i halves = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum[r][x]));
                if (WHOLE)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r * out.row + 16 * x), halves);
                else
                    _mm256_mask_storeu_epi16(to + r * out.row + 16 * x, first_of(width, 16 * x), halves);
            }
        return;
    }
    float* const to = static_cast<float*>(out.data);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int x = 0; x < 2; ++x)
            if (WHOLE)
                _mm512_storeu_ps(to + r * out.row + 16 * x, sum[r][x]);
            else
                _mm512_mask_storeu_ps(to + r * out.row + 16 * x, first_of(width, 16 * x), sum[r][x]);
}

using Tile = void (*)(std::int64_t, const void*, std::int64_t, const Word*, const float*, std::int64_t, const Out&,
                      Ahead (&)[2], const char*, std::int64_t);
template <bool LAID, bool WHOLE>
constexpr Tile TILES[] = {tile<1, LAID, WHOLE>,  tile<2, LAID, WHOLE>,  tile<3, LAID, WHOLE>,  tile<4, LAID, WHOLE>,
                          tile<5, LAID, WHOLE>,  tile<6, LAID, WHOLE>,  tile<7, LAID, WHOLE>,  tile<8, LAID, WHOLE>,
                          tile<9, LAID, WHOLE>,  tile<10, LAID, WHOLE>, tile<11, LAID, WHOLE>, tile<12, LAID, WHOLE>,
                          tile<13, LAID, WHOLE>, tile<14, LAID, WHOLE>};

// What one pass over k from `from` to `to` adds to columns [first, last) of C.
struct Pass {
    Side a;
    bool laid;
    std::int64_t m, n, from, to, first, last;
    const Word* panels;
    const float* sums;
    std::int64_t sums_row;
    Out out;
    std::int64_t pairs() const { return (to - from + 1) / 2; }
};

// Rows [begin, end) of A, spread over so many tiles.
Ahead rows_ahead(const Pass& p, std::int64_t begin, std::int64_t end, std::int64_t tiles) {
    if (begin >= end) return {};
    const std::int64_t row = 2 * p.a.row, deep = p.to - p.from, high = end - begin;
    const char* at = static_cast<const char*>(p.a.data) + (p.a.across ? p.from * row + 2 * begin : begin * row + 2 * p.from);
    const std::int64_t bytes = 2 * (p.a.across ? high : deep), rows = p.a.across ? deep : high;
    const std::int64_t lines = (bytes + 63) / 64 * rows, times = tiles * ((p.pairs() + AT_ONCE - 1) / AT_ONCE);
    return {at, bytes, row, rows, (lines + times - 1) / times};
}

// Rows [begin, end) of C: all tiles of a panel, then the next panel, which is fetched meanwhile, as is A for rows [then,
// until), which are likely to be this thread's next.
void rows_of(const Pass& p, std::int64_t begin, std::int64_t end, std::int64_t then, std::int64_t until) {
    const std::int64_t pairs = p.pairs(), tiles = (end - begin + TALL - 1) / TALL, panel_words = pairs * WIDE;
    Buffer<Word> room;
    const Strips strips = {p.laid ? room.reserve(tiles * pairs * STEP) : nullptr, begin, end, tiles, pairs, STEP};
    if (p.a.across)
        lay_across(p.a, p.m, p.from, p.to, strips, 0, pairs);
    else if (p.laid)
        lay_along(p.a, p.m, p.from, p.to, strips, 0, tiles);
    const auto of_a = [&](std::int64_t row) { return static_cast<const Half*>(p.a.data) + row * p.a.row + p.from; };
    const auto of_c = [&](std::int64_t row, std::int64_t column) {
        return static_cast<char*>(p.out.data) + (row * p.out.row + column) * (p.out.halves ? 2 : 4);
    };
    Ahead ahead[2] = {rows_ahead(p, then, until, tiles * ((p.last - p.first + WIDE - 1) / WIDE)), {}};
    for (std::int64_t column = p.first; column < p.last; column += WIDE) {
        const std::int64_t width = std::min(WIDE, p.last - column);
        const Word* panel = p.panels + (column - p.first) * pairs;
        const Tile* const heights = p.laid ? (width == WIDE ? TILES<true, true> : TILES<true, false>)
                                           : (width == WIDE ? TILES<false, true> : TILES<false, false>);
        ahead[1] = {reinterpret_cast<const char*>(panel + panel_words), 4 * panel_words, 0, column + WIDE < p.last ? 1 : 0,
                    (4 * WIDE * AT_ONCE / 64 + tiles - 1) / tiles};
        std::int64_t row = begin;
        for (std::int64_t t = 0; t < tiles; ++t) {
            const std::int64_t next = strips.column(t + 1);
            const void* a = p.laid ? static_cast<const void*>(strips.at(t)) : of_a(row);
            const float* sums = p.sums ? p.sums + row * p.sums_row + column : nullptr;
            heights[next - row - 1](pairs, a, p.a.row, panel, sums, p.sums_row, {of_c(row, column), p.out.row, p.out.halves},
                                    ahead, next < end ? of_c(next, column) : of_c(begin, column + WIDE), width);
            row = next;
        }
    }
}

void multiply(const Side& a, const Side& b, std::int64_t m, std::int64_t n, std::int64_t k, const Out& c, bool add,
              int threads) {
    const std::int64_t most = a.across ? DEEP_ACROSS : DEEP, passes = std::max<std::int64_t>(1, (k + most - 1) / most);
    const std::int64_t deep = ((k + passes - 1) / passes + 1) / 2 * 2;
    const std::int64_t columns = std::min((n + WIDE - 1) / WIDE * WIDE, std::max(WIDE, PASSING / (2 * deep) / WIDE * WIDE));
    const Blocks blocks(m, std::max(TALL, STAYING / (2 * deep) / TALL * TALL), threads);
    const bool laid = a.across || a.row * 2 % 2048 == 0 || k % 2;  // rows that far apart would put one another out
    Buffer<Word> panel_room;
    Buffer<float> scratch;
    Word* const panels = panel_room.reserve(columns * deep / 2);
    const Out sums = c.halves && passes > 1 ? Out{scratch.reserve(m * n), n, false} : c;
    for (std::int64_t from = 0; from < k; from += deep)
        for (std::int64_t first = 0; first < n; first += columns) {
            Pass pass = {a, laid, m, n, from, std::min(k, from + deep), first, std::min(n, first + columns), panels,
                         nullptr, sums.row, from + deep < k ? sums : c};
            if (from > 0 || add) pass.sums = static_cast<const float*>(sums.data);
            const std::int64_t pairs = pass.pairs(), strips = (pass.last - first + WIDE - 1) / WIDE * 2;
            const Strips to = {panels, first, first + strips * STEP, strips, pairs, WIDE};
            shared_out(b.across ? pairs : strips, 1, threads, [&](std::int64_t begin, std::int64_t end) {
                (b.across ? lay_across : lay_along)(b, n, from, pass.to, to, begin, end);
            });
            each(blocks.count, threads, [&](std::int64_t i) {
                const std::int64_t begin = blocks.start(i), end = blocks.start(i + 1), then = i + threads;
                if (begin < end) rows_of(pass, begin, end, blocks.start(then), blocks.start(then + 1));
            });
        }
}

}  // namespace
#endif

// Whether camelid_product is there and faster than torch's.
extern "C" int camelid_multiplies_bfloat16() {
#ifdef CAMELID_BF16
    return has_bf16() && !has_amx();
#else
    return 0;
#endif
}

// shape: m, n, k, and what lies between two rows of a, b and c, in elements. a is bfloat16 [m, k], k even, or `across`
// [k, m]; b, bfloat16 or float, [n, k] or `across` [k, n]; c float or bfloat16 [m, n], added to where `add`, which takes
// floats. flags: 1 a is across, 2 b is across, 4 b is float, 8 c is bfloat16, 16 add.
extern "C" void camelid_product(const std::int64_t* shape, const void* a, const void* b, void* c, int flags, int threads) {
#ifdef CAMELID_BF16
    const std::int64_t m = shape[0], n = shape[1], k = shape[2];
    const bool across = flags & 1, halves = flags & 8;
    const std::int64_t rows = halves && k > DEEP ? MOST_ROWS : m;  // at a time, for what is summed lies aside
    for (std::int64_t at = 0; at < m; at += rows) {
        const Side left = {static_cast<const Half*>(a) + (across ? at : at * shape[3]), shape[3], false, across};
        const Side right = {b, shape[4], (flags & 4) != 0, (flags & 2) != 0};
        const Out out = {static_cast<char*>(c) + at * shape[5] * (halves ? 2 : 4), shape[5], halves};
        multiply(left, right, std::min(rows, m - at), n, k, out, (flags & 16) != 0, threads);
    }
#endif
}
