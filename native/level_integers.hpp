// Sums of products of bytes for a register of rows at a time, and what else differs between kinds of CPU.
// Unsigned bytes of weights times signed bytes of activations: exact in 32 bits, so every kind gives the same sums. They
// start at WHOLE, the bits of 1.5 * 2^23: read as a float, a sum below 2^22 is that number more, without a conversion. Times
// what one is worth, of which two bits are zero, the number itself is exact, and taken off in the same fused operation.

constexpr std::int32_t WHOLE = 0x4B400000;
constexpr float WHOLE_FLOAT = 12582912.0f;
#ifdef HAS_DOTPROD
constexpr int LESS = 128, ABREAST = 4;
#else
constexpr int LESS = 0, ABREAST = LANES == 16 ? 2 : 1;
#endif
// ABREAST: registers of rows whose sums are made together. LESS: what a weight of eight bits, loaded, is below its byte.

#if defined(HAS_VNNI)

struct Sums {
    __m512i lanes;
};

INLINE void start(const std::int32_t* value, Sums* sums) { sums->lanes = _mm512_set1_epi32(*value); }
// From WHOLE - (zero - less) * sum, of each row.
INLINE void start(const std::uint8_t* zeros, int, std::int32_t sum, Sums* sums) {
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
INLINE void times(const Sums& sums, float one, float less, Values* out) {
    const __m512 number = reinterpret_cast<__m512>(sums.lanes);
    *out = reinterpret_cast<Values>(_mm512_fmadd_ps(number, _mm512_set1_ps(one), _mm512_set1_ps(less)));
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
INLINE void store_bytes(const Register::Whole& whole, std::int8_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(whole)));
}

#elif defined(HAS_AVX2)

// Pairs of columns, of rows 0 1 4 5 and of 2 3 6 7: _mm256_hadd_epi32 puts them in order.
struct Sums {
    __m256i pairs[2];
    __m256i first;
};

INLINE void start(const std::int32_t* value, Sums* sums) {
    for (auto& pair : sums->pairs) pair = _mm256_setzero_si256();
    sums->first = _mm256_set1_epi32(*value);
}
INLINE void start(const std::uint8_t* zeros, int, std::int32_t sum, Sums* sums) {
    start(&WHOLE, sums);
    const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
    sums->first = _mm256_sub_epi32(sums->first, _mm256_mullo_epi32(zero, _mm256_set1_epi32(sum)));
}

struct Weights {  // [8 rows][4 columns]
    __m256i bytes;
};

INLINE void load(const std::uint8_t* from, Weights* weights) {
    weights->bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
INLINE void load_nibbles(const std::uint8_t* from, Weights* low, Weights* high) {
    const __m256i mask = _mm256_set1_epi8(15);
    Weights both;
    load(from, &both);
    low->bytes = _mm256_and_si256(both.bytes, mask);
    high->bytes = _mm256_and_si256(_mm256_srli_epi16(both.bytes, 4), mask);
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
    const __m256i low = _mm256_unpacklo_epi8(weights.bytes, none), high = _mm256_unpackhi_epi8(weights.bytes, none);
    sums->pairs[0] = _mm256_add_epi32(sums->pairs[0], _mm256_madd_epi16(low, four.words));
    sums->pairs[1] = _mm256_add_epi32(sums->pairs[1], _mm256_madd_epi16(high, four.words));
}
INLINE void times(const Sums& sums, float one, float less, Values* out) {
    const __m256i joined = _mm256_hadd_epi32(sums.pairs[0], sums.pairs[1]);
    const __m256 number = reinterpret_cast<__m256>(_mm256_add_epi32(joined, sums.first));
    *out = reinterpret_cast<Values>(_mm256_fmadd_ps(number, _mm256_set1_ps(one), _mm256_set1_ps(less)));
}
INLINE void load_halves(const std::uint8_t* from, Values* out) {
    *out = reinterpret_cast<Values>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

#elif defined(HAS_DOTPROD)

struct Sums {
    int32x4_t lanes;
};

INLINE void start(const std::int32_t* value, Sums* sums) { sums->lanes = vdupq_n_s32(*value); }
INLINE void start(const std::uint8_t* zeros, int less, std::int32_t sum, Sums* sums) {
    const std::int32_t each[4] = {zeros[0] - less, zeros[1] - less, zeros[2] - less, zeros[3] - less};
    sums->lanes = vmlsq_n_s32(vdupq_n_s32(WHOLE), vld1q_s32(each), sum);
}

struct Weights {  // [4 rows][4 columns], signed
    int8x16_t bytes;
};

INLINE void load(const std::uint8_t* from, Weights* weights) {
    weights->bytes = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from), vdupq_n_u8(128)));
}
INLINE void load_nibbles(const std::uint8_t* from, Weights* low, Weights* high) {
    const uint8x16_t both = vld1q_u8(from);
    low->bytes = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
    high->bytes = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
}
struct Four {
    int8x16_t bytes;
};

INLINE void load(const std::int8_t* from, Four* four) {
    std::int32_t word;
    std::memcpy(&word, from, 4);
    four->bytes = vreinterpretq_s8_s32(vdupq_n_s32(word));
}
INLINE void add(const Weights& weights, const Four& four, Sums* sums) {
    sums->lanes = vdotq_s32(sums->lanes, weights.bytes, four.bytes);
}
INLINE void times(const Sums& sums, float one, float less, Values* out) {
    const float32x4_t found = vfmaq_n_f32(vdupq_n_f32(less), vreinterpretq_f32_s32(sums.lanes), one);
    std::memcpy(out, &found, sizeof *out);
}
INLINE void load_halves(const std::uint8_t* from, Values* out) {
    const float32x4_t found = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
    std::memcpy(out, &found, sizeof *out);
}

#else

typedef std::int16_t Shorts __attribute__((vector_size(16)));

struct Sums {
    Register::Whole lanes;
};

INLINE void start(const std::int32_t* value, Sums* sums) { sums->lanes = Register::Whole{} + *value; }
INLINE void start(const std::uint8_t* zeros, int, std::int32_t sum, Sums* sums) {
    sums->lanes = WHOLE - sum * Register::Whole{zeros[0], zeros[1], zeros[2], zeros[3]};
}

struct Weights {  // [4 rows][4 columns], as shorts: columns 0 2 of each row, and 1 3
    Shorts even, odd;
};

INLINE void apart(const Register::Bits& bytes, Weights* weights) {
    const Register::Bits even = bytes & 0x00FF00FFu, odd = bytes >> 8 & 0x00FF00FFu;
    std::memcpy(&weights->even, &even, sizeof even);
    std::memcpy(&weights->odd, &odd, sizeof odd);
}
INLINE void load(const std::uint8_t* from, Weights* weights) {
    Register::Bits bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    apart(bytes, weights);
}
INLINE void load_nibbles(const std::uint8_t* from, Weights* low, Weights* high) {
    Register::Bits both;
    std::memcpy(&both, from, sizeof both);
    apart(both & 0x0F0F0F0Fu, low);
    apart(both >> 4 & 0x0F0F0F0Fu, high);
}
struct Four {
    Shorts even, odd;
};

INLINE void load(const std::int8_t* from, Four* four) {
    const std::int8_t a = from[0], b = from[1], c = from[2], d = from[3];
    four->even = Shorts{a, c, a, c, a, c, a, c};
    four->odd = Shorts{b, d, b, d, b, d, b, d};
}
// 255 * 127 is no more than a short holds; two of them are.
INLINE void add_each(const Shorts& products, Sums* sums) {
    Register::Whole both;
    std::memcpy(&both, &products, sizeof both);
    sums->lanes += (both << 16 >> 16) + (both >> 16);
}
INLINE void add(const Weights& weights, const Four& four, Sums* sums) {
    add_each(weights.even * four.even, sums);
    add_each(weights.odd * four.odd, sums);
}
INLINE void times(const Sums& sums, float one, float, Values* out) {
    std::memcpy(out, &sums.lanes, sizeof *out);
    *out = (*out - WHOLE_FLOAT) * one;
}
INLINE void load_halves(const std::uint8_t* from, Values* out) {
    std::uint16_t halves[LANES];
    std::memcpy(halves, from, sizeof halves);
    for (int i = 0; i < LANES; ++i) (*out)[i] = half_to_float(halves[i]);
}

#endif

// Of PARTS registers.
INLINE float greatest_of(const Values* parts) {
    Values most = parts[0];
    for (int h = 1; h < PARTS; ++h) most = most > parts[h] ? most : parts[h];
    return greatest(most);
}

INLINE void narrow_lanes(const Values& values, Half* to) {
#ifdef HAS_BF16
    const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(values));
    std::memcpy(to, &halves, sizeof halves);
#else
    Register::store(&values, to);
#endif
}

#if !defined(HAS_VNNI)
INLINE bool any_above(const Values* parts, float bound) { return greatest_of(parts) > bound; }
INLINE void load_bytes(const std::int8_t* from, Values* out) {
#if defined(HAS_AVX2)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    *out = reinterpret_cast<Values>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
    for (int i = 0; i < LANES; ++i) (*out)[i] = from[i];
#endif
}
INLINE void store_bytes(const Register::Whole& whole, std::int8_t* to) {
    for (int i = 0; i < LANES; ++i) to[i] = static_cast<std::int8_t>(whole[i]);
}
#endif
