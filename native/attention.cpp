// Causal attention over packed documents, forward and backward, in blocks that fit the first caches. Products of float32
// are float32; of bfloat16 they are bfloat16 with float32 sums where the CPU has them, probabilities rounded too.
//
// Everything is a product C += A B of row-major blocks whose width is a multiple of 16: keys and queries are kept
// transposed where that is needed (FlashAttention, arXiv:2205.14135, algorithms 1 and 4, with the roles of rows and
// columns swapped in the backward pass). A query sees the keys from the first token of its own document up to itself;
// blocks outside of that are never touched, nor is what no row of a stripe sees of a block on the diagonal.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "share.hpp"
#include "sides.hpp"

namespace {

constexpr std::int64_t STRIPE = 32;  // rows of a block on the diagonal at a time
static_assert(BLOCK % STRIPE == 0 && STRIPE % 16 == 0);

// Of a row of a block, what may be seen: [from, to), and the whole registers [first, last) that hold it.
template <int N>
struct Seen {
    std::int64_t from, to, first, last;

    Seen(std::int64_t from, std::int64_t to)
        : from(from), to(to), first(from / N * N), last(std::min<std::int64_t>(BLOCK, (to + N - 1) / N * N)) {}

    INLINE void clear_rest(float* row) const {
        std::fill(row, row + from, 0.0f);
        std::fill(row + to, row + BLOCK, 0.0f);
    }
};

// Scales what is seen of a row of scores; returns the largest.
template <int N>
INLINE float scaled_top(float* row, const Seen<N>& seen, float scale) {
    std::fill(row + seen.first, row + seen.from, -INFINITY);  // e to that is nothing
    std::fill(row + seen.to, row + seen.last, -INFINITY);
    typename Lanes<N>::Values values, lanes = typename Lanes<N>::Values{} - 3.4e38f;
    for (std::int64_t at = seen.first; at < seen.last; at += N) {
        Lanes<N>::load(row + at, &values);
        values *= scale;
        Lanes<N>::store(&values, row + at);
        lanes = values > lanes ? values : lanes;
    }
    if constexpr (N == 16) return greatest(lanes);
    float top = -3.4e38f;
    for (int i = 0; i < N; ++i) top = lanes[i] > top ? lanes[i] : top;
    return top;
}

// Makes scores e^(score - top); returns their sum. In float32 one after the other, as a file of losses holds it to.
template <int N, typename T>
INLINE float exp_row(float* row, const Seen<N>& seen, float top) {
    typename Lanes<N>::Values values, lanes = {};
    for (std::int64_t at = seen.first; at < seen.last; at += N) {
        exp_below<N>(row + at, top, &values);
        Lanes<N>::store(&values, row + at);
        lanes += values;
    }
    seen.clear_rest(row);
    if constexpr (N == 16 && std::is_same_v<T, Half>) return sum_of(lanes);
    float total = 0;
    for (int i = 0; i < N; ++i) total += lanes[i];
    return total;
}

// Scores of one key become its weights, and the weights' slopes its scores' slopes, for all queries of a block.
template <int N>
INLINE void slope_row(float* row, float* slope, const Seen<N>& seen, float scale, const float* log_sums,
                      const float* delta) {
    using Values = typename Lanes<N>::Values;
    for (std::int64_t at = seen.first; at < seen.last; at += N) {
        Values p, d, sums, deltas;
        Lanes<N>::load(row + at, &p);
        Lanes<N>::load(slope + at, &d);
        Lanes<N>::load(log_sums + at, &sums);
        Lanes<N>::load(delta + at, &deltas);
        p = p * scale - sums;
        p = p > 0.0f ? Values{} : p;  // what is no number stays so
        exp_values<N>(&p);
        d = p * (d - deltas) * scale;
        Lanes<N>::store(&p, row + at);
        Lanes<N>::store(&d, slope + at);
    }
    seen.clear_rest(row);
    seen.clear_rest(slope);
}

template <typename K, typename T>
INLINE void forward_head(const Shape& s, const Head<T>& q, const Head<T>& k, const Head<T>& v, const std::int32_t* first,
                         std::int64_t padded, const Tensor& out, std::int64_t b, std::int64_t h, float* log_sums) {
    std::vector<float> scores(BLOCK * BLOCK), sums(static_cast<std::size_t>(BLOCK * s.size));
    Square<T> weights;
    float tops[BLOCK], totals[BLOCK];
    for (std::int64_t i0 = 0; i0 < s.length; i0 += BLOCK) {
        const std::int64_t queries = std::min<std::int64_t>(BLOCK, s.length - i0);
        std::fill(sums.begin(), sums.end(), 0.0f);
        std::fill(tops, tops + BLOCK, -1e30f);
        std::fill(totals, totals + BLOCK, 0.0f);
        for (std::int64_t j0 = first[i0] / BLOCK * BLOCK; j0 <= i0; j0 += BLOCK) {
            const std::int64_t step = j0 == i0 ? STRIPE : BLOCK;
            for (std::int64_t i = 0; i < queries; i += step)
                product<K>(std::min(step, queries - i), i + step, s.size, q.rows.data() + (i0 + i) * s.size, s.size,
                           k.over_size() + j0, padded, scores.data() + i * BLOCK, BLOCK, false);
            for (std::int64_t i = 0; i < queries; ++i) {
                float* row = scores.data() + i * BLOCK;
                const std::int64_t from = std::max<std::int64_t>(first[i0 + i] - j0, 0);
                const std::int64_t to = std::min<std::int64_t>(i0 + i + 1 - j0, BLOCK);
                if (from >= to) {
                    std::fill(row, row + BLOCK, 0.0f);
                    continue;
                }
                const Seen<K::lanes> seen(from, to);
                const float top = std::max(tops[i], scaled_top(row, seen, s.scale));
                const float fade = top == tops[i] ? 1.0f : exp_negative(tops[i] - top);
                totals[i] = totals[i] * fade + exp_row<K::lanes, T>(row, seen, top);
                tops[i] = top;
                if (fade != 1.0f)
                    for (std::int64_t c = 0; c < s.size; ++c) sums[static_cast<std::size_t>(i * s.size + c)] *= fade;
            }
            weights.take(scores.data(), queries);
            for (std::int64_t i = 0; i < queries; i += step)
                product<K>(std::min(step, queries - i), s.size, i + step, weights.rows() + i * BLOCK, BLOCK,
                           v.over_tokens(j0, s.size), s.size, sums.data() + i * s.size, s.size, true);
        }
        for (std::int64_t i = 0; i < queries; ++i) {
            float* row = sums.data() + i * s.size;
            const float each = 1.0f / totals[i];
            for (std::int64_t c = 0; c < s.size; ++c) row[c] *= each;
            write(out, b, h, i0 + i, s.size, row);
            log_sums[i0 + i] = tops[i] + std::log(totals[i]);
        }
    }
}

struct Slopes {  // of one key-value head [padded, size], and of a query head transposed [size, padded]
    std::vector<float> k, v, q_columns;
};

// `delta` is the sum of out * d_out of each query.
template <typename K, typename T>
INLINE void backward_head(const Shape& s, const Head<T>& q, const Head<T>& k, const Head<T>& v, const Head<T>& d_out,
                          const std::int32_t* first, std::int64_t padded, const float* log_sums, const float* delta,
                          Slopes* d) {
    std::vector<float> p(BLOCK * BLOCK), ds(BLOCK * BLOCK);
    Square<T> weights, slopes;
    float sums[BLOCK] = {}, deltas[BLOCK] = {};
    for (std::int64_t j0 = 0; j0 < s.length; j0 += BLOCK) {
        const std::int64_t keys = std::min<std::int64_t>(BLOCK, s.length - j0);
        for (std::int64_t i0 = j0; i0 < s.length && first[i0] < j0 + BLOCK; i0 += BLOCK) {
            const std::int64_t queries = std::min<std::int64_t>(BLOCK, s.length - i0);
            const std::int64_t step = j0 == i0 ? STRIPE : BLOCK;
            for (std::int64_t j = 0; j < keys; j += step) {
                const std::int64_t some = std::min(step, keys - j), key = (j0 + j) * s.size, at = j * BLOCK + j;
                product<K>(some, BLOCK - j, s.size, k.rows.data() + key, s.size, q.over_size() + i0 + j, padded,
                           p.data() + at, BLOCK, false);
                product<K>(some, BLOCK - j, s.size, v.rows.data() + key, s.size, d_out.over_size() + i0 + j, padded,
                           ds.data() + at, BLOCK, false);
            }
            std::copy_n(log_sums + i0, queries, sums);
            std::copy_n(delta + i0, queries, deltas);
            std::int64_t last = 0;  // queries from here on belong to later documents than the key
            for (std::int64_t j = 0; j < keys; ++j) {
                const std::int64_t from = std::clamp<std::int64_t>(j0 + j - i0, 0, queries);
                last = std::max(last, from);
                while (last < queries && first[i0 + last] <= j0 + j) ++last;
                slope_row(p.data() + j * BLOCK, ds.data() + j * BLOCK, Seen<K::lanes>(from, last), s.scale, sums, deltas);
            }
            if (keys % 2) std::fill_n(ds.data() + keys * BLOCK, BLOCK, 0.0f);
            weights.take(p.data(), keys);
            slopes.take(ds.data(), even(keys));
            const auto* over_keys = slopes.over_rows(even(keys));
            for (std::int64_t j = 0; j < keys; j += step) {
                const std::int64_t some = std::min(step, keys - j), key = (j0 + j) * s.size, at = j * BLOCK + j;
                product<K>(some, s.size, even(queries) - j, weights.rows() + at, BLOCK,
                           d_out.over_tokens(i0 + j, s.size), s.size, d->v.data() + key, s.size, true);
                product<K>(some, s.size, even(queries) - j, slopes.rows() + at, BLOCK, q.over_tokens(i0 + j, s.size),
                           s.size, d->k.data() + key, s.size, true);
            }
            for (std::int64_t i = 0; i < queries; i += step)
                product<K>(s.size, step, std::min(even(keys), i + step), k.columns.data() + j0, padded, over_keys + i,
                           BLOCK, d->q_columns.data() + i0 + i, padded, true);
        }
    }
}

// The sum of out * d_out of each of a head's queries. Lanes are written out: which bits come out is not GCC's choice.
INLINE void find_delta(const Tensor& out, const Tensor& d_out, std::int64_t b, std::int64_t h, const Shape& s, float* delta) {
    std::vector<float> x(static_cast<std::size_t>(s.size)), y(x.size());
    for (std::int64_t i = 0; i < s.length; ++i) {
        read(out, b, h, i, s.size, x.data());
        read(d_out, b, h, i, s.size, y.data());
        Lanes<16>::Values one, other, lanes = {};
        for (std::int64_t c = 0; c < s.size; c += 16) {
            Lanes<16>::load(x.data() + c, &one);
            Lanes<16>::load(y.data() + c, &other);
            lanes += one * other;
        }
        delta[i] = sum_of(lanes);
    }
}

struct Call {
    Shape s;
    const Tensor* t;
    const std::int32_t* firsts;
    float* log_sums;
    std::int64_t padded, tasks;
    std::atomic<std::int64_t> next{0};
};

// A task is one query head: nothing that it writes is another one's, so that threads share heads out evenly.
template <typename K, typename T>
INLINE void forward_tasks(Call* call) {
    const Shape& s = call->s;
    const Tensor* t = call->t;
    Head<T> q, k, v;
    for (std::int64_t task; (task = call->next++) < call->tasks;) {
        const std::int64_t b = task / s.heads, h = task % s.heads, kv = h / (s.heads / s.kv_heads);
        q.load(t[0], b, h, s, call->padded, ROWS);
        k.load(t[1], b, kv, s, call->padded, OVER_SIZE);
        v.load(t[2], b, kv, s, call->padded, OVER_TOKENS);
        forward_head<K, T>(s, q, k, v, call->firsts + b * s.length, call->padded, t[3], b, h,
                           call->log_sums + task * s.length);
    }
}

// A task is one key-value head and all the query heads that share it.
template <typename K, typename T>
INLINE void backward_tasks(Call* call) {
    const Shape& s = call->s;
    const Tensor* t = call->t;
    const std::int64_t padded = call->padded, group = s.heads / s.kv_heads;
    const std::size_t values = static_cast<std::size_t>(padded * s.size);
    Head<T> q, k, v, d_out;
    Slopes d;
    std::vector<float> delta, d_q;
    for (std::int64_t task; (task = call->next++) < call->tasks;) {
        const std::int64_t b = task / s.kv_heads, kv = task % s.kv_heads;
        k.load(t[1], b, kv, s, padded, ROWS | COLUMNS);
        v.load(t[2], b, kv, s, padded, ROWS);
        delta.resize(static_cast<std::size_t>(s.length));
        d_q.resize(values);
        d.k.assign(values, 0.0f);
        d.v.assign(values, 0.0f);
        for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
            q.load(t[0], b, h, s, padded, OVER_SIZE | OVER_TOKENS);
            d_out.load(t[4], b, h, s, padded, OVER_SIZE | OVER_TOKENS);
            find_delta(t[3], t[4], b, h, s, delta.data());
            d.q_columns.assign(values, 0.0f);
            backward_head<K, T>(s, q, k, v, d_out, call->firsts + b * s.length, padded,
                                call->log_sums + (b * s.heads + h) * s.length, delta.data(), &d);
            transpose(d.q_columns.data(), s.size, padded, d_q.data());
            for (std::int64_t i = 0; i < s.length; ++i) write(t[5], b, h, i, s.size, d_q.data() + i * s.size);
        }
        for (std::int64_t i = 0; i < s.length; ++i) {
            write(t[6], b, kv, i, s.size, d.k.data() + i * s.size);
            write(t[7], b, kv, i, s.size, d.v.data() + i * s.size);
        }
    }
}

// Registers decide how many rows of C are kept in them.
void tasks_plain(Call* call, bool back) { back ? backward_tasks<Sse, float>(call) : forward_tasks<Sse, float>(call); }
#ifdef CAMELID_X86
TARGET_AVX2 void tasks_avx2(Call* call, bool back) {
    back ? backward_tasks<Avx2, float>(call) : forward_tasks<Avx2, float>(call);
}
TARGET_AVX512 void tasks_avx512(Call* call, bool back) {
    back ? backward_tasks<Avx512, float>(call) : forward_tasks<Avx512, float>(call);
}
#endif
#ifdef CAMELID_BF16
TARGET_BF16 void tasks_bf16(Call* call, bool back) {
    back ? backward_tasks<Avx512, Half>(call) : forward_tasks<Avx512, Half>(call);
}
#endif

auto chosen_tasks(const Tensor* tensors, int count) {
    bool bfloat = true;
    for (int i = 0; i < count; ++i) bfloat = bfloat && tensors[i].bfloat;
#ifdef CAMELID_BF16
    if (bfloat && has_bf16()) return tasks_bf16;
#endif
    return CHOSEN(tasks);
}

}  // namespace

// shape: batch, heads, kv_heads, length, head size (a multiple of 16). tensors: eight of {data, batch, head, row stride
// in elements, whether bfloat16}: q, k, v, out, and for the backward pass d_out, d_q, d_k, d_v. firsts int32 [batch,
// length]: the first token of each token's document, never falling. log_sums float [batch, heads, length]: written by
// the forward pass, read by the backward pass.
extern "C" void camelid_attention(const std::int64_t* shape, float scale, const std::int64_t* tensors,
                                  const std::int32_t* firsts, float* log_sums, int backward, int threads) {
    Tensor t[8];
    const int count = backward ? 8 : 4;
    for (int i = 0; i < count; ++i)
        t[i] = {reinterpret_cast<void*>(tensors[5 * i]), tensors[5 * i + 1], tensors[5 * i + 2], tensors[5 * i + 3],
                static_cast<int>(tensors[5 * i + 4])};
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], scale};
    const std::int64_t padded = (s.length + BLOCK - 1) / BLOCK * BLOCK;
    Call call{s, t, firsts, log_sums, padded, s.batch * (backward ? s.kv_heads : s.heads)};
    const auto tasks_of_one = chosen_tasks(t, count);
    on_threads(call.tasks, threads, [&] { tasks_of_one(&call, backward != 0); });
}
