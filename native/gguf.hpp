// What reading and writing GGUF's blocks share: here a product is rounded before anything is added to it, as numpy does it.
#pragma once
#include <cstdint>
#include <cstring>

#include "share.hpp"
#include "vector.hpp"

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
