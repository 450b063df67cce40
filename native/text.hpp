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
