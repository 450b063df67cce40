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
    std::vector<uint64_t> hashes, keys;
    Counter counter;
};

void count_words(Scratch& s, double* out) {
    const Text& t = s.text;
    unsigned stops = 0, solid_stops = 0;
    s.hashes.clear();
    for (const Word& w : s.words) {
        int32_t length = w.end - w.begin;
        bool spoken = false, has_letter = false;
        for (int32_t i = w.begin; i < w.end; i++) {
            spoken |= !(t.classes[i] & SYMBOL);
            has_letter |= (t.classes[i] & LETTER) != 0;
        }
        if (spoken) {
            out[SPOKEN_WORDS]++;
            out[SPOKEN_CHARACTERS] += length;
        }
        out[LETTER_WORDS] += has_letter;
        if (length <= 4 && t.points[w.begin] < 128)
            for (int k = 0; k < 8; k++) {
                const char* p = STOP_WORD_LIST[k];
                int32_t i = w.begin;
                while (i < w.end && *p && t.points[i] == uint32_t(*p)) i++, p++;
                if (i == w.end && !*p) stops |= 1u << k;
            }
        if (length == 1 && (t.classes[w.begin] & SOLID))
            for (int k = 0; k < 22; k++) solid_stops |= (t.points[w.begin] == SOLID_STOPS[k]) ? 1u << k : 0u;
        s.hashes.push_back(hash_points(&t.points[w.begin], length, false));
    }
    out[WORDS] = double(s.words.size());
    out[STOP_WORDS] = __builtin_popcount(stops);
    out[SOLID_STOP_WORDS] = __builtin_popcount(solid_stops);
}

// Characters (joining spaces included) in all occurrences of the commonest n-gram, the first of equals.
double top_ngram(Scratch& s, int n) {
    if (s.hashes.size() < size_t(n)) return 0;
    size_t grams = s.hashes.size() - n + 1;
    s.counter.reset(grams);
    s.keys.resize(grams);
    uint32_t best = 0;
    for (size_t i = 0; i < grams; i++) {
        s.keys[i] = joined(&s.hashes[i], n);
        best = std::max(best, s.counter.add(s.keys[i]));
    }
    size_t first = 0;
    while (s.counter.count(s.keys[first]) != best) first++;
    int64_t length = n - 1;
    for (int k = 0; k < n; k++) length += s.words[first + k].end - s.words[first + k].begin;
    return double(length) * best;
}

// Characters in n-grams that stood earlier in the text, counted without overlap.
double repeated_ngrams(Scratch& s, int n) {
    double characters = 0;
    size_t count = s.hashes.size();
    s.counter.reset(count);
    for (size_t i = 0; i + n <= count;) {
        if (s.counter.add(joined(&s.hashes[i], n)) > 1) {
            for (int k = 0; k < n; k++) characters += s.words[i + k].end - s.words[i + k].begin;
            i += n;
        } else {
            i++;
        }
    }
    return characters;
}

struct Repeats {
    double pieces = 0, repeated = 0, characters = 0;
};

void add_piece(Scratch& s, Repeats& r, int32_t begin, int32_t end) {
    r.pieces++;
    if (s.counter.add(hash_points(&s.text.points[begin], end - begin, false)) > 1) {
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
            if (s.counter.add(hash_points(&t.points[begin], end - begin, false)) > 1)
                out[REPEATED_TEXT_LINE_CHARACTERS] += end - begin;
        }
        begin = end + 1;
    }
}

void statistics(Scratch& s, double* out) {
    std::fill(out, out + FIELDS, 0.0);
    const Text& t = s.text;
    int32_t size = int32_t(t.size());
    out[CHARACTERS] = size;
    for (int32_t i = 0; i < size; i++) {
        uint8_t k = t.classes[i];
        uint32_t c = t.points[i];
        out[NEWLINES] += c == '\n';
        out[HASHES] += c == '#';
        out[ELLIPSES] += c == 0x2026;
        if (c == '.' && i + 2 < size && t.points[i + 1] == '.' && t.points[i + 2] == '.') {
            out[ELLIPSES]++;  // str.count: not overlapping; the next two are dots, visible and nothing else
            out[VISIBLE] += 2;
            i += 2;
        }
        out[SOLID_CHARACTERS] += (k & SOLID) != 0;
        out[LETTERS] += (k & LETTER) != 0;
        out[VISIBLE] += !(k & SPACE);
    }
    s.words.clear();
    find_words(t, 0, size, s.words);
    count_words(s, out);
    for (int n = 2; n <= 4; n++) out[TOP_2 + n - 2] = top_ngram(s, n);
    for (int n = 5; n <= 10; n++) out[DUP_5 + n - 5] = repeated_ngrams(s, n);
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
