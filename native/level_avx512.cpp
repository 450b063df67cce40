// The decoder's functions for CPUs with AVX-512 and its products of bytes (VNNI).
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include "decoder.hpp"  // before the instructions: what is inline there is other files', too
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 of its own header
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#define HAS_VNNI
#define LEVEL level_avx512
#define LEVEL_NAME "avx512"
#include "level.hpp"
#else
#include "decoder.hpp"
const Level* level_avx512() { return nullptr; }
#endif
