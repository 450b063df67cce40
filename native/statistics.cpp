// What the quality rules need to know of a document, counted in one pass over its words and one over its lines.
// The reference is camelid/corpus/statistics.py, whose FIELDS give the order of the figures.
#include <algorithm>
#include <cmath>
#include <string>

#include "text.hpp"

namespace camelid {
namespace {

enum Field {
    CHARACTERS, WORDS, SPOKEN_WORDS, SPOKEN_CHARACTERS, LETTER_WORDS, STOP_WORDS, SOLID_STOP_WORDS, HASHES, ELLIPSES,
    LINES, BULLET_LINES, ELLIPSIS_LINES, NEWLINES, TEXT_LINES, STOPPED_LINES, SHORT_LINES,
    REPEATED_TEXT_LINE_CHARACTERS, SPLIT_LINES, REPEATED_LINES, REPEATED_LINE_CHARACTERS, PARAGRAPHS,
    REPEATED_PARAGRAPHS, REPEATED_PARAGRAPH_CHARACTERS, TOP_2, TOP_3, TOP_4, DUP_5, DUP_6, DUP_7, DUP_8, DUP_9, DUP_10,
    SOLID_CHARACTERS, LETTERS, VISIBLE, FIELDS
};

const char* const STOP_WORD_LIST[] = {"the", "be", "to", "of", "and", "that", "have", "with"};
// 的了是在不有和我他这 のにはをたがでと, and their traditional forms
const uint32_t SOLID_STOPS[] = {0x7684, 0x4e86, 0x662f, 0x5728, 0x4e0d, 0x6709, 0x548c, 0x6211, 0x4ed6, 0x8fd9, 0x9019,
                                0x4e4b, 0x4e5f, 0x800c, 0x306e, 0x306b, 0x306f, 0x3092, 0x305f, 0x304c, 0x3067, 0x3068};

struct Scratch {
    Text text;
    std::vector<Word> words;
    std::vector<uint64_t> hashes, grams;  // of words, of n-grams
    Counter counter;
};

constexpr uint64_t PRIME = 0x9fb21c651e98df25ull;

// A hash of points [begin, end), two a step; only ever compared with its like.
uint64_t hash_span(const uint32_t* points, int32_t begin, int32_t end) {
    uint64_t h = uint64_t(end - begin);
    int32_t i = begin;
    for (; i + 1 < end; i += 2) {
        h = (h ^ (uint64_t(points[i]) << 32 | points[i + 1])) * PRIME;
        h ^= h >> 32;
    }
    return i < end ? mix(h ^ points[i]) : mix(h);
}

void count_words(Scratch& s, double* out) {
    const Text& t = s.text;
    unsigned stops = 0, solid_stops = 0;
    int64_t spoken_words = 0, spoken_characters = 0, letter_words = 0;
    s.hashes.clear();
    for (const Word& w : s.words) {
        int32_t length = w.end - w.begin;
        uint8_t any = 0, all = 0xff;
        for (int32_t i = w.begin; i < w.end; i++) {
            any |= t.classes[i];
            all &= t.classes[i];
        }
        bool spoken = !(all & SYMBOL);
        spoken_words += spoken;
        spoken_characters += spoken ? length : 0;
        letter_words += (any & LETTER) != 0;
        if (length <= 4 && t.points[w.begin] < 128)
            for (int k = 0; k < 8; k++) {
                const char* p = STOP_WORD_LIST[k];
                int32_t i = w.begin;
                while (i < w.end && *p && t.points[i] == uint32_t(*p)) i++, p++;
                if (i == w.end && !*p) stops |= 1u << k;
            }
        if (length == 1 && (t.classes[w.begin] & SOLID))
            for (int k = 0; k < 22; k++) solid_stops |= (t.points[w.begin] == SOLID_STOPS[k]) ? 1u << k : 0u;
        s.hashes.push_back(hash_span(t.points.data(), w.begin, w.end));
    }
    out[SPOKEN_WORDS] = double(spoken_words);
    out[SPOKEN_CHARACTERS] = double(spoken_characters);
    out[LETTER_WORDS] = double(letter_words);
    out[WORDS] = double(s.words.size());
    out[STOP_WORDS] = __builtin_popcount(stops);
    out[SOLID_STOP_WORDS] = __builtin_popcount(solid_stops);
}

// Makes `grams` the hashes of the n-grams, from those of the (n - 1)-grams.
void extend_grams(Scratch& s, int n) {
    size_t count = s.hashes.size() < size_t(n) ? 0 : s.hashes.size() - n + 1;
    s.grams.resize(count);
    for (size_t i = 0; i < count; i++) {
        uint64_t h = (s.grams[i] ^ s.hashes[i + n - 1]) * PRIME;
        s.grams[i] = h ^ (h >> 32);
    }
}

// Characters (joining spaces included) in all occurrences of the commonest n-gram, the first of equals.
double top_ngram(Scratch& s, int n) {
    if (s.grams.empty()) return 0;
    s.counter.reset(s.grams.size());
    uint32_t best = 0;
    for (uint64_t gram : s.grams) best = std::max(best, s.counter.add(gram));
    size_t first = 0;
    while (s.counter.count(s.grams[first]) != best) first++;
    int64_t length = n - 1;
    for (int k = 0; k < n; k++) length += s.words[first + k].end - s.words[first + k].begin;
    return double(length) * best;
}

// Characters in n-grams that stood earlier in the text, counted without overlap.
double repeated_ngrams(Scratch& s, int n) {
    int64_t characters = 0;
    s.counter.reset(s.grams.size());
    for (size_t i = 0; i < s.grams.size();) {
        if (s.counter.add(s.grams[i]) > 1) {
            for (int k = 0; k < n; k++) characters += s.words[i + k].end - s.words[i + k].begin;
            i += n;
        } else {
            i++;
        }
    }
    return double(characters);
}

struct Repeats {
    double pieces = 0, repeated = 0, characters = 0;
};

void add_piece(Scratch& s, Repeats& r, int32_t begin, int32_t end) {
    r.pieces++;
    if (s.counter.add(hash_span(s.text.points.data(), begin, end)) > 1) {
        r.repeated++;
        r.characters += end - begin;
    }
}

// Pieces between runs of at least `newlines` newlines, as re.split sees them.
Repeats repeats(Scratch& s, int32_t begin, int32_t end, int newlines) {
    Repeats r;
    const auto& p = s.text.points;
    s.counter.reset(size_t(std::count(p.begin() + begin, p.begin() + end, uint32_t('\n'))) + 1);
    int32_t start = begin;
    for (int32_t i = begin; i < end;) {
        int32_t run = i;
        while (run < end && p[run] == '\n') run++;
        if (run - i >= newlines) {
            add_piece(s, r, start, i);
            start = run;
        }
        i = run > i ? run : i + 1;
    }
    add_piece(s, r, start, end);
    return r;
}

bool ends_in_ellipsis(const Text& t, int32_t begin, int32_t end) {
    if (end > begin && t.points[end - 1] == 0x2026) return true;
    return end - begin >= 3 && t.points[end - 1] == '.' && t.points[end - 2] == '.' && t.points[end - 3] == '.';
}

// Lines as str.splitlines sees them.
void count_lines(const Text& t, double* out) {
    int32_t size = int32_t(t.size());
    for (int32_t begin = 0; begin < size;) {
        int32_t end = begin;
        while (end < size && !(t.classes[end] & BREAK)) end++;
        int32_t a = begin, b = end;
        while (a < b && (t.classes[a] & SPACE)) a++;
        while (b > a && (t.classes[b - 1] & SPACE)) b--;
        out[LINES]++;
        out[BULLET_LINES] += a < b && (t.points[a] == 0x2022 || t.points[a] == '-');
        out[ELLIPSIS_LINES] += ends_in_ellipsis(t, a, b);
        begin = end + (end + 1 < size && t.points[end] == '\r' && t.points[end + 1] == '\n' ? 2 : 1);
    }
}

// Lines between newlines that are not blank.
void count_text_lines(Scratch& s, double* out) {
    const Text& t = s.text;
    int32_t size = int32_t(t.size());
    s.counter.reset(size_t(out[NEWLINES]) + 1);
    for (int32_t begin = 0; begin <= size;) {
        int32_t end = begin, width = 0;
        bool blank = true;
        for (; end < size && t.points[end] != '\n'; end++) {
            width += (t.classes[end] & SOLID) ? 2 : 1;
            blank &= (t.classes[end] & SPACE) != 0;
        }
        if (!blank) {
            out[TEXT_LINES]++;
            out[STOPPED_LINES] += (t.classes[end - 1] & STOP) != 0;
            out[SHORT_LINES] += width <= 30;
            if (s.counter.add(hash_span(t.points.data(), begin, end)) > 1)
                out[REPEATED_TEXT_LINE_CHARACTERS] += end - begin;
        }
        begin = end + 1;
    }
}

void count_characters(const Text& t, double* out) {
    int32_t size = int32_t(t.size());
    int64_t newlines = 0, hashes = 0, ellipses = 0, solid = 0, letters = 0, spaces = 0;
    for (int32_t i = 0; i < size; i++) {
        uint8_t k = t.classes[i];
        newlines += t.points[i] == '\n';
        hashes += t.points[i] == '#';
        ellipses += t.points[i] == 0x2026;
        solid += (k & SOLID) != 0;
        letters += (k & LETTER) != 0;
        spaces += (k & SPACE) != 0;
    }
    for (int32_t i = 0; i + 2 < size; i++)  // as str.count finds them: not overlapping
        if (t.points[i] == '.' && t.points[i + 1] == '.' && t.points[i + 2] == '.') {
            ellipses++;
            i += 2;
        }
    out[CHARACTERS] = size;
    out[NEWLINES] = double(newlines);
    out[HASHES] = double(hashes);
    out[ELLIPSES] = double(ellipses);
    out[SOLID_CHARACTERS] = double(solid);
    out[LETTERS] = double(letters);
    out[VISIBLE] = double(size - spaces);
}

void statistics(Scratch& s, double* out) {
    std::fill(out, out + FIELDS, 0.0);
    const Text& t = s.text;
    int32_t size = int32_t(t.size());
    count_characters(t, out);
    s.words.clear();
    find_words(t, 0, size, s.words);
    count_words(s, out);
    s.grams = s.hashes;
    for (uint64_t& gram : s.grams) gram *= PRIME;  // so that the order of words counts
    for (int n = 2; n <= 10; n++) {
        extend_grams(s, n);
        if (n <= 4) out[TOP_2 + n - 2] = top_ngram(s, n);
        else out[DUP_5 + n - 5] = repeated_ngrams(s, n);
    }
    count_lines(t, out);
    count_text_lines(s, out);
    Repeats lines = repeats(s, 0, size, 1);
    out[SPLIT_LINES] = lines.pieces;
    out[REPEATED_LINES] = lines.repeated;
    out[REPEATED_LINE_CHARACTERS] = lines.characters;
    int32_t a = 0, b = size;
    while (a < b && (t.classes[a] & SPACE)) a++;
    while (b > a && (t.classes[b - 1] & SPACE)) b--;
    Repeats paragraphs = repeats(s, a, b, 2);
    out[PARAGRAPHS] = paragraphs.pieces;
    out[REPEATED_PARAGRAPHS] = paragraphs.repeated;
    out[REPEATED_PARAGRAPH_CHARACTERS] = paragraphs.characters;
}

}  // namespace
}  // namespace camelid

extern "C" {

int camelid_statistics_fields() { return camelid::FIELDS; }

// Figures of `count` texts laid end to end at `offsets` (count + 1 of them): double [count, fields].
void camelid_statistics(const uint8_t* texts, const int64_t* offsets, int64_t count, double* out) {
    camelid::Scratch scratch;
    for (int64_t i = 0; i < count; i++) {
        scratch.text.read(texts + offsets[i], offsets[i + 1] - offsets[i]);
        camelid::statistics(scratch, out + i * camelid::FIELDS);
    }
}

// The character tables: uint8 [LIMIT], uint32 [LIMIT]. Call once before anything else here.
void camelid_set_characters(const uint8_t* classes, const uint32_t* lower) {
    std::copy(classes, classes + camelid::LIMIT, camelid::class_table);
    std::copy(lower, lower + camelid::LIMIT, camelid::lower_table);
}
}
