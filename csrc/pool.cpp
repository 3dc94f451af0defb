#include "pool.h"

#include <chrono>

#include "plain_float.h"

namespace safepatch {
namespace {

// A merge is a handful of short loops: the next one mostly follows within microseconds, and waking a thread
// takes tens of them on a virtual machine.
template <class Ready>
void spin(const Ready& ready) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(30);
    do {
        for (int i = 0; i < 64; ++i) {
            if (ready()) return;
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
    } while (std::chrono::steady_clock::now() < end);
}

}  // namespace

Pool::Pool(int threads) {
    helpers_.reserve(static_cast<size_t>(threads - 1));
    try {
        for (int i = 1; i < threads; ++i) helpers_.emplace_back([this, i] { help(i); });
    } catch (...) {
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
        ++round_;
    }
    opened_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
}

void Pool::run(int64_t count, const Body& body) {
    next_ = 0;
    count_ = count;
    failure_ = nullptr;
    if (count <= 1 || helpers_.empty() || forked()) {
        work(0, body);
    } else {
        {
            const std::lock_guard lock(mutex_);
            body_ = &body;
            ++round_;
        }
        opened_.notify_all();
        work(0, body);
        std::unique_lock lock(mutex_);
        body_ = nullptr;
        if (inside_ != 0) {
            lock.unlock();
            spin([this] { return inside_ == 0; });
            lock.lock();
            left_.wait(lock, [this] { return inside_ == 0; });
        }
    }
    if (failure_) std::rethrow_exception(failure_);
}

void Pool::help(int thread) {
    for (uint64_t seen = 0;;) {
        spin([&] { return round_ != seen; });
        std::unique_lock lock(mutex_);
        opened_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (stop_) return;
        if (body_ == nullptr) continue;
        const Body& body = *body_;
        ++inside_;
        lock.unlock();
        work(thread, body);
        lock.lock();
        if (--inside_ == 0) left_.notify_one();
    }
}

void Pool::work(int thread, const Body& body) {
    const PlainFloat plain;
    try {
        for (int64_t i; (i = next_++) < count_;) body(thread, i);
    } catch (...) {
        next_ = count_.load();
        const std::lock_guard lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
    }
}

}  // namespace safepatch
