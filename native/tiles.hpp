// AMX's tiles: eight registers of up to 16 rows of 64 bytes, and sums of products of them. Roles, for a panel's 32 rows:
//   0 1   sums [first tokens, 16 rows each], 2 3 [second tokens, 16 rows each]; float or int32
//   4 5   activations [first tokens] and [second tokens], BLOCK columns
//   6 7   weights [BLOCK columns, 16 rows each], in the order that decoder.hpp says: neighbouring columns in one word
// SimulatedTiles does the same in plain loops, so that what is written for tiles is tested on CPUs that have none.
// Source: Intel's Architecture Instruction Set Extensions Programming Reference, 319433, chapter 3.
#pragma once
#include <cstdint>
#include <cstring>

#include "vector.hpp"

namespace {

// What LDTILECFG reads.
struct TileShapes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};

    // `first` and `second` tokens, whose BLOCK columns are `wide` bytes.
    TileShapes(int first, int second, int wide) {
        const int all_rows[] = {first, first, second, second, first, second, wide / 4, wide / 4};
        for (int i = 0; i < 8; ++i) {
            rows[i] = static_cast<std::uint8_t>(all_rows[i]);
            row_bytes[i] = static_cast<std::uint16_t>(!all_rows[i] ? 0 : i == 4 || i == 5 ? wide : 64);
        }
    }
};
static_assert(sizeof(TileShapes) == 64);

#if defined(__x86_64__) && defined(__GNUC__)
// The thread's own tiles, for as long as this lives. GCC's intrinsics do not say that they touch memory: these do.
struct Tiles {
    Tiles(int first, int second, int wide) {
        const TileShapes shapes(first, second, wide);
        asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
    }
    ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int T>
    inline void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    template <int T>
    inline void load(const void* from, std::int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    inline void store(void* to, std::int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
    }
    // Sums C += A B, of bfloat16.
    template <int C, int A, int B>
    inline void add_bfloats() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
    // Likewise of A's signed and B's unsigned bytes.
    template <int C, int A, int B>
    inline void add_bytes() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};
#endif

struct SimulatedTiles {
    TileShapes shapes;
    alignas(64) std::uint8_t tiles[8][16][64] = {};

    SimulatedTiles(int first, int second, int wide) : shapes(first, second, wide) {}

    template <int T>
    void zero() {
        std::memset(tiles[T], 0, sizeof tiles[T]);
    }
    template <int T>
    void load(const void* from, std::int64_t stride) {
        zero<T>();
        for (std::int64_t r = 0; r < shapes.rows[T]; ++r)
            std::memcpy(tiles[T][r], static_cast<const std::uint8_t*>(from) + r * stride, shapes.row_bytes[T]);
    }
    template <int T>
    void store(void* to, std::int64_t stride) {
        for (std::int64_t r = 0; r < shapes.rows[T]; ++r)
            std::memcpy(static_cast<std::uint8_t*>(to) + r * stride, tiles[T][r], shapes.row_bytes[T]);
    }
    // Even and odd columns are summed apart, and what they give is added to C.
    template <int C, int A, int B>
    void add_bfloats() {
        for (int m = 0; m < shapes.rows[C]; ++m)
            for (int n = 0; n < 16; ++n) {
                float sums[2] = {}, sum;
                for (int k = 0; k < shapes.rows[B] * 2; ++k) {
                    const float a = wide(tiles[A][m] + k * 2), b = wide(tiles[B][k / 2] + (n * 2 + k % 2) * 2);
                    sums[k % 2] = __builtin_fmaf(a, b, sums[k % 2]);
                }
                std::memcpy(&sum, tiles[C][m] + n * 4, 4);
                sum += sums[0] + sums[1];
                std::memcpy(tiles[C][m] + n * 4, &sum, 4);
            }
    }
    template <int C, int A, int B>
    void add_bytes() {
        for (int m = 0; m < shapes.rows[C]; ++m)
            for (int n = 0; n < 16; ++n) {
                std::int32_t sum;
                std::memcpy(&sum, tiles[C][m] + n * 4, 4);
                for (int k = 0; k < shapes.rows[B] * 4; ++k)
                    sum += static_cast<std::int8_t>(tiles[A][m][k]) * tiles[B][k / 4][n * 4 + k % 4];
                std::memcpy(tiles[C][m] + n * 4, &sum, 4);
            }
    }

  private:
    static float wide(const std::uint8_t* at) {
        std::uint16_t half;
        std::memcpy(&half, at, sizeof half);
        return widened(half);
    }
};

}  // namespace
