// The line rules of C4 (arXiv:1910.10683, section 2.2); the reference is camelid/corpus/c4.py.
#include <algorithm>
#include <cstring>
#include <string>

#include "text.hpp"

namespace camelid {
namespace {

enum Verdict { KEPT = 0, LOREM_IPSUM = 1, CURLY_BRACKET = 2, FEW_SENTENCES = 3 };

const char* const POLICIES[] = {"terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"};

struct Limits {
    int32_t min_sentences, min_words, max_word_length;
};

int32_t citation(const Text& t, int32_t at, int32_t end) {
    if (t.points[at] != '[') return 0;
    int32_t i = at + 1;
    while (i < end && (t.points[i] >= '0' && t.points[i] <= '9')) i++;
    if (i < end && t.points[i] == ']') return i + 1 - at;
    for (const char* word : {"[edit]", "[citation needed]"}) {
        int32_t length = int32_t(std::strlen(word)), k = 0;
        while (k < length && at + k < end && t.points[at + k] == uint32_t(word[k])) k++;
        if (k == length) return length;
    }
    return 0;
}

bool ends_a_line(uint32_t c) {
    if ((class_of(c) & STOP) && c != 0x2026) return true;
    return c == '"' || c == '\'' || c == 0x201d || c == 0x2019 || c == 0x300d || c == 0x300f;
}

int32_t sentences(const Text& t, const std::vector<Word>& words) {
    int32_t count = words.empty() ? 0 : 1;
    bool stopped = false;
    for (const Word& w : words) {
        if (w.end - w.begin == 1 && (t.classes[w.begin] & STOP)) {
            stopped = true;
        } else if (stopped) {
            bool punctuation = true;
            for (int32_t i = w.begin; i < w.end; i++) punctuation &= (t.classes[i] & SYMBOL) != 0;
            if (!punctuation) {
                count++;
                stopped = false;
            }
        }
    }
    return count;
}

struct Scratch {
    Text text, line;
    std::vector<Word> words;
    std::string kept, lower;
};

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// Looks at one line [begin, end); sets `verdict` when the whole text is to go. True when the line stays, in `kept`.
bool keeps(Scratch& s, const uint8_t* utf8, int32_t begin, int32_t end, const Limits& limits, int& verdict, int32_t& found) {
    const Text& t = s.text;
    while (begin < end && (t.classes[begin] & SPACE)) begin++;
    while (end > begin && (t.classes[end - 1] & SPACE)) end--;
    int32_t words = 0, run = 0, longest = 0;
    for (int32_t i = begin; i < end; i++) {
        if (t.classes[i] & SPACE) {
            run = 0;
            continue;
        }
        if (run == 0 || (t.classes[i] & SOLID)) words++;
        run = (t.classes[i] & SOLID) ? 1 : run + 1;
        longest = std::max(longest, run);
    }
    if (longest > limits.max_word_length) return false;
    s.kept.clear();
    s.lower.clear();
    uint32_t last = 0;
    for (int32_t i = begin; i < end;) {
        int32_t cited = citation(t, i, end);
        if (cited) {
            i += cited;
            continue;
        }
        s.kept.append(reinterpret_cast<const char*>(utf8 + t.bytes[i]), size_t(t.bytes[i + 1] - t.bytes[i]));
        uint32_t lowered = lower_of(t.points[i]);
        s.lower.push_back(lowered < 128 ? char(lowered) : char(1));
        last = t.points[i++];
    }
    size_t size = s.lower.size();
    if (!size || !ends_a_line(last) || (size >= 3 && s.lower.compare(size - 3, 3, "...") == 0)) return false;
    if (words < limits.min_words) return false;
    if (has(s.lower, "lorem ipsum")) verdict = LOREM_IPSUM;
    else if (has(s.lower, "javascript")) return false;
    else if (has(s.lower, "{")) verdict = CURLY_BRACKET;
    if (verdict != KEPT) return false;
    for (const char* policy : POLICIES)
        if (has(s.lower, policy)) return false;
    if (found >= limits.min_sentences) return true;  // enough already: no need to count on
    s.line.read(reinterpret_cast<const uint8_t*>(s.kept.data()), int64_t(s.kept.size()));
    s.words.clear();
    find_words(s.line, 0, int32_t(s.line.size()), s.words);
    found += sentences(s.line, s.words);
    return true;
}

int clean(Scratch& s, const uint8_t* utf8, const Limits& limits, std::string& out) {
    const Text& t = s.text;
    int32_t size = int32_t(t.size()), found = 0;
    int verdict = KEPT;
    bool first = true;
    for (int32_t begin = 0; begin < size;) {
        int32_t end = begin;
        while (end < size && !(t.classes[end] & BREAK)) end++;
        if (keeps(s, utf8, begin, end, limits, verdict, found)) {
            if (!first) out.push_back('\n');
            out += s.kept;
            first = false;
        }
        if (verdict != KEPT) return verdict;
        begin = end + (end + 1 < size && t.points[end] == '\r' && t.points[end + 1] == '\n' ? 2 : 1);
    }
    return found < limits.min_sentences ? FEW_SENTENCES : KEPT;
}

}  // namespace
}  // namespace camelid

extern "C" {

// Cleans `count` texts. `out` has room for all of them; text i ends up at out_offsets[i] … out_offsets[i + 1],
// its verdict in verdicts[i].
void camelid_c4(const uint8_t* texts, const int64_t* offsets, int64_t count, int32_t min_sentences, int32_t min_words,
                int32_t max_word_length, uint8_t* out, int64_t* out_offsets, int32_t* verdicts) {
    camelid::Scratch scratch;
    camelid::Limits limits{min_sentences, min_words, max_word_length};
    int64_t at = out_offsets[0] = 0;
    std::string cleaned;
    for (int64_t i = 0; i < count; i++) {
        const uint8_t* text = texts + offsets[i];
        scratch.text.read(text, offsets[i + 1] - offsets[i]);
        cleaned.clear();
        verdicts[i] = camelid::clean(scratch, text, limits, cleaned);
        std::memcpy(out + at, cleaned.data(), cleaned.size());
        out_offsets[i + 1] = at += int64_t(cleaned.size());
    }
}
}
