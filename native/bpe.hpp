// Byte-pair encoding: merges by rank, a cache of pieces, and the tokenizer over both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
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

// A piece of up to MOST bytes as three words: the bytes, and the length in the last one's top byte.
struct PieceKey {
    static constexpr int64_t MOST = 23;
    uint64_t a, b, c;

    bool operator==(const PieceKey& o) const { return a == o.a && b == o.b && c == o.c; }
    uint64_t hash() const {
        uint64_t h = (a ^ (b * 0x9fb21c651e98df25ull)) + c * 0xd6e8feb86659fd93ull;
        h ^= h >> 32;
        h *= 0xd6e8feb86659fd93ull;
        return h ^ (h >> 29);
    }
};

// Which bits of three words a piece of so many bytes fills.
struct KeyMasks {
    uint64_t words[PieceKey::MOST + 1][3];
    constexpr KeyMasks() : words() {
        for (int64_t size = 0; size <= PieceKey::MOST; size++)
            for (int64_t byte = 0; byte < size; byte++) words[size][byte / 8] |= 0xffull << (8 * (byte % 8));
    }
};
constexpr KeyMasks KEY_MASKS;

// `room`: readable bytes from `piece` on, at least `size`.
inline PieceKey piece_key(const uint8_t* piece, int64_t size, int64_t room) {
    uint8_t padded[24];
    if (room < 24) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, piece, size_t(size));
        piece = padded;
    }
    uint64_t words[3];
    std::memcpy(words, piece, 24);
    const uint64_t* mask = KEY_MASKS.words[size];
    return {words[0] & mask[0], words[1] & mask[1], (words[2] & mask[2]) | uint64_t(size) << 56};
}

// What short pieces became, in bounded memory: two places a key, the older gives way.
class PieceCache {
  public:
    PieceCache() : buckets_(BUCKETS) {}

    void prefetch(uint64_t hash) const { __builtin_prefetch(&buckets_[hash & (BUCKETS - 1)]); }

    // Writes the ids of a piece at `out` and returns how many; -1 when it is not known.
    int64_t get(const PieceKey& key, uint64_t hash, uint32_t* out) const {
        for (const Slot& slot : buckets_[hash & (BUCKETS - 1)].slots) {
            if (!(slot.key == key)) continue;
            if (slot.count == 1) out[0] = slot.first;
            else std::copy_n(&pool_[slot.first], slot.count, out);
            return slot.count;
        }
        return -1;
    }

    void put(const PieceKey& key, uint64_t hash, const uint32_t* ids, size_t count) {
        if (pool_.size() > POOL) {
            pool_.clear();
            std::fill(buckets_.begin(), buckets_.end(), Bucket{});
        }
        Bucket& bucket = buckets_[hash & (BUCKETS - 1)];
        bucket.slots[1] = bucket.slots[0];
        bucket.slots[0] = {key, uint32_t(count == 1 ? ids[0] : pool_.size()), uint32_t(count)};
        if (count != 1) pool_.insert(pool_.end(), ids, ids + count);
    }

  private:
    static constexpr size_t BUCKETS = 1 << 17, POOL = 1 << 22;
    struct Slot {
        PieceKey key{0, 0, 0};
        uint32_t first = 0, count = 0;  // the id when there is one, else where they begin in the pool
    };
    struct alignas(64) Bucket {
        Slot slots[2];
    };
    std::vector<Bucket> buckets_;
    std::vector<uint32_t> pool_;
};

// What one thread needs, kept from call to call.
struct Worker {
    PieceCache cache;
    std::unordered_map<std::string, std::vector<uint32_t>> longer;  // pieces too long for the cache
    std::vector<uint32_t> out, ids;
    size_t used = 0;  // of `out`
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

    std::unique_ptr<Worker> take_worker();
    void give_back(std::unique_ptr<Worker> worker);

  private:
    void learn_pairs();
    void symbols(const uint8_t* piece, int64_t size, std::vector<uint32_t>& ids) const;
    void encode_unknown(Worker& w, const uint8_t* piece, int64_t size) const;
    void encode_longer(Worker& w, const uint8_t* piece, int64_t size) const;
    template <typename Next>
    void encode_pieces(Worker& w, const uint8_t* text, int64_t size, Next next) const;
    int64_t whole_piece(const uint8_t* text, int64_t size, int64_t begin) const;

    PairMap merges_, pairs_;
    std::unordered_map<std::string, uint32_t> vocabulary_;
    bool ascii_pairs_[128][128] = {};
    std::mutex lock_;
    std::vector<std::unique_ptr<Worker>> idle_;
};

}  // namespace camelid
