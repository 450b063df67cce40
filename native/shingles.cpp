// Word shingles and MinHash (Broder 1997); the reference is camelid/corpus/shingles.py.
#include <algorithm>
#include <cstring>

#include "text.hpp"

namespace camelid {
namespace {

// Hashes of the words (runs of letters, digits and marks; single characters of solid scripts), lower-cased.
void word_hashes(const uint8_t* text, int64_t size, std::vector<uint64_t>& out) {
    out.clear();
    constexpr uint64_t seed = 0x9e3779b97f4a7c15ull, prime = 0x100000001b3ull;
    uint64_t h = seed;
    bool inside = false;
    for (int64_t at = 0; at < size;) {
        uint32_t c;
        at += next_point(text, at, size, c);
        uint8_t k = class_of(c);
        if (k & SOLID) {
            if (inside) out.push_back(mix(h));
            out.push_back(mix((seed ^ lower_of(c)) * prime));
            h = seed;
            inside = false;
        } else if (k & (LETTER | DIGIT | MARK)) {
            h = (h ^ lower_of(c)) * prime;
            inside = true;
        } else if (inside) {
            out.push_back(mix(h));
            h = seed;
            inside = false;
        }
    }
    if (inside) out.push_back(mix(h));
}

constexpr int WIDTH = 64;

#ifdef __x86_64__
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

// min over shingles of (shingle * a + b) mod 2^32, for WIDTH permutations at a time, kept in registers.
CLONES void minimise(
    const uint32_t* shingles, int64_t count, const uint32_t* a, const uint32_t* b, uint32_t* out) {
    uint32_t least[WIDTH];
    for (int k = 0; k < WIDTH; k++) least[k] = 0xffffffffu;
    for (int64_t i = 0; i < count; i++) {
        uint32_t s = shingles[i];
        for (int k = 0; k < WIDTH; k++) {
            uint32_t value = s * a[k] + b[k];
            least[k] = value < least[k] ? value : least[k];
        }
    }
    for (int k = 0; k < WIDTH; k++) out[k] = least[k];
}

}  // namespace
}  // namespace camelid

extern "C" {

// Sorted distinct 32-bit hashes of the `n`-word shingles of each text; a text of fewer words is one shingle. `out`
// has room for one per byte of text.
void camelid_shingles(const uint8_t* texts, const int64_t* offsets, int64_t count, int32_t n, uint32_t* out,
                      int64_t* out_offsets) {
    std::vector<uint64_t> words;
    int64_t at = out_offsets[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        camelid::word_hashes(texts + offsets[i], offsets[i + 1] - offsets[i], words);
        int64_t size = int64_t(words.size()), begin = at;
        if (size && size < n) out[at++] = uint32_t(camelid::joined(words.data(), size) >> 32);
        for (int64_t k = 0; k + n <= size; k++) out[at++] = uint32_t(camelid::joined(words.data() + k, n) >> 32);
        std::sort(out + begin, out + at);
        out_offsets[i + 1] = at = int64_t(std::unique(out + begin, out + at) - out);
    }
}

// 64-bit hashes of the `n`-word sequences of each text, in order: for finding given ones. Room as above.
void camelid_sequences(const uint8_t* texts, const int64_t* offsets, int64_t count, int32_t n, uint64_t* out,
                       int64_t* out_offsets) {
    std::vector<uint64_t> words;
    int64_t at = out_offsets[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        camelid::word_hashes(texts + offsets[i], offsets[i + 1] - offsets[i], words);
        for (int64_t k = 0; k + n <= int64_t(words.size()); k++) out[at++] = camelid::joined(words.data() + k, n);
        out_offsets[i + 1] = at;
    }
}

// Signatures: uint32 [count, permutations]; `permutations` is a multiple of 64.
void camelid_minhash(const uint32_t* shingles, const int64_t* offsets, int64_t count, const uint32_t* a,
                     const uint32_t* b, int32_t permutations, uint32_t* out) {
    for (int64_t i = 0; i < count; i++)
        for (int32_t k = 0; k < permutations; k += camelid::WIDTH)
            camelid::minimise(shingles + offsets[i], offsets[i + 1] - offsets[i], a + k, b + k,
                              out + i * permutations + k);
}

// How many of two sorted sets' elements are common, for `count` pairs given by address and size.
void camelid_common(const uint32_t* const* left, const int64_t* left_sizes, const uint32_t* const* right,
                    const int64_t* right_sizes, int64_t count, int64_t* out) {
    for (int64_t p = 0; p < count; p++) {
        const uint32_t *x = left[p], *y = right[p], *x_end = x + left_sizes[p], *y_end = y + right_sizes[p];
        int64_t common = 0;
        while (x < x_end && y < y_end) {
            common += *x == *y;
            bool advance_x = *x <= *y, advance_y = *y <= *x;
            x += advance_x;
            y += advance_y;
        }
        out[p] = common;
    }
}
}
