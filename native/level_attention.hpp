// softmax(Q K^T / sqrt(d_k)) V over pages, from the first to each query's own, with running maxima (arXiv:2205.14135).

template <typename T>
INLINE T* head_of(void* base, std::int64_t kv_head, std::int64_t head_dim) {
    return static_cast<T*>(base) + kv_head * head_dim * PAGE;
}

template <typename T>
INLINE void keep_as(const float* key, const float* value, const Pages& page, std::int64_t kv_head, std::int64_t slot,
                    std::int64_t head_dim) {
    T* keys = head_of<T>(page.keys, kv_head, head_dim);
    T* values = head_of<T>(page.values, kv_head, head_dim) + slot * head_dim;
    for (std::int64_t i = 0; i < head_dim; ++i) narrow(key[i], keys + i * PAGE + slot);
    for (std::int64_t i = 0; i < head_dim; ++i) narrow(value[i], values + i);
}

void keep(const float* key, const float* value, const Pages& page, std::int64_t kv_head, std::int64_t slot,
          std::int64_t head_dim) {
    if (page.bfloat)
        keep_as<std::uint16_t>(key, value, page, kv_head, slot, head_dim);
    else
        keep_as<float>(key, value, page, kv_head, slot, head_dim);
}

constexpr int MOST_DIM = 256;  // of a head

// R queries of one key-value head; row r sees the first sees[r] tokens. `out` and `queries` by row.
template <typename T, int R>
INLINE void attend_rows(const Attention& text, std::int64_t kv_head, const float* const* queries, float* const* out,
                        const std::int64_t* sees, std::int64_t most) {
    const std::int64_t size = text.head_dim;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
    alignas(64) float sums[R][MOST_DIM];
    alignas(64) float shares[R][PAGE];
    float tops[R], totals[R];
    for (int r = 0; r < R; ++r) {
        std::memset(sums[r], 0, static_cast<std::size_t>(size) * 4);
        tops[r] = -1e30f;
        totals[r] = 0;
    }
    for (std::int64_t begin = 0, p = 0; begin < most; begin += PAGE, ++p) {
        const T* keys = head_of<const T>(text.pages[p].keys, kv_head, size);
        const T* values = head_of<const T>(text.pages[p].values, kv_head, size);
        if (begin + PAGE < most) {  // pages lie anywhere: the CPU cannot guess where the next one is
            const char* next[] = {reinterpret_cast<const char*>(head_of<const T>(text.pages[p + 1].keys, kv_head, size)),
                                  reinterpret_cast<const char*>(head_of<const T>(text.pages[p + 1].values, kv_head, size))};
            for (const char* at : next)
                for (std::int64_t i = 0; i < size * PAGE * static_cast<std::int64_t>(sizeof(T)); i += 64)
                    __builtin_prefetch(at + i);
        }
        Values scores[R][2] = {};
        for (std::int64_t i = 0; i < size; ++i)
            for (int h = 0; h < 2; ++h) {
                Values k;
                Lanes<16>::load(keys + i * PAGE + 16 * h, &k);
                for (int r = 0; r < R; ++r) scores[r][h] += k * queries[r][i];
            }
        for (int r = 0; r < R; ++r) {
            const std::int64_t seen = sees[r] - begin;
            if (seen <= 0) {
                std::memset(shares[r], 0, sizeof shares[r]);
                continue;
            }
            for (int h = 0; h < 2; ++h) {
                scores[r][h] *= scale;
                Lanes<16>::store(&scores[r][h], shares[r] + 16 * h);
            }
            for (std::int64_t j = seen; j < PAGE; ++j) shares[r][j] = -1e38f;
            for (int h = 0; h < 2; ++h) Lanes<16>::load(shares[r] + 16 * h, &scores[r][h]);
            const float most = greatest(scores[r][0] > scores[r][1] ? scores[r][0] : scores[r][1]);
            const float top = most > tops[r] ? most : tops[r];
            for (int h = 0; h < 2; ++h) {
                scores[r][h] -= top;
                exp_values<16>(&scores[r][h]);
                Lanes<16>::store(&scores[r][h], shares[r] + 16 * h);
            }
            const float sum = sum_of(scores[r][0] + scores[r][1]);
            const float fade = exp_negative(tops[r] - top);
            totals[r] = totals[r] * fade + sum;
            tops[r] = top;
            if (fade != 1.0f)
                for (std::int64_t i = 0; i < size; ++i) sums[r][i] *= fade;
        }
        const std::int64_t used = most - begin < PAGE ? most - begin : PAGE;
        for (std::int64_t i = 0; i < size; i += 16) {
            Values sum[R];
            for (int r = 0; r < R; ++r) Lanes<16>::load(sums[r] + i, &sum[r]);
            for (std::int64_t j = 0; j < used; ++j) {
                Values v;
                Lanes<16>::load(values + j * size + i, &v);
                for (int r = 0; r < R; ++r) sum[r] += v * shares[r][j];
            }
            for (int r = 0; r < R; ++r) Lanes<16>::store(&sum[r], sums[r] + i);
        }
    }
    for (int r = 0; r < R; ++r)
        for (std::int64_t i = 0; i < size; ++i) out[r][i] = sums[r][i] / totals[r];
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
    if (text.pages[0].bfloat)
        attend_as<std::uint16_t>(text, from, to, kv_head);
    else
        attend_as<float>(text, from, to, kv_head);
}
