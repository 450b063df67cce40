// One loop over many threads.
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

namespace {

// `run` over 0 … count, a stretch for each thread; a thread is worth its start from `least` on.
template <typename Run>
void shared_out(std::int64_t count, std::int64_t least, int threads, const Run& run) {
    std::int64_t shares = count / least < threads ? count / least : threads;
    if (shares < 1) shares = 1;
    std::vector<std::thread> others;
    for (std::int64_t i = 1; i < shares; ++i) others.emplace_back(run, count * i / shares, count * (i + 1) / shares);
    run(0, count / shares);
    for (auto& thread : others) thread.join();
}

}  // namespace
