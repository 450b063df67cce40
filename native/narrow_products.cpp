// Products with an adapter's two narrow matrices, of rank 16 at most, for CPUs that multiply bfloat16 in their vectors and
// have no AMX: down to its rank, up from it, and between the two sides, its gradients. Sums are float32; what is as long as
// the text is read once. As in products.cpp each number is made by one thread, what is summed over in order.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "buffer.hpp"
#include "share.hpp"
#include "strips.hpp"

#ifdef CAMELID_BF16

namespace {

// Rows of the text at a time: as many sums as hide how long one takes. Six where their lines are not copied: the lines of
// rows a power of two apart share eight places of the first cache.
constexpr std::int64_t DOWN = 12, UP = 6;
constexpr std::int64_t HELD = 256 << 10;  // bytes of the text's rows whose columns are gone through at once
constexpr std::int64_t LINE = 32, AHEAD = 256;  // values in a line of the cache; how many ahead of use they are fetched

// bfloat16 [tokens, ...], `row` values from one token to the next.
struct Text {
    Half* data;
    std::int64_t row;
    Half* at(std::int64_t r, std::int64_t column) const { return data + r * row + column; }
};

TARGET_BF16 INLINE __m512bh broadcast(const void* two) {
    std::int32_t bits;
    std::memcpy(&bits, two, sizeof bits);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
}

// `count` <= LINE values of each of R rows, side by side: rows that lie a power of two apart would put one another out of
// the first cache while their values are gone through.
template <int R>
TARGET_BF16 INLINE void copy_lines(const Text& x, std::int64_t row, std::int64_t column, std::int64_t count, Half* to) {
    const __mmask32 real = count >= LINE ? 0xFFFFFFFFu : (1u << count) - 1;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        const Half* const from = x.at(row + r, column);
        __builtin_prefetch(from + AHEAD, 0, 3);
        _mm512_store_si512(to + r * LINE, _mm512_maskz_loadu_epi16(real, from));
    }
}

// R rows of y, `rank` of 16 columns: scale times x's by the words.
template <int R>
TARGET_BF16 __attribute__((noinline)) void down_tile(const Text& x, std::int64_t k, const Word* words, float scale,
                                                     std::int64_t row, const Text& y, std::int64_t rank) {
    alignas(64) Half lines[R * LINE];
    __m512 sum[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = _mm512_setzero_ps();
    for (std::int64_t from = 0; from < k; from += LINE) {
        const std::int64_t count = std::min(LINE, k - from);
        copy_lines<R>(x, row, from, count, lines);
        for (std::int64_t i = 0; i < (count + 1) / 2; ++i, words += STEP) {
            const __m512bh line = reinterpret_cast<__m512bh>(_mm512_load_si512(words));
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) sum[r] = _mm512_dpbf16_ps(sum[r], line, broadcast(lines + r * LINE + 2 * i));
        }
    }
    const __m512 all = _mm512_set1_ps(scale);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        _mm256_mask_storeu_epi16(y.at(row + r, 0), first_of(rank, 0),
                                 reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(sum[r], all))));
}

// z's R rows of up to 32 columns, `width` where not WHOLE: y's by a panel's words, times scale, are added.
template <int R, bool WHOLE>
TARGET_BF16 __attribute__((noinline)) void up_tile(const Text& y, std::int64_t pairs, const Word* words, float scale,
                                                   std::int64_t row, const Text& z, std::int64_t column, std::int64_t width) {
    __m512 sum[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        __builtin_prefetch(z.at(row + r, column + AHEAD), 1, 3);
        for (int x = 0; x < 2; ++x) sum[r][x] = _mm512_setzero_ps();
    }
    for (std::int64_t i = 0; i < pairs; ++i, words += WIDE) {
        const __m512bh line[2] = {reinterpret_cast<__m512bh>(_mm512_load_si512(words)),
                                  reinterpret_cast<__m512bh>(_mm512_load_si512(words + STEP))};
        for (int r = 0; r < R; ++r) {
            const __m512bh two = broadcast(y.at(row + r, 2 * i));
            for (int x = 0; x < 2; ++x) sum[r][x] = _mm512_dpbf16_ps(sum[r][x], line[x], two);
        }
    }
    const __m512 all = _mm512_set1_ps(scale);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int x = 0; x < 2; ++x) {
            Half* const to = z.at(row + r, column + STEP * x);
            const __mmask16 real = WHOLE ? 0xFFFF : first_of(width, STEP * x);
            const __m256i halves = WHOLE ? sixteen(to) : _mm256_maskz_loadu_epi16(real, to);
            const __m512 before = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
            const __m256i after = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_fmadd_ps(sum[r][x], all, before)));
            if (WHOLE)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), after);
            else
                _mm256_mask_storeu_epi16(to, real, after);
        }
}

// Rows of x two at a time, 16 columns of them, times y's words of the same rows: what they add to the sums of R columns of
// the narrow side.
template <int R>
TARGET_BF16 __attribute__((noinline)) void between_tile(const Text& x, std::int64_t row, std::int64_t end, std::int64_t column,
                                                        std::int64_t width, const Word* words, float* sums) {
    __m512 sum[R];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sum[i] = _mm512_load_ps(sums + i * STEP);
    const __mmask16 real = first_of(width, 0);
    for (; row < end; row += 2, words += STEP) {
        const __m256i even = _mm256_maskz_loadu_epi16(real, x.at(row, column));
        const __m256i odd = _mm256_maskz_loadu_epi16(row + 1 < end ? real : 0, x.at(row + (row + 1 < end), column));
        const __m512bh both = reinterpret_cast<__m512bh>(::words(even, odd));
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], both, broadcast(words + i));
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) _mm512_store_ps(sums + i * STEP, sum[i]);
}

// Where a gradient goes: [rank, wide], or `turned` [wide, rank].
struct Gradient {
    float* data;
    std::int64_t row, rank;
    float scale;
    bool turned;
};

// Sums of `width` of x's columns, from `column` on.
TARGET_BF16 void put(const float* sums, std::int64_t column, std::int64_t width, const Gradient& g) {
    __m512i r[STEP];
    const __m512 all = _mm512_set1_ps(g.scale);
    for (int i = 0; i < STEP; ++i) r[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(sums + i * STEP), all));
    if (g.turned) exchange(r);
    const std::int64_t lines = g.turned ? width : g.rank, across = g.turned ? g.rank : width;
    float* const to = g.data + column * (g.turned ? g.row : 1);
    for (std::int64_t i = 0; i < lines; ++i) _mm512_mask_storeu_epi32(to + i * g.row, first_of(across, 0), r[i]);
}

// Strips [begin, end) of 16 of x's k columns: blocks of rows that stay near, each gone through strip by strip while the next
// one is fetched.
void between(const Text& x, std::int64_t m, std::int64_t k, const Word* words, const Gradient& g, std::int64_t begin,
             std::int64_t end) {
    const std::int64_t strips = end - begin, bytes = strips * STEP * 2;
    const std::int64_t block = std::max<std::int64_t>(2, HELD / bytes / 2 * 2);
    const auto tile = g.rank <= 4 ? between_tile<4> : g.rank <= 8 ? between_tile<8> : between_tile<16>;
    Buffer<float> room;
    float* const sums = room.reserve(strips * STEP * STEP);
    std::fill_n(sums, strips * STEP * STEP, 0.0f);
    for (std::int64_t row = 0; row < m; row += block) {
        const std::int64_t last = std::min(m, row + block), more = std::min(m, last + block) - last;
        for (std::int64_t i = 0; i < strips; ++i) {
            for (std::int64_t r = last + more * i / strips; r < last + more * (i + 1) / strips; ++r)
                fetch(x.at(r, begin * STEP), bytes);
            const std::int64_t column = (begin + i) * STEP;
            tile(x, row, last, column, k - column, words + row / 2 * STEP, sums + i * STEP * STEP);
        }
    }
    for (std::int64_t i = 0; i < strips; ++i) {
        const std::int64_t column = (begin + i) * STEP;
        put(sums + i * STEP * STEP, column, std::min(STEP, k - column), g);
    }
}

}  // namespace
#endif

// y [m, r] = scale * x [m, k] by w, float or bfloat16 where `floats` is 0: [k, r], or [r, k] where not `across`. r is at most
// 16. shape: m, k, r, what lies between two rows of x, w and y.
extern "C" void camelid_narrow_down(const std::int64_t* shape, void* x, const void* w, void* y, float scale, int floats,
                                    int across, int threads) {
#ifdef CAMELID_BF16
    const std::int64_t m = shape[0], k = shape[1], r = shape[2], pairs = (k + 1) / 2;
    const Text text = {static_cast<Half*>(x), shape[3]}, out = {static_cast<Half*>(y), shape[5]};
    const Side side = {w, shape[4], floats != 0, across != 0};
    Buffer<Word> room;
    const Strips laid = {room.reserve(pairs * STEP), 0, r, 1, pairs, STEP};
    if (side.across)
        lay_across(side, r, 0, k, laid, 0, pairs);
    else
        lay_along(side, r, 0, k, laid, 0, 1);
    shared_out(m, DOWN, threads, [&](std::int64_t begin, std::int64_t end) {
        std::int64_t row = begin;
        for (; row + DOWN <= end; row += DOWN) down_tile<DOWN>(text, k, laid.words, scale, row, out, r);
        for (; row < end; ++row) down_tile<1>(text, k, laid.words, scale, row, out, r);
    });
#endif
}

// z [m, n] += scale * y [m, r] by w: [r, n], or [n, r] where not `across`. r is even, 16 at most. shape: m, n, r, what lies between two
// rows of y, w and z.
extern "C" void camelid_narrow_up(const std::int64_t* shape, void* y, const void* w, void* z, float scale, int floats,
                                  int across, int threads) {
#ifdef CAMELID_BF16
    const std::int64_t m = shape[0], n = shape[1], pairs = shape[2] / 2, strips = (n + WIDE - 1) / WIDE * 2;
    const Text text = {static_cast<Half*>(y), shape[3]}, out = {static_cast<Half*>(z), shape[5]};
    const Side side = {w, shape[4], floats != 0, across != 0};
    Buffer<Word> room;
    const Strips laid = {room.reserve(strips * pairs * STEP), 0, strips * STEP, strips, pairs, WIDE};
    if (side.across)
        lay_across(side, n, 0, shape[2], laid, 0, pairs);
    else
        lay_along(side, n, 0, shape[2], laid, 0, strips);
    shared_out(m, UP, threads, [&](std::int64_t begin, std::int64_t end) {
        const auto tiles = [&](auto whole, auto part, std::int64_t row) {
            for (std::int64_t column = 0; column < n; column += WIDE)
                (n - column < WIDE ? part : whole)(text, pairs, laid.words + column * pairs, scale, row, out, column,
                                                   n - column);
        };
        std::int64_t row = begin;
        for (; row + UP <= end; row += UP) tiles(up_tile<UP, true>, up_tile<UP, false>, row);
        for (; row < end; ++row) tiles(up_tile<1, true>, up_tile<1, false>, row);
    });
#endif
}

// g [r, k] = scale * y [m, r]^T x [m, k], or `turned` [k, r]. r is at most 16. shape: m, k, r, what lies between two rows of x, y and g.
extern "C" void camelid_narrow_between(const std::int64_t* shape, void* x, const void* y, float* g, float scale, int turned,
                                       int threads) {
#ifdef CAMELID_BF16
    const std::int64_t m = shape[0], k = shape[1], r = shape[2], pairs = (m + 1) / 2;
    const Text text = {static_cast<Half*>(x), shape[3]};
    const Gradient gradient = {g, shape[5], r, scale, turned != 0};
    Buffer<Word> room;
    const Strips laid = {room.reserve(pairs * STEP), 0, r, 1, pairs, STEP};
    lay_across({y, shape[4], false, true}, r, 0, m, laid, 0, pairs);
    shared_out((k + STEP - 1) / STEP, 2, threads, [&](std::int64_t begin, std::int64_t end) {
        between(text, m, k, laid.words, gradient, begin, end);
    });
#endif
}
