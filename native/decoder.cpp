// One call a step: tokens of any number of texts go through all layers, and what Python sees is logits.
#include "decoder.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "buffer.hpp"
#include "pool.hpp"
#include "step.hpp"
#include "vector.hpp"

namespace {

const Level* level_named(int wanted) {  // -1: the best of this CPU
#ifdef CAMELID_X86
#if defined(__clang__) || __GNUC__ < 11  // older ones do not know the word; every CPU with AVX2 has it, some machines hide it
    constexpr bool f16c = true;
#else
    const bool f16c = __builtin_cpu_supports("f16c");
#endif
    const bool vnni = has_avx512() && f16c && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    const auto level = [&](int number) -> const Level* {  // AMX is asked for only where it is wanted
        switch (number) {
            case 0: return level_plain();
            case 1: return has_avx2() && f16c ? level_avx2() : nullptr;
            case 2: return vnni ? level_avx512() : nullptr;
            case 3: return bf16 ? level_avx512_bf16() : nullptr;
            case 4: return bf16 ? level_amx() : nullptr;
            case 5: return bf16 ? level_amx_simulated() : nullptr;
            default: return nullptr;
        }
    };
    if (wanted >= 0) return level(wanted);
    for (int number = 4; number > 0; --number)  // never the simulated one
        if (const Level* found = level(number)) return found;
    return level_plain();
#else
    const Level* const neon = wanted < 0 || wanted == 6 ? level_neon() : nullptr;
    return neon || wanted > 0 ? neon : level_plain();
#endif
}

constexpr std::int64_t PIECE_BYTES = 64 << 10;  // of weights, that a worker takes at a time, at least
constexpr std::int64_t MOST_PIECES = 16;        // of its share of a product
constexpr std::int64_t MANY = 16;               // tokens that a product does not wait for memory with
constexpr std::int64_t NOT_MADE = -2;

enum Weight { Q, K, V, O, GATE, UP, DOWN, WEIGHTS };

struct Layer {
    Matrix matrices[WEIGHTS];
    const float* biases[WEIGHTS];  // null: none
    const float* attention_norm;
    const float* mlp_norm;
};

// A row for each token of the vocabulary: floats, or whole numbers q, of INT4 two a byte, the even column low, and float16
// scales (and least values) of each group: scale * (q - middle), or scale * q + least.
struct Embedding {
    const void* rows;
    Number kind;
    std::int64_t group;
    const std::uint16_t *scales, *least;

    void widen(std::int64_t token, std::int64_t size, float* out) const {
        const auto* halves = static_cast<const std::uint16_t*>(rows) + token * size;
        if (kind == FLOAT32)
            std::memcpy(out, static_cast<const float*>(rows) + token * size, static_cast<std::size_t>(size) * sizeof(float));
        else if (kind == BFLOAT16)
            for (std::int64_t i = 0; i < size; ++i) out[i] = widened(halves[i]);
        else if (kind == FLOAT16)
            for (std::int64_t i = 0; i < size; ++i) out[i] = half_to_float(halves[i]);
        else
            for (std::int64_t g = 0; g < size / group; ++g) widen_group(token * (size / group) + g, out + g * group);
    }

    void widen_group(std::int64_t number, float* out) const {
        const float scale = half_to_float(scales[number]), added = least ? half_to_float(least[number]) : 0.0f;
        const int middle = least ? 0 : kind == INT8 ? 128 : 8;
        const auto* bytes = static_cast<const std::uint8_t*>(rows) + number * group / (kind == INT8 ? 1 : 2);
        for (std::int64_t i = 0; i < group; ++i) {
            const int q = kind == INT8 ? bytes[i] : bytes[i / 2] >> i % 2 * 4 & 15;
            const float product = scale * static_cast<float>(q - middle);
            out[i] = product + added;
        }
    }
};

// Rows of activations in each of the forms that some matrix is multiplied by.
struct Prepared {
    enum Form { FLOATS, BFLOATS, BYTES, FORMS };

    Buffer<float> floats, scales;
    Buffer<std::uint16_t> bfloats;
    Buffer<std::int8_t> bytes;
    Buffer<std::int32_t> sums;
    Activations rows[FORMS];

    static Form form(Number kind) { return kind >= INT8 ? BYTES : kind == BFLOAT16 ? BFLOATS : FLOATS; }

    void reserve(Number kind, std::int64_t tokens, std::int64_t columns) {
        Activations& to = rows[form(kind)];
        const std::int64_t size = tokens * columns, blocks = size / BLOCK;
        if (form(kind) == FLOATS)
            to = {floats.reserve(size), nullptr, nullptr, columns};
        else if (form(kind) == BFLOATS)
            to = {bfloats.reserve(size), nullptr, nullptr, columns};
        else
            to = {bytes.reserve(size), scales.reserve(blocks), sums.reserve(SUMS * blocks), columns};
    }
};

struct Product {
    const Matrix* matrix;
    const float* bias;
    float* out;
};

struct Decoder {
    std::int64_t hidden, intermediate, layer_count, heads, kv_heads, head_dim, vocab;
    float eps;
    const Level* level;
    Pool pool;
    std::unique_ptr<Stretch[]> shares;  // of each worker in a product
    std::vector<Layer> layers;
    Embedding embedding{};
    Matrix head{};
    const float* final_norm = nullptr;
    Prepared prepared;
    Buffer<float> residual, normed, inner, added;  // `inner` is attention's, then the MLP's

    Decoder(const std::int64_t* shape, float epsilon, const Level* chosen, int threads)
        : hidden(shape[0]), intermediate(shape[1]), layer_count(shape[2]), heads(shape[3]), kv_heads(shape[4]),
          head_dim(shape[5]), vocab(shape[6]), eps(epsilon), level(chosen), pool(threads),
          shares(new Stretch[static_cast<std::size_t>(threads)]), layers(static_cast<std::size_t>(shape[2])) {}

    // A task a token, but one for a few: their norms take less than waking a thread.
    template <typename F>
    void each_token(std::int64_t tokens, const F& f) {
        const std::int64_t some = tokens < 8 ? 8 : 4, tasks = (tokens + some - 1) / some;
        pool.run(tasks, [&](std::int64_t task) {
            for (std::int64_t t = task * some; t < std::min(tokens, (task + 1) * some); ++t) f(t);
        });
    }

    // Products of the same rows, of which `fill` makes one at a time. `then` is told by which worker, one of as many as
    // there are threads, which rows of a matrix's product were made.
    template <typename Fill, typename Then = void (*)(std::int64_t, std::int64_t, std::int64_t)>
    void products(std::int64_t tokens, std::int64_t columns, const Product* list, int count, const Fill& fill,
                  const Then& then = [](std::int64_t, std::int64_t, std::int64_t) {}) {
        const Number* needed[Prepared::FORMS] = {};
        for (int i = 0; i < count; ++i) {
            const Number& kind = list[i].matrix->kind;
            prepared.reserve(kind, tokens, columns);
            needed[Prepared::form(kind)] = &kind;
        }
        each_token(tokens, [&](std::int64_t t) {
            const float* row = fill(t);
            for (int f = 0; f < Prepared::FORMS; ++f)
                if (needed[f]) level->prepare(*needed[f], row, prepared.rows[f], t);
        });
        multiply(tokens, list, count, then);
    }

    template <typename Then>
    void multiply(std::int64_t tokens, const Product* list, int count, const Then& then) {
        std::int64_t panels = 0, bytes = 0;
        for (int i = 0; i < count; ++i) {
            panels += list[i].matrix->panels();
            bytes += list[i].matrix->panels() * list[i].matrix->panel_bytes();
        }
        if (panels == 0) return;
        // Small pieces, that no worker waits long for another's last one; of many tokens a panel is enough for one.
        const std::int64_t threads = pool.threads(), least = tokens < MANY ? (PIECE_BYTES * panels + bytes - 1) / bytes : 1;
        const std::int64_t piece = threads == 1 ? panels : std::max(panels / (threads * MOST_PIECES), least);
        const auto make = [&](std::int64_t worker, std::int64_t from, std::int64_t to) {
            for (int i = 0; i < count && to > 0; ++i) {
                const Matrix& m = *list[i].matrix;
                const std::int64_t here = m.panels();
                if (from < here) {
                    const std::int64_t last = std::min(to, here);
                    level->multiply(m, prepared.rows[Prepared::form(m.kind)], tokens, from, last, list[i].out, m.rows);
                    const std::int64_t end = std::min(last * PANEL, m.rows);
                    if (list[i].bias) add_bias(list[i], tokens, from * PANEL, end);
                    then(worker, from * PANEL, end);
                }
                from = std::max<std::int64_t>(0, from - here);
                to -= here;
            }
        };
        for (std::int64_t w = 0; w < threads; ++w) shares[w].hold(w * panels / threads, (w + 1) * panels / threads);
        pool.run(std::min(threads, panels), [&](std::int64_t worker) {
            std::int64_t from, to;
            for (std::int64_t other = worker; other < worker + threads; ++other)
                while (shares[other % threads].take(piece, other != worker, &from, &to)) make(worker, from, to);
        });
    }

    static void add_bias(const Product& p, std::int64_t tokens, std::int64_t from, std::int64_t to) {
        for (std::int64_t t = 0; t < tokens; ++t)
            for (std::int64_t i = from; i < to; ++i) p.out[t * p.matrix->rows + i] += p.bias[i];
    }
};

// Turns queries and keys by their positions and keeps keys and values in their pages.
void keep_all(Decoder& d, const Step& s, float* q, float* k, const float* v) {
    const std::int64_t size = d.head_dim, q_row = d.heads * size, kv_row = d.kv_heads * size;
    d.each_token(s.tokens, [&](std::int64_t t) {
        const std::int64_t text = s.text_of[static_cast<std::size_t>(t)], position = s.positions[text] + t - s.starts[text];
        const Pages& page = s.pages_of(text)[position / PAGE];
        const float *cos = s.cos + position * size / 2, *sin = s.sin + position * size / 2;
        for (std::int64_t h = 0; h < d.heads; ++h) d.level->rotate(q + t * q_row + h * size, cos, sin, size);
        for (std::int64_t h = 0; h < d.kv_heads; ++h) {
            float* key = k + t * kv_row + h * size;
            d.level->rotate(key, cos, sin, size);
            d.level->keep(key, v + t * kv_row + h * size, page, h, position % PAGE, size);
        }
    });
}

// x + attention(norm(x)) but for the sum, which the MLP begins with.
void attention(Decoder& d, const Step& s, const Layer& layer) {
    const std::int64_t q_row = d.heads * d.head_dim, kv_row = d.kv_heads * d.head_dim;
    float* q = d.inner.reserve(2 * s.tokens * std::max(q_row + kv_row, d.intermediate));  // once for both: no gap is left
    float *k = q + s.tokens * q_row, *v = k + s.tokens * kv_row, *mixed = v + s.tokens * kv_row;
    float *x = d.residual.reserve(s.tokens * d.hidden), *normed = d.normed.reserve(s.tokens * d.hidden);
    const Product qkv[] = {{&layer.matrices[Q], layer.biases[Q], q},
                           {&layer.matrices[K], layer.biases[K], k},
                           {&layer.matrices[V], layer.biases[V], v}};
    d.products(s.tokens, d.hidden, qkv, 3, [&](std::int64_t t) {
        d.level->rms_norm(x + t * d.hidden, layer.attention_norm, d.hidden, d.eps, normed + t * d.hidden);
        return normed + t * d.hidden;
    });
    keep_all(d, s, q, k, v);
    d.pool.run(static_cast<std::int64_t>(s.tasks.size()), [&](std::int64_t n) {
        const Task& task = s.tasks[static_cast<std::size_t>(n)];
        const std::int64_t first = s.starts[task.text];
        const Attention text = {q + first * q_row, mixed + first * q_row, s.pages_of(task.text),
                                s.positions[task.text], d.heads, d.kv_heads, d.head_dim};
        d.level->attend(text, task.from, task.to, task.kv_head);
    });
    const Product o = {&layer.matrices[O], layer.biases[O], d.added.reserve(s.tokens * d.hidden)};
    d.products(s.tokens, q_row, &o, 1, [&](std::int64_t t) { return mixed + t * q_row; });
}

void mlp(Decoder& d, const Step& s, const Layer& layer) {
    float *x = d.residual.reserve(s.tokens * d.hidden), *added = d.added.reserve(s.tokens * d.hidden);
    float* normed = d.normed.reserve(s.tokens * d.hidden);
    float *gate = d.inner.reserve(2 * s.tokens * d.intermediate), *up = gate + s.tokens * d.intermediate;
    const Product both[] = {{&layer.matrices[GATE], layer.biases[GATE], gate},
                            {&layer.matrices[UP], layer.biases[UP], up}};
    d.products(s.tokens, d.hidden, both, 2, [&](std::int64_t t) {
        float* row = x + t * d.hidden;
        for (std::int64_t i = 0; i < d.hidden; ++i) row[i] += added[t * d.hidden + i];
        d.level->rms_norm(row, layer.mlp_norm, d.hidden, d.eps, normed + t * d.hidden);
        return normed + t * d.hidden;
    });
    const Product down = {&layer.matrices[DOWN], layer.biases[DOWN], added};
    d.products(s.tokens, d.intermediate, &down, 1, [&](std::int64_t t) {
        float* row = gate + t * d.intermediate;
        d.level->swiglu(row, up + t * d.intermediate, d.intermediate, row);
        return row;
    });
    d.each_token(s.tokens, [&](std::int64_t t) {
        float* row = x + t * d.hidden;
        for (std::int64_t i = 0; i < d.hidden; ++i) row[i] += added[t * d.hidden + i];
    });
}

// Which of two places in a row has the greater score, the first of equals; -1 once a score was no number.
std::int64_t better(const float* row, std::int64_t a, std::int64_t b) {
    if (a == NOT_MADE || b == NOT_MADE) return a == NOT_MADE ? b : a;
    if (a < 0 || b < 0) return -1;
    return row[b] > row[a] || (row[b] == row[a] && b < a) ? b : a;
}

// The wanted logits; what each worker has made of them is looked through while it is at hand.
void output(Decoder& d, const Step& s, const float* x, float* logits, std::int64_t* likeliest) {
    const std::int64_t count = s.wanted_count;
    float* normed = d.normed.reserve(count * d.hidden);
    std::vector<std::int64_t> found(static_cast<std::size_t>(d.pool.threads() * count), NOT_MADE);
    const Product head = {&d.head, nullptr, logits};
    const auto norm = [&](std::int64_t i) {
        d.level->rms_norm(x + s.wanted[i] * d.hidden, d.final_norm, d.hidden, d.eps, normed + i * d.hidden);
        return normed + i * d.hidden;
    };
    d.products(count, d.hidden, &head, 1, norm, [&](std::int64_t worker, std::int64_t from, std::int64_t to) {
        for (std::int64_t i = 0; i < count; ++i) {
            const float* row = logits + i * d.vocab;
            const std::int64_t at = d.level->likeliest(row + from, to - from);
            std::int64_t& best = found[static_cast<std::size_t>(worker * count + i)];
            best = better(row, best, at < 0 ? at : from + at);
        }
    });
    for (std::int64_t i = 0; i < count; ++i) {
        likeliest[i] = NOT_MADE;
        for (std::size_t n = static_cast<std::size_t>(i); n < found.size(); n += static_cast<std::size_t>(count))
            likeliest[i] = better(logits + i * d.vocab, likeliest[i], found[n]);
    }
}

}  // namespace

extern "C" {

// shape: hidden_size, intermediate_size, layers, heads, kv_heads, head_dim, vocab_size. Null when this CPU has no `level`.
void* camelid_decoder_new(const std::int64_t* shape, float eps, int threads, int level) {
    const Level* chosen = level_named(level);
    return chosen ? new Decoder(shape, eps, chosen, threads) : nullptr;
}

void camelid_decoder_free(void* handle) { delete static_cast<Decoder*>(handle); }

const char* camelid_decoder_level(int level) {
    const Level* chosen = level_named(level);
    return chosen ? chosen->name : "";
}

// rows [vocab, hidden], and of whole numbers what struct Embedding says; the others' pointers are null.
void camelid_decoder_embedding(void* handle, int kind, std::int64_t group, const void* rows, const std::uint16_t* scales,
                               const std::uint16_t* least) {
    static_cast<Decoder*>(handle)->embedding = {rows, static_cast<Number>(kind), group, scales, least};
}

// Which matrix: q, k, v, o, gate, up, down of a layer, or layer -1: the output projection.
void camelid_decoder_matrix(void* handle, std::int64_t layer, int which, int kind, std::int64_t rows, std::int64_t columns,
                            std::int64_t group, int zero, const std::uint8_t* packed, const float* bias) {
    Decoder& d = *static_cast<Decoder*>(handle);
    const Matrix m = {packed, rows, columns, group, static_cast<Number>(kind), static_cast<Zero>(zero)};
    if (layer < 0) {
        d.head = m;
        return;
    }
    d.layers[static_cast<std::size_t>(layer)].matrices[which] = m;
    d.layers[static_cast<std::size_t>(layer)].biases[which] = bias;
}

// 0: before attention, 1: before the MLP; of layer -1, the last norm.
void camelid_decoder_norm(void* handle, std::int64_t layer, int which, const float* weight) {
    Decoder& d = *static_cast<Decoder*>(handle);
    if (layer < 0)
        d.final_norm = weight;
    else
        (which ? d.layers[static_cast<std::size_t>(layer)].mlp_norm
               : d.layers[static_cast<std::size_t>(layer)].attention_norm) = weight;
}

// out [count, rows] = rows of floats [count, columns] times a packed matrix: for tests and for measuring.
void camelid_decoder_product(void* handle, int kind, std::int64_t rows, std::int64_t columns, std::int64_t group, int zero,
                             const std::uint8_t* packed, const float* by, std::int64_t count, float* out) {
    const Matrix m = {packed, rows, columns, group, static_cast<Number>(kind), static_cast<Zero>(zero)};
    const Product product = {&m, nullptr, out};
    Decoder& d = *static_cast<Decoder*>(handle);
    d.pool.together(
        [&] { d.products(count, columns, &product, 1, [&](std::int64_t t) { return by + t * columns; }); });
}

// numbers: as struct Step has them. logits [wanted_count, vocab] of the tokens `wanted`, and of each where it is greatest;
// -1 where one is no number.
void camelid_decoder_step(void* handle, const std::int64_t* numbers, const float* cos, const float* sin,
                          std::uint8_t* cache, float* logits, std::int64_t* likeliest) {
    Decoder& d = *static_cast<Decoder*>(handle);
    Step s(numbers, cos, sin, cache);
    s.lay_out(d.kv_heads, d.kv_heads * d.head_dim);
    float* x = d.residual.reserve(s.tokens * d.hidden);
    d.pool.together([&] {
        d.each_token(s.tokens, [&](std::int64_t t) { d.embedding.widen(s.ids[t], d.hidden, x + t * d.hidden); });
        for (std::int64_t n = 0; n < d.layer_count; ++n) {
            const Layer& layer = d.layers[static_cast<std::size_t>(n)];
            attention(d, s, layer);
            mlp(d, s, layer);
            s.to_next_layer();
        }
        if (s.wanted_count > 0) output(d, s, x, logits, likeliest);
    });
}

// The states of the last step's tokens, after the final norm: out [tokens, hidden].
void camelid_decoder_states(void* handle, std::int64_t tokens, float* out) {
    Decoder& d = *static_cast<Decoder*>(handle);
    const float* x = d.residual.reserve(tokens * d.hidden);  // it is there: nothing grows
    for (std::int64_t t = 0; t < tokens; ++t)
        d.level->rms_norm(x + t * d.hidden, d.final_norm, d.hidden, d.eps, out + t * d.hidden);
}
}
