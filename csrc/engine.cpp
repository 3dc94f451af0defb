#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdlib>
#include <cstring>
#include <new>

namespace safepatch {
namespace {

Random random_of(const sp_patch& patch) {
    Random random{};
    auto k0 = static_cast<uint32_t>(patch.random_key), k1 = static_cast<uint32_t>(patch.random_key >> 32);
    for (auto& round : random.rounds) {
        round[0] = k0;
        round[1] = k1;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    random.all = patch.keep >= SP_KEEP_ALL;
    random.keep = static_cast<uint32_t>(patch.keep);
    return random;
}

// Can the pass be done without another look at all entries? Then it costs as little as there are entries to write:
// `patch_up` says what it needs. Of steps that are joined by a mean, or by whose sum is the elected sign, it knows
// nothing.
bool from_lists(const Pass& pass) {
    const std::vector<Task>& tasks = *pass.tasks;
    const int32_t acts = pass.block->acts;
    const bool alone = acts == SP_ALONE || (acts == SP_ALL && tasks.size() == 1);
    return pass.out != nullptr && alone && pass.block->join == SP_SUM &&
           std::all_of(tasks.begin(), tasks.end(), [](const Task& task) {
               if (task.patch == nullptr) return true;
               const bool delta_at_hand = task.patch->importance == SP_MAGNITUDE || task.patch->kind != SP_LORA;
               return task.eligible == Eligible::listed && delta_at_hand &&
                      (task.random.all || !task.retain_selected);
           });
}

void add(Fault& to, const Fault& more) { to.add(more.count, more.first); }

// In units of 2^-360, which all sums are whole numbers of.
void add(uint64_t (&to)[12], int64_t more, int shift) {
    // Two words, and above them the sign.
    const uint64_t sign = more < 0 ? ~uint64_t{0} : 0;
    const auto wide = static_cast<unsigned __int128>(static_cast<__int128>(more)) << shift % 64;
    const uint64_t parts[] = {static_cast<uint64_t>(wide), static_cast<uint64_t>(wide >> 64), sign};
    unsigned __int128 carry = 0;
    for (int first = shift / 64, k = first; k < 12; ++k) {
        carry += static_cast<unsigned __int128>(to[k]) + parts[std::min(k - first, 2)];
        to[k] = static_cast<uint64_t>(carry);
        carry >>= 64;
    }
}

void add(uint64_t (&to)[12], const ExactSum& more) {
    constexpr int kHalf = 62;
    for (int i = 0; i < kExponents; ++i) {
        const int shift = i - 298 - 52 + 360;
        const __int128 low = more.of[i] & ((int64_t{1} << kHalf) - 1), high = more.of[i] >> kHalf;
        if (high != 0) add(to, static_cast<int64_t>(high), shift + kHalf);
        if (low != 0) add(to, static_cast<int64_t>(low), shift);
    }
}

void add(sp_kept& to, const Remains& more) {
    to.acted += more.acted;
    to.changed += more.changed;
    to.saturated += more.saturated;
    add(to.along, more.along);
    add(to.asked, more.asked);
    add(to.moved, more.moved);
}

}  // namespace

void Buffer::Free::operator()(void* p) const { std::free(p); }

void* Buffer::room_bytes(size_t n) {
    if (n > size_) {
        data_.reset();
        size_ = 0;
        const size_t size = (n + 63) / 64 * 64;
        data_.reset(std::aligned_alloc(64, size));
        if (!data_) throw std::bad_alloc();
        size_ = size;
    }
    return data_.get();
}

Chunks::Chunks(const sp_block& block)
    : entries_(block.entries), lead_(std::min<int64_t>(-block.start & 3, block.entries)), size_(kChunk) {
    // A LoRA's factor is read once for four rows, or as many as fit a chunk: then no row should be cut.
    for (size_t p = 0; p < block.patch_count; ++p) {
        const sp_patch& patch = block.patches[p];
        if (!patch.present || patch.kind != SP_LORA || patch.lora.cols == 0) continue;
        const int64_t rows = std::min<int64_t>(4, kChunk / patch.lora.cols) * patch.lora.cols;
        if (rows > 0 && rows % 4 == 0) size_ = kChunk / rows * rows;
    }
    count_ = (lead_ > 0 ? 1 : 0) + (entries_ - lead_ + size_ - 1) / size_;
}

Range Chunks::at(int64_t slot) const {
    const int64_t word = slot * ((size_ + 63) / 64);
    if (lead_ > 0 && slot == 0) return {0, lead_, 0, word};
    const int64_t begin = lead_ + (slot - (lead_ > 0 ? 1 : 0)) * size_;
    return {begin, std::min(size_, entries_ - begin), slot, word};
}

Engine::Engine(int threads, const Isa& isa) : isa_(isa), pool_(threads) {
    for (int i = 0; i < threads; ++i) threads_.push_back(std::make_unique<Thread>());
}

// One per patch: find out from the inputs what is eligible.
std::vector<Task> Engine::fresh_tasks(const sp_block& block) const {
    std::vector<Task> tasks(block.patch_count);
    for (size_t p = 0; p < tasks.size(); ++p) {
        if (!block.patches[p].present) continue;
        tasks[p].patch = &block.patches[p];
        tasks[p].random = random_of(block.patches[p]);
        tasks[p].retain_eligible = block.order == SP_RETAIN_FIRST;
        tasks[p].retain_selected = block.order == SP_SELECT_FIRST;
    }
    return tasks;
}

// Clear the threads' findings and give them all the memory that a pass needs.
void Engine::prepare(const sp_block& block, const std::vector<Request>& requests, bool listing) {
    const size_t patches = block.patch_count;
    size_t bins = 0;
    for (const Request& request : requests) bins += 2 * static_cast<size_t>(request.bins);
    for (auto& thread : threads_) {
        if (thread->space.lanes.size() != patches) thread->space.lanes.resize(patches);
        if (thread->lora.size() < patches) thread->lora.resize(patches);
        if (thread->lists.size() < patches) thread->lists.resize(patches);
        if (thread->places.size() < patches) thread->places.resize(patches);
        thread->sinks.assign(patches, Sink{});
        thread->space.lora.assign(patches, nullptr);
        thread->written = {};
        if (block.codes != nullptr) thread->written.kept.resize(patches);
        thread->uncollected = 0;
        for (size_t p = 0; p < patches; ++p) {
            const sp_patch& patch = block.patches[p];
            if (patch.present && patch.kind == SP_LORA) {
                thread->space.lora[p] = thread->lora[p].room<float>(kChunk + kSlack);
            }
            if (!listing) continue;
            thread->sinks[p].list = thread->lists[p].room<uint32_t>(kChunk + kSlack);
            thread->sinks[p].places = thread->places[p].room<uint16_t>(kChunk + kSlack);
        }
        auto* counts = thread->bins.room<uint32_t>(bins);
        if (bins > 0) std::memset(counts, 0, bins * sizeof(uint32_t));
        for (const Request& request : requests) {
            thread->sinks[request.patch].windows.push_back({request.lo, request.shift, request.bins, counts});
            counts += 2 * static_cast<size_t>(request.bins);
        }
    }
}

// Move a thread's counts into the requests, and start them again from zero.
void Engine::collect(Thread& thread, const std::vector<Request>& requests) {
    const std::lock_guard lock(sums_);
    std::vector<size_t> next(thread.sinks.size());
    for (const Request& request : requests) {
        Window& window = thread.sinks[request.patch].windows[next[request.patch]++];
        for (uint32_t bin = 0; bin < request.bins; ++bin) {
            request.counts[bin] += int64_t{window.counts[bin]} + window.counts[request.bins + bin];
        }
        std::memset(window.counts, 0, 2 * sizeof(uint32_t) * request.bins);
        if (request.above != nullptr) *request.above += window.above;
        window.above = 0;
    }
    thread.uncollected = 0;
}

// One pass over all chunks. `after` runs behind each of them, on its thread. What is found stays with the
// threads, but for the histograms.
void Engine::sweep(const Pass& pass, const std::vector<Request>& requests,
                   const std::function<void(Thread&, const Range&)>& after) {
    const std::vector<Task>& tasks = *pass.tasks;
    assert(std::all_of(tasks.begin(), tasks.end(), [](const Task& task) { return task.sound(); }));
    const auto listing = [](const Task& task) { return task.collect || task.eligible == Eligible::listed; };
    const sp_block& block = *pass.block;
    const bool recoding = pass.out != nullptr && block.codes != nullptr;
    prepare(block, requests, recoding || std::any_of(tasks.begin(), tasks.end(), listing));
    const Chunks chunks(block);
    const auto step = recoding ? isa_.recode : from_lists(pass) ? isa_.patch_up : isa_.visit;
    std::atomic<int64_t> done{0};
    pool_.run(chunks.count(), [&](int i, int64_t slot) {
        Thread& thread = *threads_[static_cast<size_t>(i)];
        const Range range = chunks.at(slot);
        step(pass, thread.space, range, thread.sinks.data(), thread.written);
        if (after) after(thread, range);
        // Threads count in 32 bits.
        if ((thread.uncollected += range.n) > INT32_MAX && !requests.empty()) collect(thread, requests);
        if (block.progress == nullptr) return;
        const int64_t now = done += range.n;
        if (i == 0 && block.progress(block.user, now, block.entries) != 0) throw Stopped();
    });
    if (requests.empty()) return;
    for (auto& thread : threads_) collect(*thread, requests);
}

Sink Engine::found(size_t patch) const {
    Sink sum;
    for (const auto& thread : threads_) {
        const Sink& sink = thread->sinks[patch];
        sum.eligible += sink.eligible;
        sum.selected += sink.selected;
        sum.applied += sink.applied;
        add(sum.bad_delta, sink.bad_delta);
        add(sum.bad_score, sink.bad_score);
        add(sum.negative, sink.negative);
    }
    return sum;
}

void Engine::report_all(sp_report& report, size_t patches) const {
    Written sum;
    for (const auto& thread : threads_) {
        add(sum.overflow, thread->written.overflow);
        sum.acted += thread->written.acted;
        sum.changed += thread->written.changed;
        add(sum.bad_scale, thread->written.bad_scale);
        add(sum.saturated, thread->written.saturated);
    }
    report.bad_scale = plain(sum.bad_scale);
    report.saturated = plain(sum.saturated);
    for (size_t p = 0; report.kept != nullptr && p < patches; ++p) {
        sp_kept& kept = report.kept[p];
        kept = {};
        kept.size = sizeof kept;
        for (const auto& thread : threads_) {
            if (p < thread->written.kept.size()) add(kept, thread->written.kept[p]);
        }
    }
    report.overflow = plain(sum.overflow);
    report.acted = sum.acted;
    report.changed = sum.changed;
    for (size_t p = 0; p < patches; ++p) {
        const Sink of = found(p);
        report.patches[p] = {sizeof(sp_patch_report), of.eligible,         of.selected,       of.applied,
                             plain(of.bad_delta),     plain(of.bad_score), plain(of.negative)};
    }
}

Counting Engine::counting(const sp_block& block, const sp_window* windows, size_t count) const {
    std::vector<Request> requests;
    std::vector<uint32_t> floors(block.patch_count, kInfinity);
    for (size_t i = 0; i < count; ++i) {
        const sp_window& window = windows[i];
        if (window.lo >= kInfinity || window.bins == 0) continue;
        const uint64_t all = ((kInfinity - 1 - window.lo) >> window.shift) + 1;
        const auto bins = static_cast<uint32_t>(std::min<uint64_t>(window.bins, all));
        requests.push_back({window.patch, window.lo, window.shift, bins, window.counts});
        floors[window.patch] = std::min(floors[window.patch], window.lo);
    }
    Counting counting{fresh_tasks(block), {}, {}};
    for (size_t p = 0; p < floors.size(); ++p) {
        counting.tasks[p].collect = floors[p] > 0;
        counting.tasks[p].floor = floors[p];
    }
    for (const Request& request : requests) {
        (floors[request.patch] > 0 ? counting.listed : counting.swept).push_back(request);
    }
    return counting;
}

// A chunk's list is short and the windows are not: threads take turns instead of adding up bins of their own.
void Engine::count_listed(Thread& thread, const std::vector<Request>& requests) {
    const std::lock_guard lock(sums_);
    for (const Request& request : requests) {
        const Sink& sink = thread.sinks[request.patch];
        Window window{request.lo, request.shift, request.bins, nullptr, 0, request.counts};
        isa_.count(sink.list, sink.listed, thread.space, window);
    }
}

void Engine::histogram(const sp_block& block, const sp_window* windows, size_t count, sp_report& report) {
    const std::lock_guard lock(turn_);
    const Counting counting = this->counting(block, windows, count);
    sweep({&block, &counting.tasks, nullptr}, counting.swept, [&](Thread& thread, const Range&) {
        count_listed(thread, counting.listed);
        for (Sink& sink : thread.sinks) sink.listed = 0;
    });
    report_all(report, block.patch_count);
}

void Engine::count_equal(const sp_block& block, const uint32_t* keys, int64_t* counts) {
    const std::lock_guard lock(turn_);
    std::vector<Task> tasks = fresh_tasks(block);
    for (size_t p = 0; p < tasks.size(); ++p) {
        tasks[p].only = true;
        tasks[p].only_key = keys[p];
    }
    sweep({&block, &tasks, nullptr});
    for (size_t p = 0; p < tasks.size(); ++p) counts[p] = found(p).eligible;
}

void Engine::apply(const sp_block& block, const sp_cut* cuts, void* out, sp_report& report) {
    const std::lock_guard lock(turn_);
    std::vector<Task> tasks = fresh_tasks(block);
    for (size_t p = 0; p < tasks.size(); ++p) tasks[p].cut = cuts[p];
    sweep({&block, &tasks, out});
    report_all(report, block.patch_count);
}

}  // namespace safepatch
