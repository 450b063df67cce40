// Causal attention over packed documents, forward and backward, float32 arithmetic, blocks that fit the first caches.
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
#include <thread>
#include <vector>

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

// One head's rows [padded, size], and the same transposed [size, padded]; rows past the end are zero.
struct Head {
    std::vector<float> rows, columns;
};

INLINE void load(const Tensor& from, std::int64_t b, std::int64_t h, const Shape& s, std::int64_t padded, bool columns,
                 Head* head) {
    head->rows.assign(static_cast<std::size_t>(padded * s.size), 0.0f);
    for (std::int64_t t = 0; t < s.length; ++t) read(from, b, h, t, s.size, head->rows.data() + t * s.size);
    if (!columns) return;
    head->columns.resize(static_cast<std::size_t>(padded * s.size));
    for (std::int64_t t0 = 0; t0 < padded; t0 += 16)
        for (std::int64_t i = 0; i < s.size; ++i)
            for (std::int64_t t = t0; t < t0 + 16; ++t)
                head->columns[static_cast<std::size_t>(i * padded + t)] = head->rows[static_cast<std::size_t>(t * s.size + i)];
}

// Scales a row of scores; returns the largest.
template <int N>
INLINE float scaled_top(float* row, float scale) {
    typename Lanes<N>::Values values, lanes = typename Lanes<N>::Values{} - 3.4e38f;
    for (int at = 0; at < BLOCK; at += N) {
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
INLINE float exp_row(float* row, float top) {
    typename Lanes<N>::Values values, lanes = {};
    for (int at = 0; at < BLOCK; at += N) {
        exp_below<N>(row + at, top, &values);
        Lanes<N>::store(&values, row + at);
        lanes += values;
    }
    float total = 0;
    for (int i = 0; i < N; ++i) total += lanes[i];
    return total;
}

template <typename K>
INLINE void forward_head(const Shape& s, const Head& q, const Head& k, const Head& v, const std::int32_t* first,
                         std::int64_t padded, const Tensor& out, std::int64_t b, std::int64_t h, float* log_sums) {
    std::vector<float> scores(BLOCK * BLOCK), sums(static_cast<std::size_t>(BLOCK * s.size));
    float tops[BLOCK], totals[BLOCK];
    for (std::int64_t i0 = 0; i0 < s.length; i0 += BLOCK) {
        const std::int64_t queries = std::min<std::int64_t>(BLOCK, s.length - i0);
        std::fill(sums.begin(), sums.end(), 0.0f);
        std::fill(tops, tops + BLOCK, -1e30f);
        std::fill(totals, totals + BLOCK, 0.0f);
        for (std::int64_t j0 = first[i0] / BLOCK * BLOCK; j0 <= i0; j0 += BLOCK) {
            product<K>(queries, BLOCK, s.size, q.rows.data() + i0 * s.size, s.size, k.columns.data() + j0, padded,
                          scores.data(), BLOCK, false);
            for (std::int64_t i = 0; i < queries; ++i) {
                float* row = scores.data() + i * BLOCK;
                const std::int64_t from = std::max<std::int64_t>(first[i0 + i] - j0, 0);
                const std::int64_t to = std::min<std::int64_t>(i0 + i + 1 - j0, BLOCK);
                if (from >= to) {
                    std::fill(row, row + BLOCK, 0.0f);
                    continue;
                }
                std::fill(row, row + from, -INFINITY);  // e to that is nothing
                std::fill(row + to, row + BLOCK, -INFINITY);
                const float top = std::max(tops[i], scaled_top<K::lanes>(row, s.scale));
                const float fade = exp_negative(tops[i] - top);
                totals[i] = totals[i] * fade + exp_row<K::lanes>(row, top);
                tops[i] = top;
                if (fade != 1.0f)
                    for (std::int64_t c = 0; c < s.size; ++c) sums[static_cast<std::size_t>(i * s.size + c)] *= fade;
            }
            product<K>(queries, s.size, BLOCK, scores.data(), BLOCK, v.rows.data() + j0 * s.size, s.size, sums.data(),
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
template <typename K>
INLINE void backward_head(const Shape& s, const Head& q, const Head& k, const Head& v, const Head& d_out,
                          const std::int32_t* first, std::int64_t padded, const float* log_sums, const float* delta,
                          Slopes* d) {
    std::vector<float> p(BLOCK * BLOCK), ds(BLOCK * BLOCK);
    for (std::int64_t j0 = 0; j0 < s.length; j0 += BLOCK) {
        const std::int64_t keys = std::min<std::int64_t>(BLOCK, s.length - j0);
        for (std::int64_t i0 = j0; i0 < s.length && first[i0] < j0 + BLOCK; i0 += BLOCK) {
            const std::int64_t queries = std::min<std::int64_t>(BLOCK, s.length - i0);
            product<K>(keys, BLOCK, s.size, k.rows.data() + j0 * s.size, s.size, q.columns.data() + i0, padded, p.data(),
                          BLOCK, false);
            product<K>(keys, BLOCK, s.size, v.rows.data() + j0 * s.size, s.size, d_out.columns.data() + i0, padded,
                          ds.data(), BLOCK, false);
            std::int64_t last = queries;  // queries from here on belong to later documents than the key
            for (std::int64_t j = 0; j < keys; ++j) {
                float* row = p.data() + j * BLOCK;
                float* slope = ds.data() + j * BLOCK;
                const std::int64_t from = std::clamp<std::int64_t>(j0 + j - i0, 0, queries);
                last = from;
                while (last < queries && first[i0 + last] <= j0 + j) ++last;
                for (std::int64_t i = 0; i < queries; ++i)
                    row[i] = exp_negative(std::min(row[i] * s.scale - log_sums[i0 + i], 0.0f));
                std::fill(row, row + from, 0.0f);
                std::fill(row + last, row + BLOCK, 0.0f);
                for (std::int64_t i = 0; i < queries; ++i) slope[i] = row[i] * (slope[i] - delta[i0 + i]) * s.scale;
                std::fill(slope + queries, slope + BLOCK, 0.0f);
            }
            product<K>(keys, s.size, queries, p.data(), BLOCK, d_out.rows.data() + i0 * s.size, s.size,
                          d->v.data() + j0 * s.size, s.size, true);
            product<K>(keys, s.size, queries, ds.data(), BLOCK, q.rows.data() + i0 * s.size, s.size,
                          d->k.data() + j0 * s.size, s.size, true);
            product<K>(s.size, BLOCK, keys, k.columns.data() + j0, padded, ds.data(), BLOCK, d->q_columns.data() + i0,
                          padded, true);
        }
    }
}

// One query head: nothing that it writes is another one's, so that threads share heads out evenly.
template <typename K>
INLINE void forward_group(const Shape& s, const Tensor* t, const std::int32_t* firsts, float* log_sums, std::int64_t task) {
    const std::int64_t b = task / s.heads, h = task % s.heads, kv = h / (s.heads / s.kv_heads);
    const std::int64_t padded = (s.length + BLOCK - 1) / BLOCK * BLOCK;
    Head q, k, v;
    load(t[0], b, h, s, padded, false, &q);
    load(t[1], b, kv, s, padded, true, &k);
    load(t[2], b, kv, s, padded, false, &v);
    forward_head<K>(s, q, k, v, firsts + b * s.length, padded, t[3], b, h, log_sums + task * s.length);
}

template <typename K>
INLINE void backward_group(const Shape& s, const Tensor* t, const std::int32_t* firsts, const float* log_sums,
                           std::int64_t task) {
    const std::int64_t b = task / s.kv_heads, kv = task % s.kv_heads, group = s.heads / s.kv_heads;
    const std::int64_t padded = (s.length + BLOCK - 1) / BLOCK * BLOCK;
    Head q, k, v, d_out;
    Slopes d;
    std::vector<float> delta(static_cast<std::size_t>(s.length)), row(static_cast<std::size_t>(s.size));
    load(t[1], b, kv, s, padded, true, &k);
    load(t[2], b, kv, s, padded, false, &v);
    d.k.assign(k.rows.size(), 0.0f);
    d.v.assign(k.rows.size(), 0.0f);
    for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        load(t[0], b, h, s, padded, true, &q);
        load(t[4], b, h, s, padded, true, &d_out);
        for (std::int64_t i = 0; i < s.length; ++i) {
            read(t[3], b, h, i, s.size, row.data());
            float sum = 0;
            for (std::int64_t c = 0; c < s.size; ++c) sum += row[static_cast<std::size_t>(c)] * d_out.rows[static_cast<std::size_t>(i * s.size + c)];
            delta[static_cast<std::size_t>(i)] = sum;
        }
        d.q_columns.assign(k.rows.size(), 0.0f);
        backward_head<K>(s, q, k, v, d_out, firsts + b * s.length, padded, log_sums + (b * s.heads + h) * s.length,
                            delta.data(), &d);
        for (std::int64_t i = 0; i < s.length; ++i) {
            for (std::int64_t c = 0; c < s.size; ++c) row[static_cast<std::size_t>(c)] = d.q_columns[static_cast<std::size_t>(c * padded + i)];
            write(t[5], b, h, i, s.size, row.data());
        }
    }
    for (std::int64_t i = 0; i < s.length; ++i) {
        write(t[6], b, kv, i, s.size, d.k.data() + i * s.size);
        write(t[7], b, kv, i, s.size, d.v.data() + i * s.size);
    }
}

// Registers decide how many rows of C are kept in them.
void group_plain(const Shape& s, const Tensor* t, const std::int32_t* f, float* l, std::int64_t task, bool backward) {
    backward ? backward_group<Sse>(s, t, f, l, task) : forward_group<Sse>(s, t, f, l, task);
}
#ifdef CAMELID_X86
TARGET_AVX2 void group_avx2(const Shape& s, const Tensor* t, const std::int32_t* f, float* l, std::int64_t task,
                            bool backward) {
    backward ? backward_group<Avx2>(s, t, f, l, task) : forward_group<Avx2>(s, t, f, l, task);
}
TARGET_AVX512 void group_avx512(const Shape& s, const Tensor* t, const std::int32_t* f, float* l, std::int64_t task,
                                bool backward) {
    backward ? backward_group<Avx512>(s, t, f, l, task) : forward_group<Avx512>(s, t, f, l, task);
}
#endif

}  // namespace

// shape: batch, heads, kv_heads, length, head size (a multiple of 16). tensors: eight of {data, batch, head, row stride
// in elements, whether bfloat16}: q, k, v, out, and for the backward pass d_out, d_q, d_k, d_v. firsts int32 [batch,
// length]: the first token of each token's document, never falling. log_sums float [batch, heads, length]: written by
// the forward pass, read by the backward pass.
extern "C" void camelid_attention(const std::int64_t* shape, float scale, const std::int64_t* tensors,
                                  const std::int32_t* firsts, float* log_sums, int backward, int threads) {
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], scale};
    Tensor t[8];
    for (int i = 0; i < (backward ? 8 : 4); ++i)
        t[i] = {reinterpret_cast<void*>(tensors[5 * i]), tensors[5 * i + 1], tensors[5 * i + 2], tensors[5 * i + 3],
                static_cast<int>(tensors[5 * i + 4])};
    const std::int64_t tasks = s.batch * (backward ? s.kv_heads : s.heads);
    std::atomic<std::int64_t> next{0};
    const auto group = CHOSEN(group);
    const auto work = [&] {
        for (std::int64_t task; (task = next++) < tasks;) group(s, t, firsts, log_sums, task, backward != 0);
    };
    std::vector<std::thread> others;
    for (std::int64_t i = 1; i < std::min<std::int64_t>(threads, tasks); ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}
