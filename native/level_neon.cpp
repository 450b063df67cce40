// The decoder's functions for ARM's CPUs with products of bytes (dotprod): Apple's, and servers' since 2019.
#include <cstdint>
#include <cstring>
#if defined(__aarch64__) && (defined(__ARM_FEATURE_DOTPROD) || (defined(__GNUC__) && !defined(__clang__)))
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif

#include "decoder.hpp"  // before the instructions: what is inline there is other files', too
#ifndef __ARM_FEATURE_DOTPROD
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define HAS_DOTPROD
#define LEVEL level_dotprod
#define LEVEL_NAME "neon"
static const Level* level_dotprod();
#include "level.hpp"

const Level* level_neon() {
#ifdef __linux__
    constexpr unsigned long products_of_bytes = 1ul << 20;  // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & products_of_bytes ? level_dotprod() : nullptr;
#else
    return level_dotprod();  // the compiler was told so
#endif
}
#else
#include "decoder.hpp"
const Level* level_neon() { return nullptr; }
#endif
