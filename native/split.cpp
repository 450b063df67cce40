#include "split.hpp"

#include <algorithm>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace camelid {

uint8_t split_table[SPLIT_LIMIT];

namespace {

constexpr uint32_t LONG_S = 0x17f;  // folds to s

uint32_t ascii_lower(uint32_t c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; }

}  // namespace

// The end of a run of letters. ASCII is looked at sixteen bytes at a time, where there are as many.
int64_t Splitter::letters(int64_t at) const {
    while (at < end_) {
#ifdef __SSE2__
        if (at + 16 <= end_) {
            __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(text_ + at));
            __m128i offset = _mm_sub_epi8(_mm_or_si128(bytes, _mm_set1_epi8(0x20)), _mm_set1_epi8('a'));
            __m128i inside = _mm_cmpeq_epi8(_mm_min_epu8(offset, _mm_set1_epi8(25)), offset);
            int other = ~_mm_movemask_epi8(inside) & 0xffff;
            if (!other) {
                at += 16;
                continue;
            }
            at += __builtin_ctz(unsigned(other));
            if (text_[at] < 0x80) return at;
        }
#endif
        Seen s = see(at);
        if (!(s.bits & SPLIT_LETTER)) return at;
        at = s.end;
    }
    return at;
}

// 's 't 're 've 'm 'll 'd at `at` (an apostrophe): its end, or `at`.
int64_t Splitter::contraction(int64_t at, bool any_case) const {
    if (at + 1 >= end_) return at;
    Seen first = see(at + 1);
    uint32_t a = any_case ? ascii_lower(first.point) : first.point;
    if (a == 's' || a == 't' || a == 'm' || a == 'd' || (any_case && a == LONG_S)) return first.end;
    if ((a != 'r' && a != 'v' && a != 'l') || first.end >= end_) return at;
    Seen second = see(first.end);
    uint32_t b = any_case ? ascii_lower(second.point) : second.point;
    return b == (a == 'l' ? 'l' : 'e') ? second.end : at;
}

// \s+(?!\S)|\s+ at `at`: the last space of a run belongs to what follows, unless it is the only one.
int64_t Splitter::spaces(int64_t at, int64_t end_of_one) const {
    int64_t last = at, i = end_of_one;
    while (i < end_) {
        Seen s = see(i);
        if (!(s.bits & SPLIT_SPACE)) return last > at ? last : i;
        last = i;
        i = s.end;
    }
    return i;
}

int64_t Splitter::gpt2(int64_t at) {
    Seen s = see(at);
    if (s.point == '\'') {
        int64_t end = contraction(at, false);
        if (end > at) return end;
    }
    Seen head = s;
    if (s.point == ' ' && s.end < end_) head = see(s.end);
    uint8_t kind = head.bits;
    if (kind & SPLIT_SPACE) return spaces(at, s.end);
    if (kind & SPLIT_LETTER) return letters(head.end);
    return run(head.end, [kind](const Seen& x) { return x.bits == kind; });
}

int64_t Splitter::llama3(int64_t at, int most_digits) {
    Seen s = see(at);
    if (s.point == '\'') {
        int64_t end = contraction(at, true);
        if (end > at) return end;
    }
    auto letter = [](const Seen& x) { return (x.bits & SPLIT_LETTER) != 0; };
    auto other = [](const Seen& x) { return !x.bits; };
    auto newline = [](const Seen& x) { return x.point == '\r' || x.point == '\n'; };
    if (letter(s)) return letters(s.end);
    if (s.bits & SPLIT_NUMBER) {
        int64_t end = s.end;
        for (int n = 1; n < most_digits && end < end_; n++) {
            Seen digit = see(end);
            if (!(digit.bits & SPLIT_NUMBER)) break;
            end = digit.end;
        }
        return end;
    }
    if (!newline(s) && s.end < end_) {
        Seen follows = see(s.end);
        if (letter(follows)) return letters(follows.end);
        if (s.point == ' ' && other(follows)) return run(run(follows.end, other), newline);
    }
    if (other(s)) return run(run(s.end, other), newline);
    int64_t after_newlines = at;  // \s*[\r\n]+ reaches to the last newline of the run
    for (int64_t i = at; i < end_;) {
        Seen x = see(i);
        if (!(x.bits & SPLIT_SPACE)) break;
        i = x.end;
        if (newline(x)) after_newlines = i;
    }
    return after_newlines > at ? after_newlines : spaces(at, s.end);
}

int64_t Splitter::next(int64_t at) {
    switch (kind_) {
        case GPT2: return gpt2(at);
        case LLAMA3: return llama3(at, 3);
        case LLAMA3_DIGITS: return llama3(at, 1);
        case DIGITS_GPT2: break;
        default: return size_;
    }
    if (at >= stretch_) {
        Seen s = see(at);
        if (digit(s)) return s.end;
        end_ = size_;
        stretch_ = end_ = run(at, [](const Seen& x) { return !digit(x); });
    }
    return gpt2(at);
}

}  // namespace camelid

extern "C" {

// uint8 [SPLIT_LIMIT]. Call once before anything else of the tokenizer.
void camelid_set_split_classes(const uint8_t* classes) {
    std::copy(classes, classes + camelid::SPLIT_LIMIT, camelid::split_table);
}

// Where the pieces of a text end, in bytes; returns how many. `ends` has room for one per byte.
int64_t camelid_split(const uint8_t* text, int64_t size, int32_t kind, int64_t* ends) {
    camelid::Splitter splitter(camelid::Split(kind), text, size);
    int64_t count = 0;
    for (int64_t at = 0; at < size;) ends[count++] = at = splitter.next(at);
    return count;
}
}
