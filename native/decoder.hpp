// What a decoding step is made of: matrices packed for reading in order, rows of activations, pages of keys and values.
//
// One rule holds throughout: each number comes out of one fixed sequence of operations, whatever else is computed beside
// it. So a token's logits are the same bits alone, in a batch, in any chunk of its prompt and on any number of threads.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int PANEL = 32;  // rows of a matrix that lie together, two registers of the widest kind
constexpr int BLOCK = 32;  // columns whose activations share a scale
constexpr int PAGE = 32;   // tokens of a page of the cache

enum Number { FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 };
enum Zero { MIDDLE, BYTES, LEASTS };  // what says which number means nothing

// A weight [rows, columns] as panels of 32 rows, the last one filled up with zeros.
//   FLOAT32   [columns][32 rows]; FLOAT16 likewise, multiplied as floats
//   BFLOAT16  [columns / 2][32 rows][2 columns]
//   INT8      of each group: scales, then [group / 4][32 rows][4 columns], each q + 128
//   INT4      of each group: scales, then [group / 8][32 rows][4 bytes]: the low halves are four columns, the high ones
//             the next four
// Scales are float16 [32 rows], a line of the cache. A weight is scale * (q - zero), with `zero` MIDDLE 128 of INT8 and 8
// of INT4, with BYTES the bytes [32 rows] of a second line; or, of INT4 with LEASTS, scale * q + least, with the float16
// [32 rows] of that line. So a panel is one stretch of memory that is read from its first byte to its last.
struct Matrix {
    const std::uint8_t* data;
    std::int64_t rows, columns, group;
    Number kind;
    Zero zero;

    std::int64_t scale_bytes() const { return kind < INT8 ? 0 : zero == MIDDLE ? 64 : 128; }  // before each group's data
    std::int64_t group_bytes() const {
        const std::int64_t halves[] = {8, 4, 4, 2, 1};
        return scale_bytes() + group * PANEL * halves[kind] / 2;
    }
    std::int64_t panel_bytes() const { return columns / group * group_bytes(); }
    std::int64_t panels() const { return (rows + PANEL - 1) / PANEL; }
    std::int64_t rows_of(std::int64_t panel) const { return rows - panel * PANEL < PANEL ? rows - panel * PANEL : PANEL; }
};

// Rows of activations in the form that a kind of matrix is multiplied by. Of INT8 and INT4: bytes, and of each block a
// scale and four words: the sums to start from, those of products of its bytes with INT8's zero and with INT4's, negated,
// and as floats what its bytes are worth together and what a started sum is worth too much, negated. Of the others only
// `values`, as they are or as bfloat16.
constexpr int SUMS = 4;
struct Activations {
    void* values;
    float* scales;
    std::int32_t* sums;
    std::int64_t columns;
};

// Keys and values of one layer's page: [kv_heads][head_dim][PAGE] and [kv_heads][PAGE][head_dim], as FLOAT32, BFLOAT16 or
// INT8. Of BFLOAT16 two neighbours of the middle dimension lie in one word, so that they are multiplied together. Of INT8,
// what a byte is worth: [kv_heads][PAGE] each.
struct Pages {
    void* keys;
    void* values;
    float* key_scales;
    float* value_scales;
    Number kind;
};

// The queries [tokens][heads][head_dim] of one text, from position `start` on; its pages in order.
struct Attention {
    const float* queries;
    float* out;
    const Pages* pages;
    std::int64_t start, heads, kv_heads, head_dim;
};

// The same functions, compiled for each kind of CPU.
struct Level {
    const char* name;
    void (*prepare)(Number kind, const float* row, const Activations& to, std::int64_t at);
    void (*multiply)(const Matrix& matrix, const Activations& by, std::int64_t tokens, std::int64_t panel_from,
                     std::int64_t panel_to, float* out, std::int64_t out_row);
    void (*rms_norm)(const float* row, const float* weight, std::int64_t size, float eps, float* out);
    void (*swiglu)(const float* gate, const float* up, std::int64_t size, float* out);
    void (*rotate)(float* head, const float* cos, const float* sin, std::int64_t head_dim);
    void (*keep)(const float* key, const float* value, const Pages& page, std::int64_t kv_head, std::int64_t slot,
                 std::int64_t head_dim);
    void (*attend)(const Attention& text, std::int64_t token_from, std::int64_t token_to, std::int64_t kv_head);
    std::int64_t (*likeliest)(const float* scores, std::int64_t size);  // the first of the greatest; -1: one is no number
};

const Level* level_plain();
const Level* level_avx2();
const Level* level_avx512();
const Level* level_avx512_bf16();
const Level* level_amx();  // null where there are no tiles; to be asked only where there is level_avx512_bf16
const Level* level_amx_simulated();
const Level* level_neon();  // null where there is none
