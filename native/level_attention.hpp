// softmax(Q K^T / sqrt(d_k)) V over pages, from the first to each query's own, with running maxima (arXiv:2205.14135).

template <typename T>
INLINE void load_lanes(const T* from, Values* out) {
    Register::load(from, out);
}
INLINE void load_lanes(const std::int8_t* from, Values* out) { load_bytes(from, out); }

template <typename T>
INLINE T* head_of(void* base, std::int64_t kv_head, std::int64_t head_dim) {
    return static_cast<T*>(base) + kv_head * head_dim * PAGE;
}

// What lines of T are multiplied by: floats, or of bfloat16 the two that belong to a pair of lines, which lie together.
template <typename T>
struct Factors {
    using One = float;
    static constexpr std::int64_t together = 1;
};
#ifdef HAS_BF16
using Pair = std::uint32_t;
#else
struct Pair {  // wide already: each is multiplied with every page's lines
    float even, odd;
};
INLINE void spread(const Pair& pair, Words* out) {
    out->even = pair.even - Values{};  // a sum would make 0 of -0, and so be computed
    out->odd = pair.odd - Values{};
}
#endif
template <>
struct Factors<Half> {
    using One = Pair;
    static constexpr std::int64_t together = 2;
};

template <typename T>
INLINE void keep_as(const float* key, const float* value, const Pages& page, std::int64_t kv_head, std::int64_t slot,
                    std::int64_t head_dim) {
    T* keys = head_of<T>(page.keys, kv_head, head_dim);
    T* values = head_of<T>(page.values, kv_head, head_dim);
    constexpr std::int64_t near = Factors<T>::together;
    for (std::int64_t i = 0; i < head_dim; ++i) narrow(key[i], keys + (i / near * PAGE + slot) * near + i % near);
    for (std::int64_t i = 0; i < head_dim; ++i) narrow(value[i], values + (slot / near * head_dim + i) * near + slot % near);
}

constexpr int MOST_DIM = 256;  // of a head

// As bytes, a head's key and its value each by their own greatest.
template <>
INLINE void keep_as<std::int8_t>(const float* key, const float* value, const Pages& page, std::int64_t kv_head,
                                 std::int64_t slot, std::int64_t head_dim) {
    std::int8_t bytes[MOST_DIM];
    std::int8_t* keys = head_of<std::int8_t>(page.keys, kv_head, head_dim);
    const std::int64_t at = kv_head * PAGE + slot;
    std::int32_t sum;
    page.key_scales[at] = as_bytes(key, head_dim, bytes, &sum);
    for (std::int64_t i = 0; i < head_dim; ++i) keys[i * PAGE + slot] = bytes[i];
    page.value_scales[at] = as_bytes(value, head_dim, head_of<std::int8_t>(page.values, kv_head, head_dim) + slot * head_dim, &sum);
}

void keep(const float* key, const float* value, const Pages& page, std::int64_t kv_head, std::int64_t slot,
          std::int64_t head_dim) {
    if (page.kind == INT8)
        keep_as<std::int8_t>(key, value, page, kv_head, slot, head_dim);
    else if (page.kind == BFLOAT16)
        keep_as<std::uint16_t>(key, value, page, kv_head, slot, head_dim);
    else
        keep_as<float>(key, value, page, kv_head, slot, head_dim);
}

// sum[r][w] += factors[r][k] times register w of line k, of `count` lines; additions wait for one another, so several at
// once. `next` is fetched meanwhile.
template <typename T, int R, int W, int S>
INLINE void add_lines(const T* lines, const T* next, std::int64_t line, std::int64_t count, const float (*factors)[S],
                      Values (*sum)[W]) {
    for (std::int64_t k = 0; k < count; ++k)
        for (int w = 0; w < W; ++w) {
            __builtin_prefetch(next + k * line + LANES * w, 0, 2);
            Values v;
            load_lanes(lines + k * line + LANES * w, &v);
            for (int r = 0; r < R; ++r) sum[r][w] += v * factors[r][k];
        }
}

template <int R, int W, int S>
INLINE void add_pair(const Half* pair, std::uint32_t kept, std::int64_t at, const Pair (*factors)[S], Values (*sum)[W]) {
    Words words[W], two;
    for (int w = 0; w < W; ++w) {
        Register::Bits both;
        std::memcpy(&both, pair + 2 * LANES * w, sizeof both);
        spread(both & kept, &words[w]);
    }
    for (int r = 0; r < R; ++r) {
        spread(factors[r][at], &two);
        for (int w = 0; w < W; ++w) add_products(words[w], two, &sum[r][w]);
    }
}

template <typename T, int R, int W, int S>
INLINE void add_lines(const Half* lines, const Half* next, std::int64_t line, std::int64_t count,
                      const Pair (*factors)[S], Values (*sum)[W]) {
    for (std::int64_t k = 0; k + 2 <= count; k += 2) {
        for (int w = 0; w < W; ++w) __builtin_prefetch(next + k * line + 2 * LANES * w, 0, 2);
        add_pair<R, W, S>(lines + k * line, 0xFFFFFFFFu, k / 2, factors, sum);
    }
    if (count % 2)  // what lies beside the last line may never have been written
        add_pair<R, W, S>(lines + (count - 1) * line, 0xFFFFu, count / 2, factors, sum);
}

// A row's factors from floats.
INLINE void as_factors(const float* from, std::int64_t count, float* to) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
}
INLINE void as_factors(const float* from, std::int64_t count, Pair* to) {
    for (std::int64_t i = 0; i < count; i += LANES) {
        Values values;
        Register::load(from + i, &values);
#ifdef HAS_BF16
        narrow_lanes(values, reinterpret_cast<Half*>(to) + i);
#else
        Half halves[LANES];
        narrow_lanes(values, halves);
        Register::load(halves, &values);
        std::memcpy(reinterpret_cast<char*>(to) + i * sizeof(float), &values, sizeof values);
#endif
    }
}

// sums[r][from …] += shares[r] times W registers of each of `used` values.
template <typename T, int R, int W, int S>
INLINE void mix(const T* values, const T* next, std::int64_t size, std::int64_t used,
                const typename Factors<T>::One (*shares)[S], float (*sums)[MOST_DIM], std::int64_t from) {
    constexpr std::int64_t near = Factors<T>::together;
    Values sum[R][W];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) Register::load(sums[r] + from + LANES * w, &sum[r][w]);
    add_lines<T, R, W, S>(values + from * near, next + from * near, size, used, shares, sum);
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) Register::store(&sum[r][w], sums[r] + from + LANES * w);
}

// A row's scores of a page, of which it sees the first `seen`, to shares of a softmax under the greatest so far, `top`. When
// that grows, what was summed before fades.
INLINE void soften(Values* scores, std::int64_t seen, std::int64_t size, float* shares, float* sums, float* top,
                   Values* total) {
    if (seen < PAGE) {
        for (int h = 0; h < PARTS; ++h) Register::store(&scores[h], shares + LANES * h);
        for (std::int64_t j = seen; j < PAGE; ++j) shares[j] = -1e38f;
        for (int h = 0; h < PARTS; ++h) Register::load(shares + LANES * h, &scores[h]);
    }
    if (any_above(scores, *top)) {  // seldom, after the first pages
        const float most = greatest_of(scores);
        const float now = most > *top ? most : *top;  // beside what is no number
        const float fade = exp_negative(*top - now);
        *total *= fade;
        for (std::int64_t i = 0; i < size; ++i) sums[i] *= fade;
        *top = now;
    }
    Values all = {};
    for (int h = 0; h < PARTS; ++h) {
        scores[h] -= *top;
        exp_values<LANES>(&scores[h]);
        Register::store(&scores[h], shares + LANES * h);
        all += scores[h];
    }
    *total += all;
}

// R queries of one key-value head; row r sees the first sees[r] tokens. `out` and `queries` by row.
template <typename T, int R>
INLINE void attend_rows(const Attention& text, std::int64_t kv_head, const float* const* queries, float* const* out,
                        const std::int64_t* sees, std::int64_t most) {
    const std::int64_t size = text.head_dim;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
    constexpr int W = LANES == 16 || R <= 4 ? 2 : 1;  // registers of a line at a time: R * W sums and more must fit
    constexpr int LONG = LANES == 16 && R <= 4 ? 4 : W;  // of values; lines that are read in one go are fetched better
    alignas(64) float sums[R][MOST_DIM];
    alignas(64) float shares[R][PAGE];
    using Factor = typename Factors<T>::One;
    alignas(64) Factor asked[R][MOST_DIM], given[R][PAGE];
    float tops[R];
    Values totals[R] = {};
    for (int r = 0; r < R; ++r) {
        as_factors(queries[r], size, asked[r]);
        std::memset(sums[r], 0, static_cast<std::size_t>(size) * 4);
        tops[r] = -1e30f;
    }
    for (std::int64_t begin = 0, p = 0; begin < most; begin += PAGE, ++p) {
        const T* keys = head_of<const T>(text.pages[p].keys, kv_head, size);
        const T* values = head_of<const T>(text.pages[p].values, kv_head, size);
        // Pages lie anywhere: the CPU cannot guess where the next one is.
        const Pages& next = text.pages[begin + PAGE < most ? p + 1 : p];
        const T* next_keys = head_of<const T>(next.keys, kv_head, size);
        const T* next_values = head_of<const T>(next.values, kv_head, size);
        Values scores[R][PARTS];
        for (int h = 0; h < PARTS; h += W) {
            constexpr std::int64_t near = Factors<T>::together;
            Values some[R][W];
#pragma GCC unroll 16
            for (int i = 0; i < R * W; ++i) some[i / W][i % W] = Values{};
            add_lines<T, R, W, MOST_DIM>(keys + h * LANES * near, next_keys + h * LANES * near, PAGE, size, asked, some);
#pragma GCC unroll 16
            for (int i = 0; i < R * W; ++i) scores[i / W][h + i % W] = some[i / W][i % W];
        }
        Values worth[PARTS] = {};
        if constexpr (sizeof(T) == 1)
            for (int h = 0; h < PARTS; ++h) Register::load(text.pages[p].key_scales + kv_head * PAGE + LANES * h, &worth[h]);
        for (int r = 0; r < R; ++r) {
            const std::int64_t seen = sees[r] - begin;
            if (seen <= 0) {
                std::memset(shares[r], 0, sizeof shares[r]);
                continue;
            }
            for (int h = 0; h < PARTS; ++h) {
                scores[r][h] *= scale;
                if constexpr (sizeof(T) == 1) scores[r][h] *= worth[h];
            }
            soften(scores[r], seen, size, shares[r], sums[r], &tops[r], &totals[r]);
        }
        const std::int64_t used = most - begin < PAGE ? most - begin : PAGE;
        if constexpr (sizeof(T) == 1) {
            const float* each = text.pages[p].value_scales + kv_head * PAGE;
            for (int r = 0; r < R; ++r)
                for (std::int64_t j = 0; j < used; ++j) shares[r][j] *= each[j];
        }
        for (int r = 0; r < R; ++r) as_factors(shares[r], PAGE, given[r]);
        std::int64_t i = 0;
        for (; i + LONG * LANES <= size; i += LONG * LANES) mix<T, R, LONG, PAGE>(values, next_values, size, used, given, sums, i);
        for (; i + W * LANES <= size; i += W * LANES) mix<T, R, W, PAGE>(values, next_values, size, used, given, sums, i);
        for (; i < size; i += LANES) mix<T, R, 1, PAGE>(values, next_values, size, used, given, sums, i);
    }
    for (int r = 0; r < R; ++r) {
        const float share = 1.0f / sum_of(totals[r]);
        for (std::int64_t i = 0; i < size; ++i) out[r][i] = sums[r][i] * share;
    }
}

template <typename T>
INLINE void attend_as(const Attention& text, std::int64_t from, std::int64_t to, std::int64_t kv_head) {
    const std::int64_t shared = text.heads / text.kv_heads, rows = (to - from) * shared;
    for (std::int64_t at = 0; at < rows; at += 8) {
        const float* queries[8];
        float* out[8];
        std::int64_t sees[8], most = 0;
        const int count = static_cast<int>(rows - at < 8 ? rows - at : 8);
        for (int r = 0; r < count; ++r) {
            const std::int64_t token = from + (at + r) / shared, head = kv_head * shared + (at + r) % shared;
            queries[r] = text.queries + (token * text.heads + head) * text.head_dim;
            out[r] = text.out + (token * text.heads + head) * text.head_dim;
            sees[r] = text.start + token + 1;
            most = sees[r];  // of the last row, which sees most
        }
        switch (count) {
            case 1: attend_rows<T, 1>(text, kv_head, queries, out, sees, most); break;
            case 2: attend_rows<T, 2>(text, kv_head, queries, out, sees, most); break;
            case 3: attend_rows<T, 3>(text, kv_head, queries, out, sees, most); break;
            case 4: attend_rows<T, 4>(text, kv_head, queries, out, sees, most); break;
            case 5: attend_rows<T, 5>(text, kv_head, queries, out, sees, most); break;
            case 6: attend_rows<T, 6>(text, kv_head, queries, out, sees, most); break;
            case 7: attend_rows<T, 7>(text, kv_head, queries, out, sees, most); break;
            default: attend_rows<T, 8>(text, kv_head, queries, out, sees, most);
        }
    }
}

void attend(const Attention& text, std::int64_t from, std::int64_t to, std::int64_t kv_head) {
    if (text.pages[0].kind == INT8)
        attend_as<std::int8_t>(text, from, to, kv_head);
    else if (text.pages[0].kind == BFLOAT16)
        attend_as<std::uint16_t>(text, from, to, kv_head);
    else
        attend_as<float>(text, from, to, kv_head);
}
