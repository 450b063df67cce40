// Learning merges (Sennrich et al. 2016) from counted pieces: the commonest pair of neighbours becomes a token, the
// smallest ids first among equals, as the trainer of the `tokenizers` library does it.
#include <algorithm>
#include <cstring>
#include <queue>

#include "bpe.hpp"
#include "share.hpp"

namespace camelid {
namespace {

constexpr int64_t LONGEST = 4096;  // bytes; longer pieces teach nothing and cost much

// Pieces and how often they were seen.
class PieceCounter {
  public:
    // `room`: readable bytes from `piece` on.
    void add(const uint8_t* piece, int64_t size, int64_t room, int64_t times) {
        if (size > LONGEST) {
            skipped++;
        } else if (size > PieceKey::MOST) {
            longer_[std::string(reinterpret_cast<const char*>(piece), size_t(size))] += times;
        } else {
            PieceKey key = piece_key(piece, size, room);
            Slot& slot = find(key);
            if (!slot.count) {
                slot.key = key;
                used_++;
            }
            slot.count += times;
            if (used_ * 2 > slots_.size()) resize(slots_.size() * 2);
        }
    }

    template <typename Visit>
    void each(Visit visit) const {
        for (const Slot& slot : slots_)
            if (slot.count) {
                uint8_t bytes[24];
                std::memcpy(bytes, &slot.key, 24);
                visit(bytes, int64_t(slot.key.c >> 56), slot.count);
            }
        for (const auto& [text, count] : longer_) visit(reinterpret_cast<const uint8_t*>(text.data()), int64_t(text.size()), count);
    }

    int64_t skipped = 0;

  private:
    struct Slot {
        PieceKey key{0, 0, 0};
        int64_t count = 0;
    };

    Slot& find(const PieceKey& key) {
        size_t mask = slots_.size() - 1;
        for (size_t at = key.hash() & mask;; at = (at + 1) & mask)
            if (!slots_[at].count || slots_[at].key == key) return slots_[at];
    }

    void insert(const Slot& slot) {
        find(slot.key) = slot;
        used_++;
    }

    void resize(size_t size) {
        std::vector<Slot> old;
        old.swap(slots_);
        slots_.resize(size);
        used_ = 0;
        for (const Slot& slot : old)
            if (slot.count) insert(slot);
    }

    std::vector<Slot> slots_ = std::vector<Slot>(1 << 12);
    size_t used_ = 0;
    std::unordered_map<std::string, int64_t> longer_;
};

struct Counters {
    std::vector<PieceCounter> parts;
};

struct Pair {
    int64_t count;
    uint64_t key;  // left << 32 | right
    bool operator<(const Pair& other) const { return count != other.count ? count < other.count : key > other.key; }
};

struct Where {
    int64_t count = 0;
    std::vector<uint32_t> words;  // that held the pair when it was last counted up
};

class Trainer {
  public:
    // foreign_only: every new token holds a byte beyond ASCII, so that ASCII text is encoded as before.
    Trainer(const Bpe& base, std::vector<std::string> tokens, bool foreign_only)
        : base_(base), tokens_(std::move(tokens)), foreign_only_(foreign_only) {
        for (size_t i = 0; i < tokens_.size(); i++) {
            if (!tokens_[i].empty()) ids_.emplace(tokens_[i], uint32_t(i));
            kinds_.push_back(kind_of(tokens_[i]));
        }
    }

    void read(const PieceCounter& counter) {
        std::vector<uint32_t> ids;
        counter.each([&](const uint8_t* piece, int64_t size, int64_t count) {
            base_.symbols_of(piece, size, ids);
            if (ids.size() < 2) return;
            begins_.push_back(symbols_.size());
            sizes_.push_back(uint32_t(ids.size()));
            counts_.push_back(count);
            symbols_.insert(symbols_.end(), ids.begin(), ids.end());
        });
    }

    // Merges until there are `vocab_size` tokens; rows (left, right, result).
    std::vector<uint32_t> run(size_t vocab_size, int64_t least) {
        count_pairs();
        std::vector<uint32_t> rows;
        std::vector<uint64_t> fresh;
        while (tokens_.size() < vocab_size && !queue_.empty()) {
            Pair top = queue_.top();
            queue_.pop();
            Where& where = pairs_[top.key];
            if (where.count != top.count) {  // it lost neighbours since
                if (where.count > 0) queue_.push({where.count, top.key});
                continue;
            }
            if (top.count < least) break;
            uint32_t left = uint32_t(top.key >> 32), right = uint32_t(top.key), result = token(left, right);
            rows.insert(rows.end(), {left, right, result});
            std::vector<uint32_t> words;
            words.swap(where.words);
            where.count = 0;
            fresh.clear();
            for (uint32_t word : words) merge_in(word, left, right, result, fresh);
            std::sort(fresh.begin(), fresh.end());
            fresh.erase(std::unique(fresh.begin(), fresh.end()), fresh.end());
            for (uint64_t key : fresh) {
                auto found = pairs_.find(key);
                if (found != pairs_.end() && found->second.count > 0) queue_.push({found->second.count, key});
            }
        }
        return rows;
    }

  private:
    uint32_t token(uint32_t left, uint32_t right) {
        auto [at, is_new] = ids_.emplace(tokens_[left] + tokens_[right], uint32_t(tokens_.size()));
        if (is_new) {
            tokens_.push_back(at->first);
            kinds_.push_back(kind_of(at->first));
        }
        return at->second;
    }

    enum Kind : uint8_t { FIXED, ASCII, FOREIGN };

    // A token without text (the byte of a SentencePiece vocabulary, a control token) is never part of another.
    static Kind kind_of(const std::string& token) {
        if (token.empty()) return FIXED;
        for (size_t i = 0; i < token.size(); i++) {
            if (token.compare(i, 3, "\xe2\x96\x81") == 0) i += 2;  // ▁ is a blank
            else if (uint8_t(token[i]) >= 0x80) return FOREIGN;
        }
        return ASCII;
    }

    bool may_merge(uint32_t left, uint32_t right) const {
        if (kinds_[left] == FIXED || kinds_[right] == FIXED) return false;
        return !foreign_only_ || kinds_[left] == FOREIGN || kinds_[right] == FOREIGN;
    }

    void add(uint32_t left, uint32_t right, uint32_t word, int64_t count) {
        if (!may_merge(left, right)) return;
        Where& where = pairs_[uint64_t(left) << 32 | right];
        where.count += count;
        if (where.words.empty() || where.words.back() != word) where.words.push_back(word);
    }

    void count_pairs() {
        for (size_t word = 0; word < counts_.size(); word++) {
            const uint32_t* s = &symbols_[begins_[word]];
            for (uint32_t i = 0; i + 1 < sizes_[word]; i++) add(s[i], s[i + 1], uint32_t(word), counts_[word]);
        }
        for (const auto& [key, where] : pairs_) queue_.push({where.count, key});
    }

    void merge_in(uint32_t word, uint32_t left, uint32_t right, uint32_t result, std::vector<uint64_t>& fresh) {
        uint32_t* s = &symbols_[begins_[word]];
        uint32_t size = sizes_[word];
        int64_t count = counts_[word];
        uint32_t to = 0;
        for (uint32_t i = 0; i < size; to++) {
            if (i + 1 < size && s[i] == left && s[i + 1] == right) {
                if (to > 0) {
                    lose(s[to - 1], left, count);
                    add(s[to - 1], result, word, count);
                    fresh.push_back(uint64_t(s[to - 1]) << 32 | result);
                }
                if (i + 2 < size) {
                    lose(right, s[i + 2], count);
                    add(result, s[i + 2], word, count);
                    fresh.push_back(uint64_t(result) << 32 | s[i + 2]);
                }
                s[to] = result;
                i += 2;
            } else {
                s[to] = s[i++];
            }
        }
        sizes_[word] = to;
    }

    void lose(uint32_t left, uint32_t right, int64_t count) {
        auto found = pairs_.find(uint64_t(left) << 32 | right);
        if (found != pairs_.end()) found->second.count -= count;
    }

    struct Hash {
        size_t operator()(uint64_t key) const { return size_t(mix(key)); }
    };

    const Bpe& base_;
    std::vector<std::string> tokens_;
    std::vector<Kind> kinds_;
    bool foreign_only_;
    std::unordered_map<std::string, uint32_t> ids_;
    std::vector<uint32_t> symbols_, sizes_;
    std::vector<size_t> begins_;
    std::vector<int64_t> counts_;
    std::unordered_map<uint64_t, Where, Hash> pairs_;
    std::priority_queue<Pair> queue_;
};

}  // namespace

void Bpe::symbols_of(const uint8_t* piece, int64_t size, std::vector<uint32_t>& ids) const {
    ids.clear();
    symbols(piece, size, ids);
    merge(merges_, ids);
}

}  // namespace camelid

extern "C" {

void* camelid_pieces_new(int32_t threads) {
    return new camelid::Counters{std::vector<camelid::PieceCounter>(size_t(std::max(1, threads)))};
}

void camelid_pieces_free(void* handle) { delete static_cast<camelid::Counters*>(handle); }

// Counts the pieces of texts; returns how many pieces were too long to be counted, so far.
int64_t camelid_pieces_count(void* handle, const uint8_t* texts, const int64_t* offsets, int64_t count, int32_t split) {
    auto& parts = static_cast<camelid::Counters*>(handle)->parts;
    int64_t threads = int64_t(parts.size());
    auto work = [&](int64_t t) {
        camelid::PieceCounter& counter = parts[size_t(t)];
        for (int64_t i = t; i < count; i += threads) {
            const uint8_t* text = texts + offsets[i];
            int64_t size = offsets[i + 1] - offsets[i];
            camelid::Splitter splitter(camelid::Split(split), text, size);
            for (int64_t at = 0; at < size;) {
                int64_t end = splitter.next(at);
                counter.add(text + at, end - at, size - at, 1);
                at = end;
            }
        }
    };
    on_own_threads(threads, work);
    int64_t skipped = 0;
    for (const auto& part : parts) skipped += part.skipped;
    return skipped;
}

// Learns merges on top of a tokenizer's: `tokens` are the bytes of its ids, empty for one that must not be merged. Writes rows (left, right, result) into
// `rows`, which has room for `room` of them, and returns how many there are.
int64_t camelid_bpe_train(void* pieces, void* base, const uint8_t* tokens, const int64_t* offsets, int64_t token_count,
                          int64_t vocab_size, int64_t least, int32_t foreign_only, uint32_t* rows, int64_t room) {
    auto& parts = static_cast<camelid::Counters*>(pieces)->parts;
    for (size_t t = 1; t < parts.size(); t++) {
        parts[t].each([&](const uint8_t* piece, int64_t size, int64_t times) { parts[0].add(piece, size, size, times); });
        parts[t] = camelid::PieceCounter();  // its pieces are in the first one now
    }
    std::vector<std::string> texts;
    for (int64_t i = 0; i < token_count; i++)
        texts.emplace_back(reinterpret_cast<const char*>(tokens + offsets[i]), size_t(offsets[i + 1] - offsets[i]));
    camelid::Trainer trainer(*static_cast<const camelid::Bpe*>(base), std::move(texts), foreign_only != 0);
    trainer.read(parts[0]);
    std::vector<uint32_t> learned = trainer.run(size_t(vocab_size), least);
    int64_t count = std::min(room, int64_t(learned.size() / 3));
    std::copy(learned.begin(), learned.begin() + 3 * count, rows);
    return count;
}
}
