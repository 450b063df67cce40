// Cuts text into the pieces that byte-level BPE works on, as the regular expressions of GPT-2 and Llama 3 do.
//
// The classes of characters come from camelid/tokenizer/unicode.txt; tests hold the cuts equal to those of the
// `tokenizers` library's regular expressions.
#pragma once

#include <cstdint>

#include "text.hpp"

namespace camelid {

enum Split : int32_t { WHOLE = 0, GPT2 = 1, DIGITS_GPT2 = 2, LLAMA3 = 3, LLAMA3_DIGITS = 4 };

// Bits of every code point below SPLIT_LIMIT; nothing beyond is letter, number or space.
// Of the numbers two sets are known, the regular expressions' and that of the step that cuts digits off.
enum : uint8_t { SPLIT_LETTER = 1, SPLIT_NUMBER = 2, SPLIT_SPACE = 4, SPLIT_CLASSES = 7, SPLIT_DIGIT = 8 };
constexpr uint32_t SPLIT_LIMIT = 0x34000;
extern uint8_t split_table[SPLIT_LIMIT];

class Splitter {
  public:
    Splitter(Split kind, const uint8_t* text, int64_t size) : kind_(kind), text_(text), size_(size), end_(size) {}

    // The end of the piece that begins at byte `at` < size.
    int64_t next(int64_t at);

  private:
    struct Seen {
        uint32_t point;
        uint8_t bits;
        int64_t end;
    };

    Seen see(int64_t at) const {
        uint8_t first = text_[at];
        if (first < 0x80) return {first, uint8_t(split_table[first] & SPLIT_CLASSES), at + 1};
        uint32_t c;
        int length = next_point(text_, at, size_, c);
        return {c, c < SPLIT_LIMIT ? uint8_t(split_table[c] & SPLIT_CLASSES) : uint8_t(0), at + length};
    }

    static bool digit(const Seen& s) { return s.point < SPLIT_LIMIT && (split_table[s.point] & SPLIT_DIGIT); }

    template <typename Test>
    int64_t run(int64_t at, Test test) const {
        while (at < end_) {
            Seen s = see(at);
            if (!test(s)) break;
            at = s.end;
        }
        return at;
    }

    int64_t letters(int64_t at) const;
    int64_t contraction(int64_t at, bool any_case) const;
    int64_t spaces(int64_t at, int64_t end_of_one) const;
    int64_t gpt2(int64_t at);
    int64_t llama3(int64_t at, int most_digits);

    Split kind_;
    const uint8_t* text_;
    int64_t size_, end_;  // end_: of the stretch without digits, where those stand alone
    int64_t stretch_ = -1;
};

}  // namespace camelid
