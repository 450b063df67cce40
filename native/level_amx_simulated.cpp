// What level_amx.cpp is, with its tiles in plain loops: slow, for tests on CPUs without them.
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include "decoder.hpp"  // before the instructions: what is inline there is other files', too
#include "tiles.hpp"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 of its own header
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c")
#define HAS_VNNI
#define HAS_BF16
#define AMX_TILES SimulatedTiles
#define LEVEL level_amx_simulated
#define LEVEL_NAME "amx_simulated"
#include "level.hpp"
#else
#include "decoder.hpp"
const Level* level_amx_simulated() { return nullptr; }
#endif
