// Byte-pair encoding: merges by rank, a cache of pieces, and the tokenizer over both.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "split.hpp"

namespace camelid {

constexpr uint32_t NONE = 0xffffffffu;
constexpr uint32_t BLOCK = 0x2581;  // ▁, what SentencePiece writes for a blank

struct Merge {
    uint32_t rank, result;
};

// (left, right) -> merge; never shrinks.
class PairMap {
  public:
    PairMap() { reserve(0); }
    void reserve(size_t pairs);
    void set(uint32_t left, uint32_t right, uint32_t rank, uint32_t result);

    const Merge* find(uint32_t left, uint32_t right) const {
        uint64_t key = uint64_t(left) << 32 | right;
        for (size_t at = mix(key) & mask_;; at = (at + 1) & mask_) {
            if (slots_[at].key == key) return &slots_[at].merge;
            if (slots_[at].key == EMPTY) return nullptr;
        }
    }

  private:
    static constexpr uint64_t EMPTY = ~0ull;
    struct Slot {
        uint64_t key;
        Merge merge;
        Slot(uint64_t k, uint32_t rank, uint32_t result) : key(k), merge{rank, result} {}
    };
    std::vector<Slot> slots_;
    size_t mask_ = 0;
};

// Applies merges to symbols until none is left: best rank first, leftmost of equals.
void merge(const PairMap& merges, std::vector<uint32_t>& ids);

// What short pieces became, in bounded memory.
class PieceCache {
  public:
    static constexpr int64_t MOST = 23;  // bytes of a piece

    struct Key {
        uint64_t a, b, c;  // the bytes, and the length in the last one
    };

    PieceCache() : slots_(SLOTS) {}
    static Key key(const uint8_t* piece, int64_t size);
    bool get(const Key& k, std::vector<uint32_t>& out);
    void put(const Key& k, const uint32_t* ids, size_t count);

  private:
    static constexpr size_t SLOTS = 1 << 16, POOL = 1 << 22;
    struct Slot {
        Key key{};
        uint32_t first = 0, count = 0;  // the id when there is one, else where they begin in the pool
    };
    static size_t place(const Key& k) {
        uint64_t h = (k.a ^ (k.b * 0x9fb21c651e98df25ull)) + k.c * 0xd6e8feb86659fd93ull;
        h ^= h >> 32;
        h *= 0xd6e8feb86659fd93ull;
        return (h >> 40) & (SLOTS - 1);
    }
    std::vector<Slot> slots_;
    std::vector<uint32_t> pool_;
};

struct Worker {
    PieceCache cache;
    std::vector<uint32_t> out, ids;
    std::string text;
};

class Bpe {
  public:
    Split split = WHOLE;
    bool ignore_merges = false;  // a piece that is a token is that token
    bool prefix_blank = false;
    uint32_t byte_ids[256];

    void add_token(std::string text, uint32_t id);
    void set_merges(const uint32_t* rows, int64_t count);
    void finish();
    // Appends the ids of a text to the worker's.
    void encode(Worker& w, const uint8_t* text, int64_t size) const;
    // The ids of one piece, as it is merged (never looked up whole).
    void symbols_of(const uint8_t* piece, int64_t size, std::vector<uint32_t>& ids) const;

  private:
    void learn_pairs();
    void symbols(const uint8_t* piece, int64_t size, std::vector<uint32_t>& ids) const;
    void encode_piece(Worker& w, const uint8_t* piece, int64_t size) const;
    void encode_whole(Worker& w, const uint8_t* text, int64_t size) const;

    PairMap merges_, pairs_;
    std::unordered_map<std::string, uint32_t> vocabulary_;
    bool ascii_pairs_[128][128] = {};
};

}  // namespace camelid
