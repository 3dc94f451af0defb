// The four operations over a block: cut it into chunks, hand them to the threads, put the findings together.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "passes.h"
#include "pool.h"

namespace safepatch {

// Uninitialised memory that only grows: its pages are touched for the first time once, not in every call.
class Buffer {
  public:
    // At least `n` entries; the contents are lost if it has to grow.
    template <class T>
    T* room(size_t n) {
        return static_cast<T*>(room_bytes(n * sizeof(T)));
    }
    // What the last `room` gave.
    template <class T>
    T* get() const {
        return static_cast<T*>(data_.get());
    }
    // The first `n` entries of another buffer, and no more room than for them and `slack`.
    template <class T>
    void copy(const Buffer& from, size_t n, size_t slack = 0) {
        T* to = room<T>(n + slack);
        if (n > 0) std::memcpy(to, from.get<T>(), n * sizeof(T));
    }
    size_t bytes() const { return size_; }

  private:
    struct Free {
        void operator()(void* p) const;
    };
    void* room_bytes(size_t n);

    std::unique_ptr<void, Free> data_;
    size_t size_ = 0;
};

// The chunks of a block. Random numbers come in fours, so chunks begin at multiples of 4 of the tensor;
// the entries before the first of those are a chunk of their own.
class Chunks {
  public:
    explicit Chunks(const sp_block& block);
    int64_t count() const { return count_; }
    // Words of marks for all of them.
    int64_t words() const { return count_ * ((size_ + 63) / 64); }
    Range at(int64_t slot) const;

  private:
    int64_t entries_, lead_, size_, count_;
};

inline sp_fault plain(const Fault& fault) { return {fault.count, fault.first}; }

// What a scan found, to the report of a pass that took it for granted.
inline void give_facts(const Sink& found, sp_patch_report& patch) {
    patch.eligible = found.eligible;
    patch.bad_delta = plain(found.bad_delta);
    patch.bad_score = plain(found.bad_score);
    patch.negative = plain(found.negative);
}

// A histogram over all threads.
struct Request {
    size_t patch;
    uint32_t lo;
    uint32_t shift;
    uint32_t bins;
    int64_t* counts;           // added to
    int64_t* above = nullptr;  // keys beyond the last bin, added to; may be null
};

// The most keys that are listed of so many entries.
inline int64_t list_capacity(int64_t entries) { return std::max<int64_t>(entries / 8, 65536); }

// Merge's findings for one patch between its passes.
struct Notes {
    Buffer keys;                 // the list's, or in the same place the marks
    Buffer places, spans, ties;  // `ties` of one search at a time

    void make_room(int64_t capacity, int64_t chunks);
    // Move what a thread has listed of a chunk behind the `used` entries of the list; beyond `capacity` only count.
    void append(Sink& sink, int64_t slot, std::atomic<int64_t>& used, int64_t capacity);
    // Let a task go on from the list.
    void serve(Task& task) const;
};

// Notes of a block, for more than one look at it.
struct Kept {
    struct Patch {
        sp_patch of{};
        int64_t quota = 0;  // the largest that the list has the entries of
        int64_t used = 0;   // length of the list
        uint32_t floor = 1;
        Sink found{};
        Notes notes{};

        // A list of `n` keys from `from` on, and of so many chunks.
        void take(const Notes& list, int64_t n, uint32_t from, int64_t chunks, const Sink& facts);
    };
    int64_t entries, start;
    int32_t order;
    std::deque<Patch> patches;  // one per patch of the block

    explicit Kept(const sp_block& block);
    // Whether a block is the one that the notes are of, as far as patches and their lists go.
    bool fits(const sp_block& block) const;
    // Whether the lists hold all that these quotas, and the block's skips, can ask for.
    bool reach(const sp_block& block, const int64_t* quotas) const;
    // Whether they hold all that these cuts select.
    bool reach(const sp_block& block, const sp_cut* cuts) const;
    size_t bytes() const;
};

// How a block is counted. Keys are listed first, where the lowest window leaves out many: several windows then look
// at few keys, and not each at all.
struct Counting {
    std::vector<Task> tasks;
    std::vector<Request> listed, swept;  // from lists, and in the pass itself
};

// The caller's sp_progress wants the call to end.
struct Stopped {};

class Engine {
  public:
    Engine(int threads, const Isa& isa);

    const Isa& isa() const { return isa_; }
    int threads() const { return pool_.threads(); }
    bool forked() const { return pool_.forked(); }
    size_t scratch(int64_t entries, size_t patches) const;

    void histogram(const sp_block& block, const sp_window* windows, size_t count, sp_report& report);
    // The same, with what the windows were counted from; null where lists won't do.
    std::unique_ptr<Kept> note(const sp_block& block, const sp_window* windows, size_t count, sp_report& report);
    void count_equal(const sp_block& block, const uint32_t* keys, int64_t* counts);
    void apply(const sp_block& block, const sp_cut* cuts, void* out, sp_report& report);
    void merge(const sp_block& block, const int64_t* quotas, void* out, sp_cut* cuts, sp_report& report);
    // Null where lists don't hold all that such quotas and lower ones can ask for.
    std::unique_ptr<Kept> keep(const sp_block& block, const int64_t* quotas);
    // Of the patches nothing is read: their lists stand for them.
    void apply(const sp_block& block, const sp_cut* cuts, Kept& kept, void* out, sp_report& report);
    void merge(const sp_block& block, const int64_t* quotas, Kept& kept, void* out, sp_cut* cuts, sp_report& report);

  private:
    struct Thread {
        Workspace space;
        std::vector<Sink> sinks;  // one per patch
        Written written;
        std::vector<Buffer> lora, lists, places;  // one per patch
        Buffer bins;
        int64_t uncollected = 0;  // entries counted since the last `collect`
    };
    struct Narrowing;
    struct Search;

    std::vector<Task> fresh_tasks(const sp_block& block) const;
    Counting counting(const sp_block& block, const sp_window* windows, size_t count) const;
    void count_listed(Thread& thread, const std::vector<Request>& requests);
    void prepare(const sp_block& block, const std::vector<Request>& requests, bool listing);
    void collect(Thread& thread, const std::vector<Request>& requests);
    void sweep(const Pass& pass, const std::vector<Request>& requests = {},
               const std::function<void(Thread&, const Range&)>& after = {});
    Sink found(size_t patch) const;
    void report_all(sp_report& report, size_t patches) const;

    void count_list(const uint32_t* keys, int64_t n, Narrowing& narrowing);
    void look(const sp_block& block, std::deque<Search>& searches);
    void finish(const sp_block& block, std::deque<Search>& searches, void* out, sp_cut* cuts, sp_report& report);
    void guess(const sp_block& block, std::deque<Search>& searches);
    void scan(const sp_block& block, const std::vector<Search*>& searches);
    void narrow(const sp_block& block, const std::vector<Search*>& searches);
    void place_cuts(const sp_block& block, const std::vector<Search*>& searches);
    int64_t last_tie(const sp_block& block, const Search& search, const Range& chunk, int64_t n);
    void recall(const sp_block& block, const Search& search, Task& task);
    static Request request(Search& search);

    const Isa& isa_;
    std::mutex turn_;  // one operation at a time
    std::mutex sums_;
    Pool pool_;
    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<Notes> notes_;
};

}  // namespace safepatch

struct sp_engine {
    safepatch::Engine engine;
};

struct sp_notes {
    std::unique_ptr<safepatch::Kept> kept;
};
