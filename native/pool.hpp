// One loop after another on the same threads. A decoding step is two hundred short loops: a thread started or woken for each
// would cost more than the loop.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "share.hpp"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // about as long as a pause; `yield` takes no time
#endif
}

// A share of a loop, of which its worker takes from the beginning and the others from the end: what one worker reads lies
// together, for a CPU fetches ahead of each beginning in vain.
struct alignas(64) Stretch {
    std::atomic<std::uint64_t> ends{0};  // 32 bits each: from, to

    void hold(std::int64_t from, std::int64_t to) { ends.store(both(from, to), std::memory_order_relaxed); }

    // Up to `most` of what is left; false when nothing is.
    bool take(std::int64_t most, bool last, std::int64_t* from, std::int64_t* to) {
        std::uint64_t seen = ends.load(std::memory_order_relaxed), rest;
        do {
            const auto begin = static_cast<std::int64_t>(seen >> 32), end = static_cast<std::int64_t>(seen & 0xFFFFFFFF);
            if (begin == end) return false;
            const std::int64_t some = end - begin < most ? end - begin : most;
            *from = last ? end - some : begin;
            *to = *from + some;
            rest = last ? both(begin, *from) : both(*to, end);
        } while (!ends.compare_exchange_weak(seen, rest, std::memory_order_relaxed));
        return true;
    }

  private:
    static std::uint64_t both(std::int64_t from, std::int64_t to) {
        return static_cast<std::uint64_t>(from) << 32 | static_cast<std::uint64_t>(to);
    }
};

// together(main) calls main() with helpers beside it; in it run(n, f) calls f(0) … f(n - 1), each once, in any order, on
// all of them. What is taken next is one word, so a helper that comes late finds either a task of the present loop or
// none: no loop waits for it, only the end of all.
class Pool {
  public:
    explicit Pool(int threads) : threads_(threads) {}

    int threads() const { return threads_; }

    template <typename Main>
    void together(const Main& main) {
        const std::thread::id caller = std::this_thread::get_id();
        done_.store(false);
        on_threads(threads_, threads_, [&] {
            if (std::this_thread::get_id() != caller) return help();
            main();
            done_.store(true);
        });
    }

    template <typename F>
    void run(std::int64_t count, const F& f) {
        if (count <= 0) return;
        if (count == 1 || threads_ == 1) {
            for (std::int64_t i = 0; i < count; ++i) f(i);
            return;
        }
        call_ = [](const void* context, std::int64_t i) { (*static_cast<const F*>(context))(i); };
        context_ = &f;
        left_.store(count, std::memory_order_relaxed);
        loop_ = (loop_ + 1) & 0xFFFFFF;
        next_.store(loop_ << 40 | static_cast<std::uint64_t>(count) << 20);
        while (take()) {
        }
        for (int idle = 0; left_.load(std::memory_order_acquire) > 0;) rest(&idle);
    }

  private:
    // The number of the loop (24 bits), its tasks (20) and the next of them (20).
    static bool spent(std::uint64_t word) { return (word & 0xFFFFF) >= (word >> 20 & 0xFFFFF); }

    bool take() {
        std::uint64_t word = next_.load(std::memory_order_acquire);
        while (!spent(word)) {
            if (next_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) {
                call_(context_, static_cast<std::int64_t>(word & 0xFFFFF));
                left_.fetch_sub(1, std::memory_order_release);
                return true;
            }
        }
        return false;
    }

    void help() {
        for (int idle = 0; !done_.load(std::memory_order_acquire);) {
            if (take())
                idle = 0;
            else
                rest(&idle);
        }
    }

    // Half a millisecond, longer than between two loops, is spent at hand; then there are more threads than cores.
    static void rest(int* idle) {
        if (++*idle < 20000)
            relax();
        else
            std::this_thread::sleep_for(std::chrono::microseconds(50));
    }

    const int threads_;
    std::atomic<std::uint64_t> next_{0};
    std::atomic<std::int64_t> left_{0};
    std::atomic<bool> done_{false};
    void (*call_)(const void*, std::int64_t) = nullptr;
    const void* context_ = nullptr;
    std::uint64_t loop_ = 0;
};

}  // namespace
