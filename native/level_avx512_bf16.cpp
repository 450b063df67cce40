// The decoder's functions for CPUs with AVX-512, its products of bytes (VNNI) and of bfloat16.
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include "decoder.hpp"  // before the instructions: what is inline there is other files', too
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 of its own header
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c")
#define HAS_VNNI
#define HAS_BF16
#define LEVEL level_avx512_bf16
#define LEVEL_NAME "avx512_bf16"
#include "level.hpp"
#else
#include "decoder.hpp"
const Level* level_avx512_bf16() { return nullptr; }
#endif
