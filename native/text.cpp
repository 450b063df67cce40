#include "text.hpp"

namespace camelid {

uint8_t class_table[LIMIT];
uint32_t lower_table[LIMIT];

void Text::read(const uint8_t* text, int64_t size) {
    points.clear();
    classes.clear();
    bytes.clear();
    points.reserve(size_t(size));
    classes.reserve(size_t(size));
    bytes.reserve(size_t(size) + 1);
    for (int64_t at = 0; at < size;) {
        uint32_t c;
        int length = next_point(text, at, size, c);
        points.push_back(c);
        classes.push_back(class_of(c));
        bytes.push_back(int32_t(at));
        at += length;
    }
    bytes.push_back(int32_t(size));
}

namespace {

bool in_word(const Text& t, int32_t i) {
    uint8_t k = t.classes[i];
    return (!(k & SOLID) && (k & (LETTER | DIGIT | MARK))) || t.points[i] == '_';
}
bool letter(const Text& t, int32_t i) { return (t.classes[i] & (LETTER | SOLID)) == LETTER; }
bool digit(const Text& t, int32_t i) { return (t.classes[i] & (DIGIT | SOLID)) == DIGIT; }
bool lower_latin(uint32_t c) { return (c >= 'a' && c <= 'z') || (c >= 0xdf && c <= 0xff); }
bool upper_latin(uint32_t c) { return (c >= 'A' && c <= 'Z') || (c >= 0xc0 && c <= 0xde); }
bool apostrophe(uint32_t c) { return c == '\'' || c == 0x2019; }

// Does the character at i (not a word's own) hold the words on both sides together?
bool joins(const Text& t, int32_t i, int32_t end) {
    if (i + 1 >= end || !in_word(t, i + 1)) return false;
    uint32_t c = t.points[i];
    bool digits = digit(t, i - 1) && digit(t, i + 1);
    bool letters = letter(t, i - 1) && letter(t, i + 1);
    if (c == '.')
        return digits || (letters && !(lower_latin(t.points[i - 1]) && upper_latin(t.points[i + 1])));
    if (c == ',' || c == ':' || c == '/') return digits;
    if (apostrophe(c)) return letters;
    if (c == '@') return true;
    if (c == '-') return letter(t, i - 1) && digit(t, i + 1);
    return false;
}

bool starts(const Text& t, int32_t i, int32_t end, const char* prefix) {
    for (; *prefix; prefix++, i++)
        if (i >= end || t.points[i] != uint32_t(*prefix)) return false;
    return true;
}

// The end of an address that begins at i, or i when none does.
int32_t address(const Text& t, int32_t i, int32_t end) {
    uint32_t c = t.points[i];
    int32_t from = i;
    if (c == 'h') from += starts(t, i, end, "https://") ? 8 : starts(t, i, end, "http://") ? 7 : 0;
    else if (c == 'f') from += starts(t, i, end, "ftp://") ? 6 : 0;
    else if (c == 'w') from += starts(t, i, end, "www.") ? 4 : 0;
    if (from == i) return i;
    int32_t last = from;
    while (last < end && !(t.classes[last] & SPACE)) last++;
    const std::string trailing = ".,;:!?)]'\">";
    while (last > from && t.points[last - 1] < 128 && trailing.find(char(t.points[last - 1])) != std::string::npos) last--;
    return last > from ? last : i;
}

bool is_clitic(const Text& t, int32_t begin, int32_t end) {
    uint32_t a = lower_of(t.points[begin]), b = end - begin > 1 ? lower_of(t.points[begin + 1]) : 0;
    if (end - begin == 1) return a == 's' || a == 'd' || a == 'm';
    if (end - begin != 2) return false;
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l');
}

const char* const ABBREVIATIONS[] = {"Mr", "Mrs", "Ms", "Dr", "St", "Prof", "Jr", "Sr", "Rev", "Gen", "Gov", "Sen", "Rep",
                                     "Adm", "Bros", "Co", "Corp", "Inc", "Ltd", "Messrs", "vs", "Jan", "Feb", "Mar",
                                     "Apr", "Jun", "Jul", "Aug", "Sep", "Sept", "Oct", "Nov", "Dec"};

bool ascii_letter(uint32_t c) { return (c | 32) >= 'a' && (c | 32) <= 'z'; }

// Does the full stop after the word [begin, end) belong to it?
bool is_short(const Text& t, int32_t begin, int32_t end, int32_t limit) {
    if (end >= limit || t.points[end] != '.') return false;
    if (end + 1 < limit && (t.points[end + 1] == '.' || in_word(t, end + 1))) return false;
    bool letters = (end - begin) % 2 == 1;  // a letter, a stop, a letter, …
    for (int32_t i = begin; letters && i < end; i++)
        letters = (i - begin) % 2 ? t.points[i] == '.' : ascii_letter(t.points[i]);
    if (letters) return true;
    for (const char* word : ABBREVIATIONS)
        if (starts(t, begin, end, word) && int32_t(std::char_traits<char>::length(word)) == end - begin) return true;
    return false;
}

// The end of letters with single stops between them that begin at i, or i when there is none.
int32_t chain_of_letters(const Text& t, int32_t i, int32_t end) {
    if (!ascii_letter(t.points[i])) return i;
    int32_t last = i + 1;
    while (last + 1 < end && t.points[last] == '.' && ascii_letter(t.points[last + 1])) last += 2;
    return last;
}

void add_word(const Text& t, int32_t begin, int32_t end, std::vector<Word>& out) {
    int32_t at = end - 1;
    while (at > begin && !apostrophe(t.points[at])) at--;
    if (at > begin && at + 1 < end) {
        bool negated = at + 2 == end && lower_of(t.points[at + 1]) == 't' && at - begin > 1 &&
                       (t.points[at - 1] == 'n' || t.points[at - 1] == 'N');
        if (negated || is_clitic(t, at + 1, end)) {
            int32_t cut = negated ? at - 1 : at;
            out.push_back({begin, cut});
            begin = cut;
        }
    }
    out.push_back({begin, end});
}

}  // namespace

void find_words(const Text& t, int32_t begin, int32_t end, std::vector<Word>& out) {
    int32_t tried = begin;  // the end of a chain that is no short word: nor is any part of it
    for (int32_t i = begin; i < end;) {
        if (t.classes[i] & SPACE) {
            i++;
            continue;
        }
        int32_t last = address(t, i, end);
        if (last > i) {
            add_word(t, i, last, out);
        } else if (in_word(t, i)) {
            last = i < tried ? i : chain_of_letters(t, i, end);  // also "z.B.", whose stop joins no two words
            if (last > i && is_short(t, i, last, end)) {
                out.push_back({i, last + 1});
                i = last + 1;
                continue;
            }
            tried = last > tried ? last : tried;
            last = i + 1;
            while (last < end && (in_word(t, last) || joins(t, last, end))) last++;
            if (is_short(t, i, last, end)) out.push_back({i, ++last});
            else add_word(t, i, last, out);
        } else {
            last = i + 1;
            if (t.points[i] == '.')
                while (last < end && t.points[last] == '.') last++;
            out.push_back({i, last});
        }
        i = last;
    }
}

void Counter::reset(size_t expected) {
    size_t size = 64;
    while (size < expected * 2) size *= 2;
    if (size > slots_.size()) {
        slots_.assign(size, Slot{0, 0, 0});
        epoch_ = 0;
    }
    mask_ = size - 1;
    if (++epoch_ == 0) {
        for (auto& slot : slots_) slot.epoch = 0;
        epoch_ = 1;
    }
}

uint32_t Counter::add(uint64_t key) {
    for (size_t at = size_t(key) & mask_;; at = (at + 1) & mask_) {
        Slot& slot = slots_[at];
        if (slot.epoch != epoch_) {
            slot = {key, 1, epoch_};
            return 1;
        }
        if (slot.key == key) return ++slot.count;
    }
}

uint32_t Counter::count(uint64_t key) const {
    for (size_t at = size_t(key) & mask_;; at = (at + 1) & mask_) {
        if (slots_[at].epoch != epoch_) return 0;
        if (slots_[at].key == key) return slots_[at].count;
    }
}

}  // namespace camelid
