// Threads that stay. A decoding step is two hundred short loops: a thread started for each would cost more than the loop.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

inline void relax() {
#ifdef __x86_64__
    _mm_pause();
#endif
}

// run(n, f) calls f(0) … f(n - 1), each once, in any order, on the calling thread and the pool's. What is taken next is
// one word, so a thread that wakes late finds either a task of the present loop or none: nobody waits for it.
class Pool {
  public:
    explicit Pool(int threads) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_.store(true);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    template <typename F>
    void run(std::int64_t count, const F& f) {
        if (count <= 0) return;
        if (count == 1 || workers_.empty()) {
            for (std::int64_t i = 0; i < count; ++i) f(i);
            return;
        }
        call_ = [](const void* context, std::int64_t i) { (*static_cast<const F*>(context))(i); };
        context_ = &f;
        left_.store(count, std::memory_order_relaxed);
        loop_ = (loop_ + 1) & 0xFFFFFF;
        next_.store(loop_ << 40 | static_cast<std::uint64_t>(count) << 20);
        if (sleeping_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
        while (take()) {
        }
        while (left_.load(std::memory_order_acquire) > 0) relax();
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

    void work() {
        int idle = 0;
        while (!stop_.load(std::memory_order_relaxed)) {
            if (take()) {
                idle = 0;
            } else if (++idle < 20000) {  // about half a millisecond: longer than between two loops or two steps
                relax();
            } else {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, [this] { return stop_.load() || !spent(next_.load()); });
                sleeping_.fetch_sub(1);
                idle = 0;
            }
        }
    }

    std::vector<std::thread> workers_;
    std::atomic<std::uint64_t> next_{0};
    std::atomic<std::int64_t> left_{0};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
    void (*call_)(const void*, std::int64_t) = nullptr;
    const void* context_ = nullptr;
    std::uint64_t loop_ = 0;
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace
