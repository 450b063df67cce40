// The decoder's functions for CPUs with AVX2.
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include "decoder.hpp"  // before the instructions: what is inline there is other files', too
#pragma GCC target("avx2,fma,f16c")
#define HAS_AVX2
#define LEVEL level_avx2
#define LEVEL_NAME "avx2"
#include "level.hpp"
#else
#include "decoder.hpp"
const Level* level_avx2() { return nullptr; }
#endif
