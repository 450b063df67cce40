// Numbers into GGUF's quantised blocks, as camelid/formats/gguf_pack.py does it: Q8_0 and Q4_0 to the bit, of the _K types
// by sums in another order, so that of two candidates that are equally good it may take the other one.
#include "gguf.hpp"

namespace {

typedef double Eight __attribute__((vector_size(64)));  // one of each of a block's eight groups
using Sixteen = Lanes<16>::Values;                      // of its sixteen

constexpr float ROUNDS = 12582912.0f;              // 1.5 * 2^23: added and taken away, a number becomes a whole one
constexpr double ROUNDS_DOUBLE = 6755399441055744.0;  // 1.5 * 2^52

INLINE float reciprocal(float x) { return x == 0 ? 0 : 1 / x; }
INLINE float between(float x, float low, float high) { return x > low ? x < high ? x : high : low; }  // no number: low
INLINE float whole_between(float x, float low, float high) { return between(between(x, -1e6f, 1e6f) + ROUNDS - ROUNDS, low, high); }

INLINE float with_sign_of(float size, float x) { return x < 0 ? -size : size; }

INLINE void store_half(std::uint16_t half, std::uint8_t* to) { std::memcpy(to, &half, 2); }

// Whole numbers of BITS in stretches of 8 / BITS planes of WIDTH.
template <int WIDTH, int BITS>
INLINE void store_planes(const std::uint8_t* q, int move, std::uint8_t* out) {
    for (int start = 0; start < 256; start += WIDTH * 8 / BITS)
        for (int i = 0; i < WIDTH; ++i) {
            int byte = 0;
            for (int p = 0; p < 8 / BITS; ++p) byte |= (q[start + p * WIDTH + i] >> move & ((1 << BITS) - 1)) << p * BITS;
            *out++ = static_cast<std::uint8_t>(byte);
        }
}

// Of `count`, a multiple of 8, the first of those that none exceeds in size.
INLINE float of_greatest_size(const float* x, int count) {
    Lanes<8>::Values here, low = {}, high = {};
    for (int i = 0; i < count; i += 8) {
        Lanes<8>::load(x + i, &here);
        low = here < low ? here : low;
        high = here > high ? here : high;
    }
    low = -low;
    const float above = greatest(high), below = greatest(low);
    if (above != below) return above > below ? above : -below;
    for (int i = 0; i < count; ++i)
        if (x[i] == above || x[i] == -below) return x[i];
    return 0;
}

INLINE void q8_0(const float* x, std::uint8_t* out) {
    const float top = of_greatest_size(x, 32), d = ((top < 0 ? -top : top) + 0.0f) / 127, inverse = reciprocal(d);
    store_half(float_to_half(d), out);
    for (int i = 0; i < 32; ++i) {
        const float steps = x[i] * inverse, size = steps < 0 ? -steps : steps;
        out[2 + i] = static_cast<std::uint8_t>(static_cast<int>(with_sign_of(between(size + 0.5f, 0, 127), steps)));
    }
}

INLINE void q4_0(const float* x, std::uint8_t* out) {
    const float d = of_greatest_size(x, 32) / -8, inverse = reciprocal(d);
    store_half(float_to_half(d), out);
    int q[32];
    for (int i = 0; i < 32; ++i) q[i] = static_cast<int>(between(x[i] * inverse + 8.5f, 0, 15));
    for (int i = 0; i < 16; ++i) out[2 + i] = static_cast<std::uint8_t>(q[i] | q[16 + i] << 4);
}

// What `_scale_and_offset` looks for, of a block's eight groups at once.
template <int LEVELS>
INLINE void search(const float* x, double least, int tries, float* scale_out, float* offset_out) {
    constexpr double top = LEVELS - 1;
    Eight v[32], weight[32], q[32], squares = {}, low = {}, high, sum_w = {}, sum_x = {};
    for (int i = 0; i < 32; ++i)
        for (int g = 0; g < 8; ++g) v[i][g] = x[g * 32 + i];
    high = v[0];
    for (int i = 0; i < 32; ++i) {
        squares += v[i] * v[i];
        low = v[i] < low ? v[i] : low;
        high = v[i] > high ? v[i] : high;
    }
    squares /= 32.0;
    for (int g = 0; g < 8; ++g) squares[g] = __builtin_sqrt(squares[g]);
    for (int i = 0; i < 32; ++i) {
        weight[i] = squares + (v[i] < 0.0 ? -v[i] : v[i]);
        sum_w += weight[i];
        sum_x += weight[i] * v[i];
    }
    Eight width = high - low;
    width = width < 1e-30 ? Eight{} + 1e-30 : width;
    const auto rounded = [&](const Eight& base, const Eight& factor) {
        for (int i = 0; i < 32; ++i) {
            Eight whole = (v[i] - base) * factor + ROUNDS_DOUBLE - ROUNDS_DOUBLE;
            whole = whole < 0.0 ? Eight{} : whole;
            q[i] = whole > top ? Eight{} + top : whole;
        }
    };
    const auto error = [&](const Eight& s, const Eight& m, Eight* sum) {
        *sum = Eight{};
        for (int i = 0; i < 32; ++i) {
            const Eight off = s * q[i] + m - v[i];
            *sum += weight[i] * (off * off);
        }
    };
    Eight scale = width / top, offset = low, best, found;
    rounded(low, 1.0 / width * top);
    error(scale, offset, &best);
    for (int number = 0; number <= tries; ++number) {
        Eight range = high - offset, sum_q = {}, sum_qq = {}, sum_xq = {};
        range = range < 1e-30 ? Eight{} + 1e-30 : range;
        rounded(offset, 1.0 / range * (least + 0.1 * number + top));  // as torch divides a number by a tensor
        for (int i = 0; i < 32; ++i) {
            const Eight wq = weight[i] * q[i];
            sum_q += wq;
            sum_qq += wq * q[i];
            sum_xq += wq * v[i];
        }
        const Eight det = sum_w * sum_qq - sum_q * sum_q, safe = det > 0.0 ? det : Eight{} + 1.0;
        Eight s = (sum_w * sum_xq - sum_x * sum_q) / safe, m = (sum_qq * sum_x - sum_q * sum_xq) / safe;
        s = m > 0.0 ? sum_xq / (sum_qq < 1e-30 ? Eight{} + 1e-30 : sum_qq) : s;  // an offset can only take away
        m = m > 0.0 ? Eight{} : m;
        error(s, m, &found);
        const auto better = (det > 0.0) & (found < best);
        scale = better ? s : scale;
        offset = better ? m : offset;
        best = better ? found : best;
    }
    for (int g = 0; g < 8; ++g) {
        scale_out[g] = static_cast<float>(scale[g] < 0 ? 0 : scale[g]);
        offset_out[g] = static_cast<float>(-offset[g]);
    }
}

// Eight numbers, none negative, as whole ones of six bits and their scale in float16; they become what both say.
INLINE std::uint16_t six_bits(float* x, std::uint8_t* q) {
    const float top = of_greatest_size(x, 8) / 63, inverse = reciprocal(top);
    const std::uint16_t d = float_to_half(top);
    for (int g = 0; g < 8; ++g) {
        const float whole = whole_between(x[g] * inverse, 0, 63);
        q[g] = static_cast<std::uint8_t>(whole);
        x[g] = half_to_float(d) * whole;
    }
    return d;
}

template <bool FIFTH>
INLINE void q4_or_q5_k(const float* x, std::uint8_t* out) {
    float scale[8], offset[8];
    std::uint8_t scales[8], offsets[8], q[256];
    FIFTH ? search<32>(x, -0.5, 15, scale, offset) : search<16>(x, -1.0, 20, scale, offset);
    store_half(six_bits(scale, scales), out);
    store_half(six_bits(offset, offsets), out + 2);
    for (int g = 0; g < 4; ++g) {
        out[4 + g] = static_cast<std::uint8_t>(scales[g] | scales[4 + g] >> 4 << 6);
        out[8 + g] = static_cast<std::uint8_t>(offsets[g] | offsets[4 + g] >> 4 << 6);
        out[12 + g] = static_cast<std::uint8_t>((scales[4 + g] & 15) | (offsets[4 + g] & 15) << 4);
    }
    for (int g = 0; g < 8; ++g) {
        const float inverse = reciprocal(scale[g]);  // of nothing: nothing
        for (int i = g * 32; i < g * 32 + 32; ++i)
            q[i] = static_cast<std::uint8_t>(whole_between((x[i] + offset[g]) * inverse, 0, FIFTH ? 31 : 15));
    }
    if (FIFTH) store_planes<32, 1>(q, 4, out + 16);
    store_planes<32, 4>(q, 0, out + (FIFTH ? 48 : 16));
}

INLINE void q6_k(const float* x, std::uint8_t* out) {
    Sixteen v[16], most = {}, size = {}, best = Sixteen{} - 1.0f, scale = {};
    for (int i = 0; i < 16; ++i) {
        for (int g = 0; g < 16; ++g) v[i][g] = x[g * 16 + i];
        const Sixteen here = v[i] < 0.0f ? -v[i] : v[i];
        most = here > size ? v[i] : most;
        size = here > size ? here : size;
    }
    const Sixteen inverse = most == 0.0f ? Sixteen{} : 1.0f / most;
    for (int turn = 0; turn < 19; ++turn) {
        const int number = turn == 0 ? 0 : turn < 10 ? turn - 10 : turn - 9;
        const auto wanted = static_cast<float>(-(32 + 0.1 * number));
        Sixteen sum_xq = {}, sum_qq = {};
        for (int i = 0; i < 16; ++i) {
            Sixteen q = v[i] * (wanted * inverse) + ROUNDS - ROUNDS;
            q = q < -32.0f ? Sixteen{} - 32.0f : q;
            q = q > 31.0f ? Sixteen{} + 31.0f : q;
            const Sixteen weight = v[i] * v[i];
            sum_xq += weight * v[i] * q;
            sum_qq += weight * q * q;
        }
        const Sixteen safe = sum_qq < 1e-38f ? Sixteen{} + 1e-38f : sum_qq;
        const Sixteen gain = sum_qq > 0.0f ? sum_xq * sum_xq / safe : Sixteen{} - 1.0f;
        scale = gain > best ? sum_xq / safe : scale;
        best = gain > best ? gain : best;
    }
    float found[16];
    std::memcpy(found, &scale, sizeof found);
    const float step = of_greatest_size(found, 16) / -128, many = reciprocal(step);
    const std::uint16_t d = float_to_half(step);
    std::uint8_t q[256];
    for (int g = 0; g < 16; ++g) {
        const float whole = whole_between(found[g] * many, -128, 127), each = reciprocal(half_to_float(d) * whole);
        out[192 + g] = static_cast<std::uint8_t>(static_cast<int>(whole));
        for (int i = g * 16; i < g * 16 + 16; ++i)
            q[i] = static_cast<std::uint8_t>(static_cast<int>(whole_between(x[i] * each, -32, 31)) + 32);
    }
    store_planes<64, 4>(q, 0, out);
    store_planes<32, 2>(q, 4, out + 128);
    store_half(d, out + 208);
}

struct Packing {
    int kind;
    const float* x;
    std::uint8_t* out;
};

// In the order of PACKED in camelid/kernels/gguf.py.
INLINE void part(const Packing& p, std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) switch (p.kind) {
            case 0: q8_0(p.x + i * 32, p.out + i * 34); break;
            case 1: q4_0(p.x + i * 32, p.out + i * 18); break;
            case 2: q4_or_q5_k<false>(p.x + i * 256, p.out + i * 144); break;
            case 3: q4_or_q5_k<true>(p.x + i * 256, p.out + i * 176); break;
            default: q6_k(p.x + i * 256, p.out + i * 210);
        }
}

void part_plain(const Packing& p, std::int64_t first, std::int64_t last) { part(p, first, last); }
#ifdef CAMELID_X86
TARGET_AVX2 void part_avx2(const Packing& p, std::int64_t first, std::int64_t last) { part(p, first, last); }
TARGET_AVX512 void part_avx512(const Packing& p, std::int64_t first, std::int64_t last) { part(p, first, last); }
#endif

}  // namespace

extern "C" void camelid_gguf_pack(int kind, const float* x, std::int64_t blocks, std::uint8_t* out, int threads) {
    const Packing all{kind, x, out};
    shared_out(blocks, 64, threads,
               [&all, run = CHOSEN(part)](std::int64_t first, std::int64_t last) { run(all, first, last); });
}
