// The decoder's functions for any CPU.
#include <cstdint>
#include <cstring>
#define LEVEL level_plain
#define LEVEL_NAME "plain"
#include "level.hpp"
