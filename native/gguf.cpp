// GGUF's quantised blocks to floats, the bits that camelid/formats/gguf_blocks.py gives (ggml-quants.c, ggml-common.h).
#include "gguf.hpp"

namespace {

constexpr float LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

using Bytes = const std::uint8_t*;

INLINE float half_at(Bytes b, int at) { return half_to_float(static_cast<std::uint16_t>(b[at] | b[at + 1] << 8)); }

// Stretches of WIDTH bytes, each holding 8 / BITS planes of WIDTH values, the lowest bits first; `move` higher, beside what
// `out` has of other bits.
template <int WIDTH, int BITS, int BYTES, bool ADD = false>
INLINE void planes(Bytes raw, std::uint8_t* out, int move = 0) {
    for (int start = 0; start < BYTES; start += WIDTH)
        for (int p = 0; p < 8; p += BITS)
            for (int i = 0; i < WIDTH; ++i, ++out) {
                const auto value = static_cast<std::uint8_t>((raw[start + i] >> p & ((1 << BITS) - 1)) << move);
                *out = ADD ? *out | value : value;
            }
}

// scale * (q - zero) of each of COUNT groups, less its offset where there are any.
template <int COUNT, int SIZE, bool OFFSETS = false>
INLINE void scaled(const float* scale, const std::uint8_t* q, int zero, float* out, const float* offset = nullptr) {
    for (int g = 0; g < COUNT; ++g)
        for (int i = 0; i < SIZE; ++i) {
            const float product = scale[g] * static_cast<float>(q[g * SIZE + i] - zero);
            out[g * SIZE + i] = OFFSETS ? product - offset[g] : product;
        }
}

// A block of 32: the scale, of some the least value, of some a fifth bit each, and nibbles.
template <bool LEAST, bool FIFTH>
void block_of_32(Bytes b, float* out) {
    std::uint8_t q[32];
    const float d = half_at(b, 0), least = LEAST ? -half_at(b, 2) : 0;
    b += LEAST ? 4 : 2;
    planes<16, 4, 16>(b + (FIFTH ? 4 : 0), q);
    if (FIFTH)
        for (int i = 0; i < 32; ++i) q[i] = static_cast<std::uint8_t>(q[i] | (b[i / 8] >> i % 8 & 1) << 4);
    LEAST ? scaled<1, 32, true>(&d, q, 0, out, &least) : scaled<1, 32>(&d, q, FIFTH ? 16 : 8, out);
}

void q8_0(Bytes b, float* out) {
    const float d = half_at(b, 0);
    for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(static_cast<std::int8_t>(b[2 + i]));
}

void iq4_nl(Bytes b, float* out) {
    std::uint8_t q[32];
    planes<16, 4, 16>(b + 2, q);
    for (int i = 0; i < 32; ++i) out[i] = half_at(b, 0) * LEVELS[q[i]];
}

// Blocks of 256.

void q2_k(Bytes b, float* out) {
    const float d = half_at(b, 80), least = half_at(b, 82);
    std::uint8_t q[256];
    float scale[16], offset[16];
    planes<32, 2, 64>(b + 16, q);
    for (int g = 0; g < 16; ++g) {
        scale[g] = d * static_cast<float>(b[g] & 15);
        offset[g] = least * static_cast<float>(b[g] >> 4);
    }
    scaled<16, 16, true>(scale, q, 0, out, offset);
}

void q3_k(Bytes b, float* out) {
    const float d = half_at(b, 108);
    std::uint8_t q[256], high[16];
    float scale[16];
    planes<32, 2, 64>(b + 32, q);
    planes<32, 1, 32, true>(b, q, 2);
    planes<4, 2, 4>(b + 104, high);
    for (int g = 0; g < 16; ++g)
        scale[g] = d * static_cast<float>(((g < 8 ? b[96 + g] & 15 : b[88 + g] >> 4) | high[g] << 4) - 32);
    scaled<16, 16>(scale, q, 4, out);
}

// Eight scales and eight offsets of six bits in 12 bytes.
INLINE void six_bits(Bytes raw, float d, float least, float* scale, float* offset) {
    for (int g = 0; g < 4; ++g) {
        scale[g] = d * static_cast<float>(raw[g] & 63);
        scale[4 + g] = d * static_cast<float>((raw[8 + g] & 15) | (raw[g] >> 2 & 48));
        offset[g] = least * static_cast<float>(raw[4 + g] & 63);
        offset[4 + g] = least * static_cast<float>(raw[8 + g] >> 4 | (raw[4 + g] >> 2 & 48));
    }
}

template <bool FIFTH>
void q4_or_q5_k(Bytes b, float* out) {
    std::uint8_t q[256];
    float scale[8], offset[8];
    six_bits(b + 4, half_at(b, 0), half_at(b, 2), scale, offset);
    planes<32, 4, 128>(b + (FIFTH ? 48 : 16), q);
    if (FIFTH) planes<32, 1, 32, true>(b + 16, q, 4);
    scaled<8, 32, true>(scale, q, 0, out, offset);
}

void q6_k(Bytes b, float* out) {
    const float d = half_at(b, 208);
    std::uint8_t q[256];
    float scale[16];
    planes<64, 4, 128>(b, q);
    planes<32, 2, 64, true>(b + 128, q, 4);
    for (int g = 0; g < 16; ++g) scale[g] = d * static_cast<float>(static_cast<std::int8_t>(b[192 + g]));
    scaled<16, 16>(scale, q, 32, out);
}

void iq4_xs(Bytes b, float* out) {
    const float d = half_at(b, 0);
    std::uint8_t q[256];
    planes<16, 4, 128>(b + 8, q);
    for (int g = 0; g < 8; ++g) {
        const int low = b[4 + g / 2] >> 4 * (g % 2) & 15, high = b[2 + g / 4] >> 2 * (g % 4) & 3;
        const float scale = d * static_cast<float>((low | high << 4) - 32);
        for (int i = 0; i < 32; ++i) out[g * 32 + i] = scale * LEVELS[q[g * 32 + i]];
    }
}

// COUNT bytes, each a value low and one COUNT columns after it high, as `Integers` of camelid/model/quantized.py keeps them:
// two neighbours a byte, the even one low.
template <int COUNT>
INLINE void neighbours(Bytes b, std::uint8_t* q) {
    for (int i = 0; i < COUNT / 2; ++i) {
        const int even = b[2 * i], odd = b[2 * i + 1];
        q[i] = static_cast<std::uint8_t>((even & 15) | odd << 4);
        q[COUNT / 2 + i] = static_cast<std::uint8_t>(even >> 4 | (odd & 0xF0));
    }
}

// A block's whole numbers; of each group the scale and, where a group has one, the least value, in float16.
void whole_q8_0(Bytes b, std::uint8_t* q, std::uint16_t* scale, std::uint16_t*) {
    std::memcpy(scale, b, 2);
    for (int i = 0; i < 32; ++i) q[i] = static_cast<std::uint8_t>(b[2 + i] ^ 128);
}

void whole_q4_0(Bytes b, std::uint8_t* q, std::uint16_t* scale, std::uint16_t*) {
    std::memcpy(scale, b, 2);
    neighbours<16>(b + 2, q);
}

void whole_q4_1(Bytes b, std::uint8_t* q, std::uint16_t* scale, std::uint16_t* least) {
    std::memcpy(scale, b, 2);
    std::memcpy(least, b + 2, 2);
    neighbours<16>(b + 4, q);
}

void whole_q4_k(Bytes b, std::uint8_t* q, std::uint16_t* scale, std::uint16_t* least) {
    float wide[8], offset[8];
    six_bits(b + 4, half_at(b, 0), half_at(b, 2), wide, offset);
    for (int g = 0; g < 8; ++g) {
        scale[g] = float_to_half(wide[g]);
        least[g] = float_to_half(-offset[g]);
    }
    for (int i = 0; i < 4; ++i) neighbours<32>(b + 16 + i * 32, q + i * 32);
}

struct WholeKind {
    int values, bytes, numbers;  // of a block: values, bytes, and bytes of its whole numbers
    void (*whole)(Bytes, std::uint8_t*, std::uint16_t*, std::uint16_t*);
};

// In the order of WHOLE in camelid/kernels/gguf.py.
constexpr WholeKind WHOLE_KINDS[] = {
    {32, 34, 32, whole_q8_0}, {32, 18, 16, whole_q4_0}, {32, 20, 16, whole_q4_1}, {256, 144, 128, whole_q4_k}};

struct BlockKind {
    int values, bytes;
    void (*expand)(Bytes, float*);
};

// In the order of KINDS in camelid/kernels/gguf.py.
constexpr BlockKind KINDS[] = {
    {32, 34, q8_0},         {32, 18, block_of_32<false, false>}, {32, 20, block_of_32<true, false>},
    {32, 22, block_of_32<false, true>}, {32, 24, block_of_32<true, true>},   {32, 18, iq4_nl},
    {256, 84, q2_k},        {256, 110, q3_k},                    {256, 144, q4_or_q5_k<false>},
    {256, 176, q4_or_q5_k<true>},       {256, 210, q6_k},                    {256, 136, iq4_xs},
};

}  // namespace

extern "C" void camelid_gguf_expand(int kind, const std::uint8_t* raw, std::int64_t blocks, float* out, int threads) {
    const auto& k = KINDS[kind];
    shared_out(blocks, 1024, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) k.expand(raw + i * k.bytes, out + i * k.values);
    });
}

// Their whole numbers, and a scale and a least value (which may be null) of every 32, in float16.
extern "C" void camelid_gguf_whole(int kind, const std::uint8_t* raw, std::int64_t blocks, std::uint8_t* q,
                                   std::uint16_t* scales, std::uint16_t* least, int threads) {
    const auto& k = WHOLE_KINDS[kind];
    const int groups = k.values / 32;
    shared_out(blocks, 1024, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i)
            k.whole(raw + i * k.bytes, q + i * k.numbers, scales + i * groups, least ? least + i * groups : nullptr);
    });
}
