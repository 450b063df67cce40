// What one step is asked: which tokens of which texts, and where their keys and values are.
#pragma once
#include <algorithm>
#include <vector>

#include "decoder.hpp"

namespace {

// Some queries of one text and the heads that share a key-value head.
struct Task {
    std::int64_t text, from, to, kv_head;
};

// A step's texts: tokens starts[i] … starts[i + 1] - 1 of `ids` belong to text i and stand at positions[i] and after; its
// pages are tables[i * table_row …]. A page's values lie page_bytes / 2 after its keys; what bytes are worth lies after the
// bytes.
struct Step {
    std::int64_t texts, tokens, table_row, wanted_count, layers, page_bytes;
    Number kind;
    const std::int64_t *ids, *starts, *positions, *tables, *wanted;
    const float *cos, *sin;
    std::uint8_t* cache;
    std::vector<std::int64_t> text_of{};  // of each token
    std::vector<Task> tasks{};
    std::vector<Pages> pages{};  // of each text, in the layer that is computed

    // As they lie one after the other in `numbers`.
    Step(const std::int64_t* numbers, const float* cosines, const float* sines, std::uint8_t* kept)
        : texts(numbers[0]), tokens(numbers[1]), table_row(numbers[2]), wanted_count(numbers[3]), layers(numbers[4]),
          page_bytes(numbers[5]), kind(static_cast<Number>(numbers[6])), ids(numbers + 7), starts(ids + tokens),
          positions(starts + texts + 1), tables(positions + texts), wanted(tables + texts * table_row), cos(cosines),
          sin(sines), cache(kept) {}

    void lay_out(std::int64_t kv_heads, std::int64_t kv_width) {
        pages.resize(static_cast<std::size_t>(texts * table_row));
        for (std::int64_t i = 0; i < texts; ++i) {
            const std::int64_t count = starts[i + 1] - starts[i];
            text_of.insert(text_of.end(), static_cast<std::size_t>(count), i);
            for (std::int64_t from = 0; from < count; from += 16)
                for (std::int64_t h = 0; h < kv_heads; ++h) tasks.push_back({i, from, std::min(count, from + 16), h});
            for (std::int64_t p = 0; p < table_row; ++p) {
                std::uint8_t* at = cache + tables[i * table_row + p] * layers * page_bytes;
                std::uint8_t* scales = at + kv_width * PAGE;  // of INT8; else they are not looked at
                pages[static_cast<std::size_t>(i * table_row + p)] = {
                    at, at + page_bytes / 2, reinterpret_cast<float*>(scales),
                    reinterpret_cast<float*>(scales + page_bytes / 2), kind};
            }
        }
    }

    const Pages* pages_of(std::int64_t text) const { return pages.data() + text * table_row; }

    void to_next_layer() {
        for (Pages& page : pages) {
            page.keys = static_cast<std::uint8_t*>(page.keys) + page_bytes;
            page.values = static_cast<std::uint8_t*>(page.values) + page_bytes;
            page.key_scales += page_bytes / 4;
            page.value_scales += page_bytes / 4;
        }
    }
};

}  // namespace
