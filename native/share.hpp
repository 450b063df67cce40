// Work that several threads share. They are torch's own where its OpenMP can be called (on Linux): threads of ours would
// compete with its idle ones, which spin for milliseconds after each of its loops. Elsewhere they are started anew.
#pragma once
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#define CAMELID_UNIX
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace {

// GNU's OpenMP and LLVM's both export it: calls `work(data)` on a team of threads and waits for all.
using Parallel = void(void (*work)(void*), void* data, unsigned threads, unsigned flags);

#ifdef CAMELID_UNIX
const pid_t LOADED_IN = getpid();
#endif

// None in a process that was forked off: its team's threads are the parent's, and it would wait for them for ever.
inline Parallel* torchs_team() {
#ifdef CAMELID_UNIX
    static Parallel* const found = reinterpret_cast<Parallel*>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return getpid() == LOADED_IN ? found : nullptr;
#else
    return nullptr;
#endif
}

// work(0) … work(count - 1) at once, each on a thread that is started for it, one after the other where none can be.
template <typename Work>
void on_own_threads(std::int64_t count, const Work& work) {
    std::vector<std::thread> others;
    std::int64_t started = 1;
    try {
        for (; started < count; ++started) others.emplace_back([&work, started] { work(started); });
    } catch (const std::system_error&) {  // a container may allow no more
    }
    work(0);
    for (std::int64_t i = started; i < count; ++i) work(i);
    for (auto& thread : others) thread.join();
}

// `run()` on up to `threads` threads at once, the calling one among them; each takes from `tasks` things to be done until
// there is nothing left. Torch's team is always called whole: GNU's OpenMP ends those of its threads that a smaller one
// leaves out, and torch would start them again (pytorch/pytorch#32008).
template <typename Run>
void on_threads(std::int64_t tasks, int threads, const Run& run) {
    const auto work = [](void* data) noexcept { (*static_cast<const Run*>(data))(); };  // a team cannot be thrown out of
    void* const data = const_cast<Run*>(&run);
    if (tasks <= 1 || threads <= 1) return work(data);
    if (Parallel* const team = torchs_team()) return team(work, data, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    try {
        for (std::int64_t i = 1; i < tasks && i < threads; ++i) others.emplace_back(work, data);
    } catch (const std::system_error&) {  // there may be no more of them: those that there are do it all
    }
    work(data);
    for (auto& thread : others) thread.join();
}

// f(0) … f(count - 1), each once, in any order.
template <typename F>
void each(std::int64_t count, int threads, const F& f) {
    std::atomic<std::int64_t> next{0};
    on_threads(count, threads, [&] {
        for (std::int64_t i; (i = next++) < count;) f(i);
    });
}

// `run` over 0 … count, a stretch for each thread; a thread is worth its start from `least` on.
template <typename Run>
void shared_out(std::int64_t count, std::int64_t least, int threads, const Run& run) {
    std::int64_t shares = count / least < threads ? count / least : threads;
    if (shares < 1) shares = 1;
    each(shares, threads, [&](std::int64_t i) { run(count * i / shares, count * (i + 1) / shares); });
}

}  // namespace
