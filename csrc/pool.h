// A small persistent thread pool: one loop at a time, and the calling thread works along.
#pragma once

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace safepatch {

class Pool {
  public:
    using Body = std::function<void(int thread, int64_t index)>;

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(helpers_.size()) + 1; }
    // In a forked child the helpers are missing: `run` then works alone, and the pool can't be destroyed.
    bool forked() const { return getpid() != owner_; }

    // Call `body` for every index in [0, count), on threads numbered from 0 (the caller). Not reentrant, and
    // one caller at a time. Rethrows the first exception of a body when all threads have stopped.
    void run(int64_t count, const Body& body);

  private:
    void stop();
    void help(int thread);
    void work(int thread, const Body& body);

    const pid_t owner_ = getpid();
    std::mutex mutex_;
    std::condition_variable opened_, left_;
    std::atomic<uint64_t> round_{0};  // counts loops; changes under the mutex
    std::atomic<int> inside_{0};      // helpers in the loop; changes under the mutex
    std::atomic<int64_t> next_{0}, count_{0};
    const Body* body_ = nullptr;  // null while no loop is open; helpers that wake up late stay out
    std::exception_ptr failure_;
    bool stop_ = false;
    std::vector<std::thread> helpers_;
};

}  // namespace safepatch
