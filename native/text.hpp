// Reading UTF-8 as the Python side does: code points, their classes, words.
//
// The class and lower-case tables come from Python (camelid/corpus/characters.py), the word rules mirror
// camelid/corpus/words.py; tests hold the two equal.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace camelid {

enum : uint8_t { LETTER = 1, DIGIT = 2, SPACE = 4, SOLID = 8, SYMBOL = 16, MARK = 32, STOP = 64, BREAK = 128 };

constexpr uint32_t LIMIT = 0x20000;

extern uint8_t class_table[LIMIT];
extern uint32_t lower_table[LIMIT];

inline uint8_t class_of(uint32_t c) {
    if (c < LIMIT) return class_table[c];
    return c < 0x3fffe ? uint8_t(LETTER | SOLID) : uint8_t(0);
}

inline uint32_t lower_of(uint32_t c) { return c < LIMIT ? lower_table[c] : c; }

// The code point that begins at `at` in valid UTF-8; returns how many bytes it takes.
inline int next_point(const uint8_t* text, int64_t at, int64_t size, uint32_t& c) {
    c = text[at];
    int length = c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    if (at + length > size) length = int(size - at);
    if (length == 2) c = (c & 31) << 6 | (text[at + 1] & 63);
    else if (length == 3) c = (c & 15) << 12 | (text[at + 1] & 63) << 6 | (text[at + 2] & 63);
    else if (length == 4) c = (c & 7) << 18 | (text[at + 1] & 63) << 12 | (text[at + 2] & 63) << 6 | (text[at + 3] & 63);
    return length;
}

// Code points of valid UTF-8, with where each begins in bytes; one entry past the end.
struct Text {
    std::vector<uint32_t> points;
    std::vector<uint8_t> classes;
    std::vector<int32_t> bytes;

    void read(const uint8_t* text, int64_t size);
    int64_t size() const { return int64_t(points.size()); }
};

struct Word {
    int32_t begin, end;  // in code points
};

// The words of points [begin, end), appended to `out`.
void find_words(const Text& text, int32_t begin, int32_t end, std::vector<Word>& out);

inline uint64_t mix(uint64_t h) {
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93ull;
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93ull;
    return h ^ (h >> 32);
}

// A 64-bit hash of code points; the same arithmetic stands in camelid/corpus/shingles.py.
inline uint64_t hash_points(const uint32_t* points, int64_t count, bool lower) {
    uint64_t h = 0x9e3779b97f4a7c15ull;
    for (int64_t i = 0; i < count; i++) h = (h ^ (lower ? lower_of(points[i]) : points[i])) * 0x100000001b3ull;
    return mix(h);
}

// A 64-bit hash of `n` words in a row, given by their hashes.
inline uint64_t joined(const uint64_t* hashes, int64_t n) {
    uint64_t h = uint64_t(n);
    for (int64_t k = 0; k < n; k++) h = (h ^ hashes[k]) * 0x9fb21c651e98df25ull;
    return mix(h);
}

// Counts 64-bit keys; emptied in constant time between documents.
class Counter {
  public:
    void reset(size_t expected);
    // The count of `key` after adding one.
    uint32_t add(uint64_t key);
    uint32_t count(uint64_t key) const;

  private:
    struct Slot {
        uint64_t key;
        uint32_t count, epoch;
    };
    std::vector<Slot> slots_;
    uint32_t epoch_ = 0;
    size_t mask_ = 0;
};

}  // namespace camelid
