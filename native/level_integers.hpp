// Sums of products of bytes for sixteen rows at a time, and what else differs between kinds of CPU.
// Unsigned bytes of weights times signed bytes of activations: exact in 32 bits, so every kind gives the same sums. They
// start at WHOLE, the bits of 1.5 * 2^23: read as a float, a sum below 2^22 is that number more, without a conversion.

constexpr std::int32_t WHOLE = 0x4B400000;
constexpr float WHOLE_FLOAT = 12582912.0f;

#if defined(HAS_VNNI)

struct Sums {
    __m512i lanes;
};

INLINE void start(const std::int32_t* value, Sums* sums) { sums->lanes = _mm512_set1_epi32(*value); }
// From WHOLE - zero * sum, of each row.
INLINE void start(const std::uint8_t* zeros, std::int32_t sum, Sums* sums) {
    const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    sums->lanes = _mm512_sub_epi32(_mm512_set1_epi32(WHOLE), _mm512_mullo_epi32(zero, _mm512_set1_epi32(sum)));
}

struct Weights {  // [16 rows][4 columns]
    __m512i bytes;
};

INLINE void load(const std::uint8_t* from, Weights* weights) { weights->bytes = _mm512_loadu_si512(from); }
INLINE void load_nibbles(const std::uint8_t* from, Weights* low, Weights* high) {
    const __m512i both = _mm512_loadu_si512(from), mask = _mm512_set1_epi8(15);
    low->bytes = _mm512_and_si512(both, mask);
    high->bytes = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
struct Four {  // activations of four columns, for every row
    __m512i bytes;
};

INLINE void load(const std::int8_t* from, Four* four) {
    std::int32_t word;
    std::memcpy(&word, from, 4);
    four->bytes = _mm512_set1_epi32(word);
}
INLINE void add(const Weights& weights, const Four& four, Sums* sums) {
    sums->lanes = _mm512_dpbusd_epi32(sums->lanes, weights.bytes, four.bytes);
}
INLINE void as_floats(const Sums& sums, Values* out) {
    *out = reinterpret_cast<Values>(sums.lanes) - WHOLE_FLOAT;
}
INLINE void load_halves(const std::uint8_t* halves, Values* out) {
    *out = reinterpret_cast<Values>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves))));
}

INLINE bool any_above(const Values* two, float bound) {
    const __m512 line = _mm512_set1_ps(bound);
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(two[0]), line, _CMP_GT_OQ) |
           _mm512_cmp_ps_mask(reinterpret_cast<__m512>(two[1]), line, _CMP_GT_OQ);
}
INLINE void load_bytes(const std::int8_t* from, Values* out) {
    const __m512i whole = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    *out = reinterpret_cast<Values>(_mm512_cvtepi32_ps(whole));
}
INLINE void store_bytes(const Lanes<16>::Whole& whole, std::int8_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(whole)));
}

#elif defined(HAS_AVX2)

// Pairs of columns: of rows 0 1 4 5 and 2 3 6 7 of each half of eight rows; _mm256_hadd_epi32 puts them in order.
struct Sums {
    __m256i pairs[4];
    __m256i first[2];
};

INLINE void start(const std::int32_t* value, Sums* sums) {
    for (auto& pair : sums->pairs) pair = _mm256_setzero_si256();
    for (auto& lanes : sums->first) lanes = _mm256_set1_epi32(*value);
}
INLINE void start(const std::uint8_t* zeros, std::int32_t sum, Sums* sums) {
    start(&WHOLE, sums);
    for (int h = 0; h < 2; ++h) {
        const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * h)));
        sums->first[h] = _mm256_sub_epi32(sums->first[h], _mm256_mullo_epi32(zero, _mm256_set1_epi32(sum)));
    }
}

struct Weights {
    __m256i bytes[2];
};

INLINE void load(const std::uint8_t* from, Weights* weights) {
    for (int h = 0; h < 2; ++h) weights->bytes[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * h));
}
INLINE void load_nibbles(const std::uint8_t* from, Weights* low, Weights* high) {
    const __m256i mask = _mm256_set1_epi8(15);
    Weights both;
    load(from, &both);
    for (int h = 0; h < 2; ++h) {
        low->bytes[h] = _mm256_and_si256(both.bytes[h], mask);
        high->bytes[h] = _mm256_and_si256(_mm256_srli_epi16(both.bytes[h], 4), mask);
    }
}
struct Four {
    __m256i words;
};

INLINE void load(const std::int8_t* from, Four* four) {
    std::int32_t word;
    std::memcpy(&word, from, 4);
    four->words = _mm256_cvtepi8_epi16(_mm_set1_epi32(word));
}
INLINE void add(const Weights& weights, const Four& four, Sums* sums) {
    const __m256i none = _mm256_setzero_si256();
    for (int h = 0; h < 2; ++h) {
        const __m256i low = _mm256_unpacklo_epi8(weights.bytes[h], none), high = _mm256_unpackhi_epi8(weights.bytes[h], none);
        sums->pairs[2 * h] = _mm256_add_epi32(sums->pairs[2 * h], _mm256_madd_epi16(low, four.words));
        sums->pairs[2 * h + 1] = _mm256_add_epi32(sums->pairs[2 * h + 1], _mm256_madd_epi16(high, four.words));
    }
}
INLINE void as_floats(const Sums& sums, Values* out) {
    __m256 halves[2];
    for (int h = 0; h < 2; ++h) {
        const __m256i joined = _mm256_hadd_epi32(sums.pairs[2 * h], sums.pairs[2 * h + 1]);
        halves[h] = _mm256_castsi256_ps(_mm256_add_epi32(joined, sums.first[h]));
    }
    std::memcpy(out, halves, sizeof *out);
    *out -= WHOLE_FLOAT;
}
INLINE void load_halves(const std::uint8_t* from, Values* out) {
    __m256 halves[2];
    for (int h = 0; h < 2; ++h) halves[h] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * h)));
    std::memcpy(out, halves, sizeof *out);
}

#else

struct Sums {
    std::int32_t lanes[16];
};

INLINE void start(const std::int32_t* value, Sums* sums) {
    for (auto& lane : sums->lanes) lane = *value;
}
INLINE void start(const std::uint8_t* zeros, std::int32_t sum, Sums* sums) {
    for (int i = 0; i < 16; ++i) sums->lanes[i] = WHOLE - sum * zeros[i];
}

struct Weights {
    std::uint8_t bytes[64];
};

INLINE void load(const std::uint8_t* from, Weights* weights) { std::memcpy(weights->bytes, from, 64); }
INLINE void load_nibbles(const std::uint8_t* from, Weights* low, Weights* high) {
    for (int i = 0; i < 64; ++i) {
        low->bytes[i] = from[i] & 15;
        high->bytes[i] = from[i] >> 4;
    }
}
struct Four {
    std::int8_t bytes[4];
};

INLINE void load(const std::int8_t* from, Four* four) { std::memcpy(four->bytes, from, 4); }
INLINE void add(const Weights& weights, const Four& four, Sums* sums) {
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 4; ++k) sums->lanes[i] += weights.bytes[4 * i + k] * four.bytes[k];
}
INLINE void as_floats(const Sums& sums, Values* out) {
    std::memcpy(out, sums.lanes, sizeof *out);
    *out -= WHOLE_FLOAT;
}
INLINE void load_halves(const std::uint8_t* from, Values* out) {
    std::uint16_t halves[16];
    std::memcpy(halves, from, sizeof halves);
    for (int i = 0; i < 16; ++i) (*out)[i] = half_to_float(halves[i]);
}

#endif

INLINE void narrow_lanes(const Values& values, Half* to) {
#ifdef HAS_BF16
    const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(values));
    std::memcpy(to, &halves, sizeof halves);
#else
    Lanes<16>::store(&values, to);
#endif
}

#if !defined(HAS_VNNI)
INLINE bool any_above(const Values* two, float bound) {
    return greatest(two[0] > two[1] ? two[0] : two[1]) > bound;
}
INLINE void load_bytes(const std::int8_t* from, Values* out) {
#if defined(HAS_AVX2)
    for (int h = 0; h < 2; ++h) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * h));
        const __m256 half = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        std::memcpy(reinterpret_cast<float*>(out) + 8 * h, &half, 32);
    }
#else
    for (int i = 0; i < 16; ++i) (*out)[i] = from[i];
#endif
}
INLINE void store_bytes(const Lanes<16>::Whole& whole, std::int8_t* to) {
    for (int i = 0; i < 16; ++i) to[i] = static_cast<std::int8_t>(whole[i]);
}
#endif
