// The decoder's functions for CPUs with AMX besides AVX-512: its products of bytes and of bfloat16 by tiles.
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(WITHOUT_AMX)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "decoder.hpp"  // before the instructions: what is inline there is other files', too
#include "tiles.hpp"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 of its own header
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c")
#define HAS_VNNI
#define HAS_BF16
#define AMX_TILES Tiles
#define LEVEL level_tiles
#define LEVEL_NAME "amx"
static const Level* level_tiles();
#include "level.hpp"

namespace {

// Linux keeps room for a thread's 8 KiB of tiles only in a process that has asked for it.
bool may_use_tiles() {
    constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ask, tile_data) == 0;
}

// Sums of two products of small whole numbers, of which any order of operations gives the same bits.
template <typename T>
void small_products(const std::uint8_t* from, std::uint8_t* to) {
    {
        T tiles(16, 9, 64);
        tiles.template zero<0>();
        tiles.template zero<3>();
        tiles.template load<4>(from, 64);
        tiles.template load<5>(from + 1024, 64);
        tiles.template load<6>(from + 2048, 128);
        tiles.template load<7>(from + 2048 + 64, 128);
        for (int i = 0; i < 2; ++i) {
            tiles.template add_bfloats<0, 4, 6>();
            tiles.template add_bfloats<3, 5, 7>();
        }
        tiles.template store<0>(to, 64);
        tiles.template store<3>(to + 1024, 64);
    }
    T tiles(16, 0, 32);
    tiles.template zero<1>();
    tiles.template load<4>(from, 64);
    tiles.template load<7>(from + 2048, 128);
    tiles.template add_bytes<1, 4, 7>();
    tiles.template add_bytes<1, 4, 7>();
    tiles.template store<1>(to + 2048, 64);
}

// A CPU whose tiles do not give what plain loops give is one without.
bool tiles_agree() {
    std::uint16_t numbers[2048];  // bfloat16: -7 … 7
    for (int i = 0; i < 2048; ++i) {
        const float value = static_cast<float>(i * 37 % 15 - 7);
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        numbers[i] = static_cast<std::uint16_t>(bits >> 16);
    }
    std::uint8_t found[3072] = {}, expected[3072] = {};
    small_products<Tiles>(reinterpret_cast<const std::uint8_t*>(numbers), found);
    small_products<SimulatedTiles>(reinterpret_cast<const std::uint8_t*>(numbers), expected);
    return std::memcmp(found, expected, sizeof found) == 0;
}

}  // namespace

const Level* level_amx() {
    static const bool there = has_amx() && may_use_tiles() && tiles_agree();
    return there ? level_tiles() : nullptr;
}
#else
#include "decoder.hpp"
const Level* level_amx() { return nullptr; }
#endif
