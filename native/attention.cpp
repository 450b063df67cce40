// Causal attention over packed documents, forward and backward, in blocks that fit the first caches. Products of float32
// are float32; of bfloat16 they are bfloat16 with float32 sums where the CPU has them, probabilities rounded too.
//
// Everything is a product C += A B of row-major blocks whose width is a multiple of 16: keys and queries are kept
// transposed where that is needed (FlashAttention, arXiv:2205.14135, algorithms 1 and 4, with the roles of rows and
// columns swapped in the backward pass). A query sees the keys from the first token of its own document up to itself;
// blocks outside of that are never touched.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pairs.hpp"
#include "share.hpp"
#include "vector.hpp"

namespace {

constexpr int BLOCK = 64;  // queries or keys at a time

struct Shape {
    std::int64_t batch, heads, kv_heads, length, size;  // size: of a head, a multiple of 16
    float scale;
};

// A [batch, heads, length, size] tensor of float or bfloat16 with any strides but a contiguous last dimension.
struct Tensor {
    void* data;
    std::int64_t batch_stride, head_stride, row_stride;
    int bfloat;

    template <typename T>
    T* row(std::int64_t b, std::int64_t h, std::int64_t t) const {
        return static_cast<T*>(data) + b * batch_stride + h * head_stride + t * row_stride;
    }
};

INLINE void read(const Tensor& from, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t size, float* to) {
    if (from.bfloat)
        for (std::int64_t i = 0; i < size; ++i) to[i] = widened(from.row<std::uint16_t>(b, h, t)[i]);
    else
        std::memcpy(to, from.row<float>(b, h, t), static_cast<std::size_t>(size) * sizeof(float));
}

INLINE void write(const Tensor& to, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t size, const float* from) {
    if (to.bfloat)
        for (std::int64_t i = 0; i < size; ++i) narrow(from[i], to.row<std::uint16_t>(b, h, t) + i);
    else
        std::memcpy(to.row<float>(b, h, t), from, static_cast<std::size_t>(size) * sizeof(float));
}

// One head's tokens as sides of a product A B; those past the end are zero. `rows` [padded, size] and `columns` [size,
// padded] are A's. What B is of depends on what is summed over: the size of a head, or the tokens.
enum Side { ROWS = 1, COLUMNS = 2, OVER_SIZE = 4, OVER_TOKENS = 8 };

template <typename T>
struct Head;

template <>
struct Head<float> {
    std::vector<float> rows, columns;
    const float* over_size() const { return columns.data(); }
    const float* over_tokens() const { return rows.data(); }

    INLINE void load(const Tensor& from, std::int64_t b, std::int64_t h, const Shape& s, std::int64_t padded, int sides) {
        rows.resize(static_cast<std::size_t>(padded * s.size));  // the padding is zero and stays so
        for (std::int64_t t = 0; t < s.length; ++t) read(from, b, h, t, s.size, rows.data() + t * s.size);
        if (!(sides & (COLUMNS | OVER_SIZE))) return;
        columns.resize(rows.size());
        transpose(rows.data(), padded, s.size, columns.data());
    }
};

#ifdef CAMELID_BF16
template <>
struct Head<Half> {
    std::vector<Half> rows, columns;
    std::vector<std::uint32_t> size_pairs, token_pairs;  // [size / 2, padded] and [padded / 2, size]
    const std::uint32_t* over_size() const { return size_pairs.data(); }
    const std::uint32_t* over_tokens() const { return token_pairs.data(); }

    INLINE void load(const Tensor& from, std::int64_t b, std::int64_t h, const Shape& s, std::int64_t padded, int sides) {
        rows.resize(static_cast<std::size_t>(padded * s.size));
        for (std::int64_t t = 0; t < s.length; ++t)
            std::memcpy(rows.data() + t * s.size, from.row<Half>(b, h, t), static_cast<std::size_t>(s.size) * 2);
        if (sides & COLUMNS) {
            columns.resize(rows.size());
            transpose(rows.data(), padded, s.size, columns.data());
        }
        if (sides & OVER_SIZE) {
            size_pairs.resize(rows.size() / 2);
            transpose(reinterpret_cast<const std::uint32_t*>(rows.data()), padded, s.size / 2, size_pairs.data());
        }
        if (sides & OVER_TOKENS) {
            token_pairs.resize(rows.size() / 2);
            for (std::int64_t t = 0; t < padded; t += 2)
                paired(rows.data() + t * s.size, rows.data() + (t + 1) * s.size, s.size,
                       token_pairs.data() + t / 2 * s.size);
        }
    }
};
#endif

// A block of weights or slopes [BLOCK, BLOCK] as sides of a product.
template <typename T>
struct Square;

template <>
struct Square<float> {
    const float* values;
    INLINE void take(const float* from, std::int64_t) { values = from; }
    const float* rows() const { return values; }
    INLINE const float* over_rows(std::int64_t) { return values; }
};

#ifdef CAMELID_BF16
template <>
struct Square<Half> {
    Half values[BLOCK * BLOCK];
    std::uint32_t pairs[BLOCK * BLOCK / 2];
    INLINE void take(const float* from, std::int64_t rows) { narrow_all(from, rows * BLOCK, values); }
    const Half* rows() const { return values; }
    INLINE const std::uint32_t* over_rows(std::int64_t rows) {
        for (std::int64_t r = 0; r < rows; r += 2)
            paired(values + r * BLOCK, values + (r + 1) * BLOCK, BLOCK, pairs + r / 2 * BLOCK);
        return pairs;
    }
};
#endif

INLINE std::int64_t even(std::int64_t count) { return (count + 1) / 2 * 2; }

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
    float top = -3.4e38f;
    for (int i = 0; i < N; ++i) top = lanes[i] > top ? lanes[i] : top;
    return top;
}

// Makes scores e^(score - top); returns their sum.
template <int N>
INLINE float exp_row(float* row, const Seen<N>& seen, float top) {
    typename Lanes<N>::Values values, lanes = {};
    for (std::int64_t at = seen.first; at < seen.last; at += N) {
        exp_below<N>(row + at, top, &values);
        Lanes<N>::store(&values, row + at);
        lanes += values;
    }
    float total = 0;
    for (int i = 0; i < N; ++i) total += lanes[i];
    seen.clear_rest(row);
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
        p = p < 0.0f ? p : Values{};
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
            product<K>(queries, BLOCK, s.size, q.rows.data() + i0 * s.size, s.size, k.over_size() + j0, padded,
                       scores.data(), BLOCK, false);
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
                totals[i] = totals[i] * fade + exp_row(row, seen, top);
                tops[i] = top;
                if (fade != 1.0f)
                    for (std::int64_t c = 0; c < s.size; ++c) sums[static_cast<std::size_t>(i * s.size + c)] *= fade;
            }
            weights.take(scores.data(), queries);
            product<K>(queries, s.size, BLOCK, weights.rows(), BLOCK, at_token(v, j0, s.size), s.size, sums.data(),
                       s.size, true);
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
            product<K>(keys, BLOCK, s.size, k.rows.data() + j0 * s.size, s.size, q.over_size() + i0, padded, p.data(),
                       BLOCK, false);
            product<K>(keys, BLOCK, s.size, v.rows.data() + j0 * s.size, s.size, d_out.over_size() + i0, padded,
                       ds.data(), BLOCK, false);
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
            product<K>(keys, s.size, even(queries), weights.rows(), BLOCK, at_token(d_out, i0, s.size), s.size,
                       d->v.data() + j0 * s.size, s.size, true);
            product<K>(keys, s.size, even(queries), slopes.rows(), BLOCK, at_token(q, i0, s.size), s.size,
                       d->k.data() + j0 * s.size, s.size, true);
            product<K>(s.size, BLOCK, even(keys), k.columns.data() + j0, padded, slopes.over_rows(even(keys)), BLOCK,
                       d->q_columns.data() + i0, padded, true);
        }
    }
}

// The sum of out * d_out of each of a head's queries.
template <typename T>
INLINE void find_delta(const Tensor& out, const Tensor& d_out, std::int64_t b, std::int64_t h, const Shape& s, float* delta) {
    std::vector<float> x(static_cast<std::size_t>(s.size)), y(x.size());
    for (std::int64_t i = 0; i < s.length; ++i) {
        read(out, b, h, i, s.size, x.data());
        read(d_out, b, h, i, s.size, y.data());
        delta[i] = 0;
        for (std::size_t c = 0; c < x.size(); ++c) delta[i] += x[c] * y[c];
    }
}

template <>
INLINE void find_delta<Half>(const Tensor& out, const Tensor& d_out, std::int64_t b, std::int64_t h, const Shape& s,
                             float* delta) {
    for (std::int64_t i = 0; i < s.length; ++i) {
        const Half *x = out.row<Half>(b, h, i), *y = d_out.row<Half>(b, h, i);
        Lanes<16>::Values one, other, lanes = {};
        for (std::int64_t c = 0; c < s.size; c += 16) {
            Lanes<16>::load(x + c, &one);
            Lanes<16>::load(y + c, &other);
            lanes += one * other;
        }
        delta[i] = 0;
        for (int c = 0; c < 16; ++c) delta[i] += lanes[c];
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
    std::vector<float> delta(static_cast<std::size_t>(s.length)), d_q(values);
    for (std::int64_t task; (task = call->next++) < call->tasks;) {
        const std::int64_t b = task / s.kv_heads, kv = task % s.kv_heads;
        k.load(t[1], b, kv, s, padded, ROWS | COLUMNS);
        v.load(t[2], b, kv, s, padded, ROWS);
        d.k.assign(values, 0.0f);
        d.v.assign(values, 0.0f);
        for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
            q.load(t[0], b, h, s, padded, OVER_SIZE | OVER_TOKENS);
            d_out.load(t[4], b, h, s, padded, OVER_SIZE | OVER_TOKENS);
            find_delta<T>(t[3], t[4], b, h, s, delta.data());
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
    on_threads(std::min<std::int64_t>(threads, call.tasks), [&] { tasks_of_one(&call, backward != 0); });
}
