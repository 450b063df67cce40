// Byte-pair encoding of many texts, with a table of pieces met before. Equal, id for id, to the BPE model of the
// `tokenizers` library, which is the reference (camelid/tokenizer/native.py says for which tokenizers).
#include "bpe.hpp"

#include <algorithm>
#include <cstring>
#include <queue>

#include "share.hpp"

namespace camelid {

void PairMap::reserve(size_t pairs) {
    size_t size = 64;
    while (size < pairs * 2) size *= 2;
    slots_.assign(size, Slot{EMPTY, 0, 0});
    mask_ = size - 1;
}

void PairMap::set(uint32_t left, uint32_t right, uint32_t rank, uint32_t result) {
    uint64_t key = uint64_t(left) << 32 | right;
    size_t at = mix(key) & mask_;
    while (slots_[at].key != EMPTY && slots_[at].key != key) at = (at + 1) & mask_;
    slots_[at] = {key, rank, result};
}

namespace {

constexpr size_t SHORT = 48;  // symbols; longer pieces are merged with a heap

// Merges the best-ranked pair, the first of equals, until none is left. Quadratic, and fast for a few symbols.
void merge_short(const PairMap& merges, std::vector<uint32_t>& ids) {
    const Merge* found[SHORT];
    size_t count = ids.size();
    for (size_t i = 0; i + 1 < count; i++) found[i] = merges.find(ids[i], ids[i + 1]);
    while (count > 1) {
        size_t best = count;
        uint32_t rank = NONE;
        for (size_t i = 0; i + 1 < count; i++)
            if (found[i] && found[i]->rank < rank) {
                rank = found[i]->rank;
                best = i;
            }
        if (best == count) break;
        ids[best] = found[best]->result;
        std::move(ids.begin() + best + 2, ids.begin() + count, ids.begin() + best + 1);
        std::move(found + best + 2, found + count, found + best + 1);
        count--;
        if (best > 0) found[best - 1] = merges.find(ids[best - 1], ids[best]);
        if (best + 1 < count) found[best] = merges.find(ids[best], ids[best + 1]);
    }
    ids.resize(count);
}

struct Candidate {
    uint32_t rank;
    int64_t at;
    uint32_t left, right;
    bool operator<(const Candidate& other) const {
        return rank != other.rank ? rank > other.rank : at > other.at;
    }
};

// The same with a heap: n log n for a piece of any length.
void merge_long(const PairMap& merges, std::vector<uint32_t>& ids) {
    int64_t size = int64_t(ids.size());
    std::vector<int64_t> next(ids.size()), before(ids.size());
    std::priority_queue<Candidate> queue;
    auto push = [&](int64_t at) {
        if (at < 0 || next[at] >= size) return;
        if (const Merge* m = merges.find(ids[at], ids[next[at]])) queue.push({m->rank, at, ids[at], ids[next[at]]});
    };
    for (int64_t i = 0; i < size; i++) {
        next[i] = i + 1;
        before[i] = i - 1;
    }
    for (int64_t i = 0; i + 1 < size; i++) push(i);
    while (!queue.empty()) {
        Candidate c = queue.top();
        queue.pop();
        if (ids[c.at] != c.left || next[c.at] >= size || ids[next[c.at]] != c.right) continue;  // merged meanwhile
        int64_t gone = next[c.at];
        ids[c.at] = merges.find(c.left, c.right)->result;
        ids[gone] = NONE;
        next[c.at] = next[gone];
        if (next[gone] < size) before[next[gone]] = c.at;
        push(before[c.at]);
        push(c.at);
    }
    ids.erase(std::remove(ids.begin(), ids.end(), NONE), ids.end());
}

}  // namespace

void merge(const PairMap& merges, std::vector<uint32_t>& ids) {
    if (ids.size() <= SHORT) merge_short(merges, ids);
    else merge_long(merges, ids);
}

void Bpe::add_token(std::string text, uint32_t id) { vocabulary_.emplace(std::move(text), id); }

void Bpe::set_merges(const uint32_t* rows, int64_t count) {
    merges_.reserve(size_t(count));
    for (int64_t i = 0; i < count; i++) merges_.set(rows[3 * i], rows[3 * i + 1], uint32_t(i), rows[3 * i + 2]);
}

// Two characters that stand side by side in no token are never merged across: text may be cut between them.
void Bpe::learn_pairs() {
    for (const auto& [text, id] : vocabulary_) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
        uint32_t last = 0;
        for (int64_t at = 0, size = int64_t(text.size()); at < size;) {
            uint32_t c;
            int length = next_point(bytes, at, size, c);
            if (at) pairs_.set(last, c, 0, 0);
            last = c;
            at += length;
        }
    }
}

void Bpe::finish() {
    if (split != WHOLE) return;
    size_t characters = 0;
    for (const auto& [text, id] : vocabulary_) characters += text.size();
    pairs_.reserve(characters);
    learn_pairs();
    for (uint32_t a = 0; a < 128; a++)
        for (uint32_t b = 0; b < 128; b++)
            ascii_pairs_[a][b] = pairs_.find(a == ' ' ? BLOCK : a, b == ' ' ? BLOCK : b) != nullptr;
}

void Bpe::symbols(const uint8_t* piece, int64_t size, std::vector<uint32_t>& ids) const {
    for (int64_t at = 0; at < size;) {
        int64_t length = 1;
        if (split == WHOLE) {
            uint32_t c;
            length = next_point(piece, at, size, c);
            bool space = c == ' ';
            auto found = vocabulary_.find(space ? "\xe2\x96\x81" : std::string(reinterpret_cast<const char*>(piece) + at, size_t(length)));
            if (found != vocabulary_.end()) {
                ids.push_back(found->second);
                at += length;
                continue;
            }
        }
        for (int64_t i = at; i < at + length; i++)
            if (byte_ids[piece[i]] != NONE) ids.push_back(byte_ids[piece[i]]);
        at += length;
    }
}

void Bpe::encode_unknown(Worker& w, const uint8_t* piece, int64_t size) const {
    w.ids.clear();
    auto whole = vocabulary_.end();
    if (ignore_merges) whole = vocabulary_.find(std::string(reinterpret_cast<const char*>(piece), size_t(size)));
    if (whole != vocabulary_.end()) {
        w.ids.push_back(whole->second);
    } else {
        symbols(piece, size, w.ids);
        merge(merges_, w.ids);
    }
}

void Bpe::encode_longer(Worker& w, const uint8_t* piece, int64_t size) const {
    constexpr int64_t WORTH = 256;  // bytes; what is longer hardly comes again
    constexpr size_t MANY = 1 << 15;
    if (size > WORTH) return encode_unknown(w, piece, size);
    std::string text(reinterpret_cast<const char*>(piece), size_t(size));
    auto found = w.longer.find(text);
    if (found != w.longer.end()) {
        w.ids = found->second;
        return;
    }
    encode_unknown(w, piece, size);
    if (w.longer.size() >= MANY) w.longer.clear();
    w.longer.emplace(std::move(text), w.ids);
}

// Encodes the pieces that `next` cuts, a few at a time, so that the cache's memory is on its way when it is needed.
template <typename Next>
void Bpe::encode_pieces(Worker& w, const uint8_t* text, int64_t size, Next next) const {
    constexpr int AHEAD = 16;
    struct Pending {
        int64_t begin, end;
        PieceKey key;
        uint64_t hash;
    } pending[AHEAD];
    if (w.out.size() < w.used + size_t(size)) w.out.resize(std::max(w.out.size() * 2, w.used + size_t(size)));
    uint32_t* out = w.out.data() + w.used;
    for (int64_t at = 0; at < size;) {
        int count = 0;
        for (; count < AHEAD && at < size; count++) {
            Pending& p = pending[count];
            p.begin = at;
            p.end = at = next(at);
            if (p.end - p.begin > PieceKey::MOST) continue;
            p.key = piece_key(text + p.begin, p.end - p.begin, size - p.begin);
            p.hash = p.key.hash();
            w.cache.prefetch(p.hash);
        }
        for (int i = 0; i < count; i++) {
            const Pending& p = pending[i];
            bool kept = p.end - p.begin <= PieceKey::MOST;
            int64_t written = kept ? w.cache.get(p.key, p.hash, out) : -1;
            if (written < 0) {
                if (kept) encode_unknown(w, text + p.begin, p.end - p.begin);
                else encode_longer(w, text + p.begin, p.end - p.begin);
                written = int64_t(w.ids.size());
                std::copy(w.ids.begin(), w.ids.end(), out);
                if (kept) w.cache.put(p.key, p.hash, w.ids.data(), w.ids.size());
            }
            out += written;
        }
    }
    w.used = size_t(out - w.out.data());
}

// The end of the stretch from `begin` that merges cannot leave: up to two characters that no token holds side by side.
int64_t Bpe::whole_piece(const uint8_t* text, int64_t size, int64_t begin) const {
    uint32_t last;
    int64_t at = begin + next_point(text, begin, size, last);
    while (at < size) {
        uint32_t c;
        int length = next_point(text, at, size, c);
        bool joined = (c | last) < 128 ? ascii_pairs_[last][c]
                                       : pairs_.find(last == ' ' ? BLOCK : last, c == ' ' ? BLOCK : c) != nullptr;
        if (!joined) break;
        last = c;
        at += length;
    }
    return at;
}

void Bpe::encode(Worker& w, const uint8_t* text, int64_t size) const {
    if (!size) return;
    if (split != WHOLE) {
        Splitter splitter(split, text, size);
        return encode_pieces(w, text, size, [&](int64_t at) { return splitter.next(at); });
    }
    if (prefix_blank) {
        w.text.assign(1, ' ');
        w.text.append(reinterpret_cast<const char*>(text), size_t(size));
        text = reinterpret_cast<const uint8_t*>(w.text.data());
        size++;
    }
    encode_pieces(w, text, size, [&](int64_t at) { return whole_piece(text, size, at); });
}

std::unique_ptr<Worker> Bpe::take_worker() {
    std::lock_guard<std::mutex> guard(lock_);
    if (idle_.empty()) return std::make_unique<Worker>();
    std::unique_ptr<Worker> worker = std::move(idle_.back());
    idle_.pop_back();
    worker->used = 0;
    return worker;
}

void Bpe::give_back(std::unique_ptr<Worker> worker) {
    if (worker->out.size() > (1u << 24)) std::vector<uint32_t>().swap(worker->out);
    std::lock_guard<std::mutex> guard(lock_);
    idle_.push_back(std::move(worker));
}

}  // namespace camelid

extern "C" {

// A tokenizer: `count` token texts laid end to end at `offsets` (their index is their id), merges uint32 [merges, 3]
// (left, right, result) best first, the ids of single bytes, and how text is cut. Free with camelid_bpe_free.
void* camelid_bpe_new(const uint8_t* texts, const int64_t* offsets, int64_t count, const uint32_t* merges,
                      int64_t merge_count, const uint32_t* byte_ids, int32_t split, int32_t ignore_merges,
                      int32_t prefix_blank) {
    auto* bpe = new camelid::Bpe();
    bpe->split = camelid::Split(split);
    bpe->ignore_merges = ignore_merges != 0;
    bpe->prefix_blank = prefix_blank != 0;
    std::copy(byte_ids, byte_ids + 256, bpe->byte_ids);
    for (int64_t i = 0; i < count; i++)
        if (offsets[i + 1] > offsets[i])
            bpe->add_token(std::string(reinterpret_cast<const char*>(texts + offsets[i]), size_t(offsets[i + 1] - offsets[i])), uint32_t(i));
    bpe->set_merges(merges, merge_count);
    bpe->finish();
    return bpe;
}

void camelid_bpe_free(void* bpe) { delete static_cast<camelid::Bpe*>(bpe); }

// Ids of `count` texts at `offsets`, end to end in `out`, which has room for one per byte of text and one per text;
// out_offsets int64 [count + 1]. Equal for any number of threads.
void camelid_bpe_encode(void* handle, const uint8_t* texts, const int64_t* offsets, int64_t count, int32_t threads,
                        uint32_t* out, int64_t* out_offsets) {
    auto* bpe = static_cast<camelid::Bpe*>(handle);
    constexpr int64_t MOST_THREADS = 64;  // each has some megabytes of cache
    threads = int32_t(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, std::min(count, MOST_THREADS))));
    std::vector<std::unique_ptr<camelid::Worker>> workers;
    for (int32_t t = 0; t < threads; t++) workers.push_back(bpe->take_worker());
    std::vector<int64_t> firsts(static_cast<size_t>(threads) + 1, count);
    firsts[0] = 0;
    for (int32_t t = 1; t < threads; t++) {  // equal shares of the bytes
        int64_t share = offsets[0] + (offsets[count] - offsets[0]) * t / threads;
        firsts[size_t(t)] = std::lower_bound(offsets, offsets + count, share) - offsets;
    }
    auto work = [&](int32_t t) {
        camelid::Worker& w = *workers[size_t(t)];
        for (int64_t i = firsts[size_t(t)]; i < firsts[size_t(t) + 1]; i++) {
            bpe->encode(w, texts + offsets[i], offsets[i + 1] - offsets[i]);
            out_offsets[i + 1] = int64_t(w.used);
        }
    };
    on_own_threads(threads, work);
    int64_t at = out_offsets[0] = 0;
    for (int32_t t = 0; t < threads; t++) {
        camelid::Worker& w = *workers[size_t(t)];
        std::copy_n(w.out.data(), w.used, out + at);
        for (int64_t i = firsts[size_t(t)]; i < firsts[size_t(t) + 1]; i++) out_offsets[i + 1] += at;
        at += int64_t(w.used);
        bpe->give_back(std::move(workers[size_t(t)]));
    }
}
}
