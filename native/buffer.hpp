// Room for numbers, at a cache line.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace {

// Memory that grows and is never filled for nothing.
template <typename T>
struct Buffer {
    std::unique_ptr<T[]> data;
    std::size_t size = 0;

    T* reserve(std::int64_t wanted) {
        const std::size_t count = static_cast<std::size_t>(wanted) + 64 / sizeof(T);
        if (count > size) {
            data.reset(new T[count]);
            size = count;
        }
        const auto at = reinterpret_cast<std::uintptr_t>(data.get());
        return reinterpret_cast<T*>((at + 63) / 64 * 64);
    }
};

}  // namespace
