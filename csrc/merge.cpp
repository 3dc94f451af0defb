// A whole tensor at once.
//
// A sample guesses where each patch's threshold lies. One pass over the inputs then finds the eligible
// entries, marks those that can reach the threshold and lists their keys (or, where these would be too many,
// marks all and counts keys around the guess). The exact threshold and the place of the last tie come from
// the lists, and a last pass writes. A wrong guess costs another pass; it never changes the result.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#include "engine.h"

namespace safepatch {
namespace {

constexpr uint32_t kBins = 4096;
// Tensors up to this size need no guess: all their keys fit the list.
constexpr int64_t kSmall = 65536;
// The sample: runs of 64 entries, spread over the tensor.
constexpr int64_t kRuns = 256;
static_assert(64 * kRuns <= kChunk);
// Keys of the sample are found to within so many bits.
constexpr uint32_t kClose = 7;

uint32_t scatter(uint32_t i) {
    i *= 0x9E3779B9;
    i ^= i >> 16;
    i *= 0x85EBCA6B;
    return i ^ i >> 13;
}

// What a sample tells of a threshold.
struct Bounds {
    uint32_t floor, roof;
    double reach;  // entries of the sample from the floor on
};

}  // namespace

// Looks for the key of a given rank through ever smaller windows.
struct Engine::Narrowing {
    int64_t rank;  // 1 is the greatest key
    uint32_t lo = 0, shift = 19, bins = kBins;
    std::vector<int64_t> counts = std::vector<int64_t>(kBins);
    int64_t above = 0;
    // What is known so far: how many keys lie above and in the bin that holds the one sought, in the end
    // above and at that key itself.
    int64_t greater = 0, equal = 0;
    uint32_t key = 0;

    void look(uint32_t from, uint32_t to) {
        lo = from;
        shift = 0;
        while ((to - from) >> shift >= kBins) ++shift;
        bins = kBins;
    }

    // With all keys counted: is this the answer? If not, the window is the next one to count.
    bool done() {
        int64_t more = above;
        bool missed = more >= rank;
        uint32_t bin = bins;
        while (!missed && more + counts[bin - 1] < rank) {
            more += counts[--bin];
            missed = bin == 0;
        }
        const bool exact = !missed && shift == 0;
        if (missed) {
            look(0, kInfinity - 1);
        } else {
            greater = more;
            equal = counts[bin - 1];
            key = lo + ((bin - 1) << shift);
            if (!exact) look(key, key + (1U << shift) - 1);
        }
        std::fill(counts.begin(), counts.end(), 0);
        above = 0;
        return exact;
    }
};

struct Engine::Search {
    size_t patch;
    Notes* notes;
    Narrowing narrowing;
    bool listed = true;  // the keys >= floor are marked and listed; else all eligible entries are marked
    uint32_t floor = 1;
    std::atomic<int64_t> used = 0;  // length of the list
    Sink found{};
    sp_cut cut = cut_of(SP_NO_KEY, 0);
    std::unique_ptr<Search> skipped;  // among the same keys, for what is skipped

    Search(size_t p, Notes& n, int64_t quota, int64_t skip) : patch(p), notes(&n), narrowing{quota} {
        if (skip > 0) skipped = std::make_unique<Search>(p, n, skip, 0);
    }

    int64_t quota() const { return narrowing.rank; }
    bool takes_all() const { return found.eligible <= quota(); }

    // Whether the list, if there is one, holds all the keys that are asked for.
    bool suffices(int64_t capacity) const {
        if (!listed) return true;
        const bool own = takes_all() || used >= quota();
        return used <= capacity && own &&
               (!skipped || found.eligible <= skipped->quota() || used >= skipped->quota());
    }

    // Start without a guess of where the key is.
    void look_everywhere() {
        narrowing.look(0, kInfinity - 1);
        if (skipped) skipped->look_everywhere();
    }

    // The search for what is skipped goes on from what this one has found.
    Search* hand_on() {
        if (skipped) {
            skipped->listed = listed;
            skipped->used = used.load();
            skipped->found = found;
        }
        return skipped.get();
    }
};

// Count a list's keys into a window, on all threads.
void Engine::count_list(const uint32_t* keys, int64_t n, Narrowing& narrowing) {
    constexpr int64_t kMost = int64_t{1} << 31;  // threads count in 32 bits
    for (; n > 0; keys += std::min(n, kMost), n -= std::min(n, kMost)) {
        std::vector<Window> windows;
        for (auto& thread : threads_) {
            auto* counts = thread->bins.room<uint32_t>(2 * kBins);
            std::memset(counts, 0, 2 * kBins * sizeof(uint32_t));
            windows.push_back({narrowing.lo, narrowing.shift, narrowing.bins, counts});
        }
        const int64_t here = std::min(n, kMost);
        pool_.run((here + kChunk - 1) / kChunk, [&](int i, int64_t part) {
            const auto thread = static_cast<size_t>(i);
            isa_.count(keys + part * kChunk, std::min<int64_t>(kChunk, here - part * kChunk), threads_[thread]->space,
                       windows[thread]);
        });
        for (const Window& window : windows) {
            narrowing.above += window.above;
            for (uint32_t bin = 0; bin < window.bins; ++bin) {
                narrowing.counts[bin] += int64_t{window.counts[bin]} + window.counts[window.bins + bin];
            }
        }
    }
}

// Choose floors and windows from a sample of the keys: without one, the pass over the inputs would have to count or
// list all of them. Retention doesn't depend on keys, so it isn't sampled.
void Engine::guess(const sp_block& block, std::deque<Search>& searches) {
    std::vector<Task> tasks = fresh_tasks(block);
    for (Task& task : tasks) task.patch = nullptr;
    for (const Search& search : searches) {
        Task& task = tasks[search.patch];
        task.patch = &block.patches[search.patch];
        task.retain_eligible = false;
        task.collect = true;
        task.floor = 1;
    }
    const Pass pass{&block, &tasks, nullptr};
    prepare(block, {}, true);
    const int64_t runs = std::min(kRuns, block.entries / 2048);
    const int64_t stride = (block.entries - 64) / runs;
    pool_.run(runs, [&](int i, int64_t run) {
        Thread& thread = *threads_[static_cast<size_t>(i)];
        const int64_t begin = run * stride + scatter(static_cast<uint32_t>(run)) % (stride - 63);
        isa_.visit(pass, thread.space, {begin, 64, 0, 0}, thread.sinks.data(), thread.written);
    });

    for (Search& search : searches) {
        auto* keys = search.notes->keys.room<uint32_t>(64 * kRuns + kSlack);
        int64_t n = 0;
        for (const auto& thread : threads_) {
            const Sink& sink = thread->sinks[search.patch];
            std::memcpy(keys + n, sink.list, static_cast<size_t>(sink.listed) * sizeof *keys);
            n += sink.listed;
        }
        // The key of a rank, less its last few bits.
        const auto around = [&](double rank) {
            Narrowing sample{static_cast<int64_t>(rank)};
            uint32_t known = 0;
            do {
                known = sample.shift;
                count_list(keys, n, sample);
            } while (!sample.done() && known > kClose);
            return sample;
        };
        const sp_patch& patch = block.patches[search.patch];
        const bool random = block.order == SP_RETAIN_FIRST && patch.keep < SP_KEEP_ALL;
        const double share = random ? static_cast<double>(patch.keep) * 0x1p-32 : 1.0;
        const double scale = static_cast<double>(64 * runs) / static_cast<double>(block.entries);
        // Between which keys the quota's last one lies, and how many of the sample are not below.
        const auto bounds = [&](int64_t quota) {
            const double rank = share > 0 ? static_cast<double>(quota) * scale / share : static_cast<double>(n);
            // Four standard deviations, twice as wide because neighbours are alike.
            const double margin = 8 * std::sqrt(rank) + 8;
            Bounds found{1, kInfinity - 1, static_cast<double>(n)};
            if (rank + margin < static_cast<double>(n)) {
                const Narrowing bottom = around(rank + margin);
                found.floor = std::max(bottom.key, 1U);
                found.reach = static_cast<double>(bottom.greater + bottom.equal);
            }
            if (rank - margin >= 1 && rank - margin < static_cast<double>(n)) {
                found.roof = around(rank - margin).key + (1U << kClose);
            }
            return found;
        };
        const bool all = search.quota() >= block.entries;  // then only what is skipped has a threshold
        const Bounds found = bounds(all ? search.skipped->quota() : search.quota());
        search.floor = found.floor;
        search.listed = found.reach * share / scale < 0.9 * static_cast<double>(list_capacity(block.entries));
        search.narrowing.look(found.floor, found.roof);
        if (search.skipped) {
            const Bounds of = bounds(search.skipped->quota());
            search.skipped->narrowing.look(of.floor, of.roof);
        }
    }
}

// The pass over the inputs: what is eligible, the faults, and marks with a list or a histogram. It is the only one
// that must look at every byte, so it takes along all that the later ones need: random numbers and scores are dear, a
// list of a few percent of the keys is cheap.
void Engine::scan(const sp_block& block, const std::vector<Search*>& searches) {
    const Chunks chunks(block);
    const int64_t capacity = list_capacity(block.entries);
    std::vector<Task> tasks = fresh_tasks(block);
    for (Task& task : tasks) task.patch = nullptr;
    std::vector<Request> requests;
    for (Search* search : searches) {
        Notes& notes = *search->notes;
        Task& task = tasks[search->patch];
        task.patch = &block.patches[search->patch];
        search->used = 0;
        if (search->listed) {
            task.collect = true;
            task.floor = search->floor;
            notes.make_room(capacity, chunks.count());
        } else {
            task.save = notes.keys.room<uint64_t>(static_cast<size_t>(chunks.words()));
            requests.push_back(request(*search));
            if (search->skipped) requests.push_back(request(*search->skipped));
        }
    }
    sweep({&block, &tasks, nullptr}, requests, [&](Thread& thread, const Range& range) {
        for (Search* search : searches) {
            if (!search->listed) continue;
            search->notes->append(thread.sinks[search->patch], range.slot, search->used, capacity);
        }
    });
    for (Search* search : searches) search->found = found(search->patch);
}

Request Engine::request(Search& search) {
    Narrowing& n = search.narrowing;
    return {search.patch, n.lo, n.shift, n.bins, n.counts.data(), &n.above};
}

// What a task needs to go on from the scan's notes.
void Engine::recall(const sp_block& block, const Search& search, Task& task) {
    Notes& notes = *search.notes;
    task.patch = &block.patches[search.patch];
    if (search.listed) {
        notes.serve(task);
    } else {
        task.eligible = Eligible::stored;
        task.stored = notes.keys.get<uint64_t>();
    }
}

// Find the exact key at which each quota is filled, through windows that get narrower. Lists are counted as often as
// it takes; for patches without one each window is another pass over the inputs, all of them in the same.
void Engine::narrow(const sp_block& block, const std::vector<Search*>& searches) {
    std::vector<Search*> left;
    for (Search* search : searches) {
        if (search->quota() == 0 || search->takes_all()) continue;
        if (search->listed) {
            do count_list(search->notes->keys.get<uint32_t>(), search->used, search->narrowing);
            while (!search->narrowing.done());
        } else if (!search->narrowing.done()) {
            left.push_back(search);
        }
    }
    while (!left.empty()) {
        std::vector<Task> tasks(block.patch_count);
        std::vector<Request> requests;
        for (Search* search : left) {
            recall(block, *search, tasks[search->patch]);
            requests.push_back(request(*search));
        }
        sweep({&block, &tasks, nullptr}, requests);
        std::erase_if(left, [](Search* search) { return search->narrowing.done(); });
    }
}

// Find the last entry that is selected among those whose key is the cut's. Where not all of them are, the cut's
// position lies behind it. In two steps, ties by chunk and then one chunk entry by entry:
//
//   keys                 ... greater ... | equal | less ...        `greater` + some of `equal` = the quota
//   ties of each chunk   3   0   5   2 ...                         left = quota - greater = 6
//   left at each         6   3   3 -> the third tie of chunk 2 is the last
//
void Engine::place_cuts(const sp_block& block, const std::vector<Search*>& searches) {
    const Chunks chunks(block);
    std::vector<Task> tasks(block.patch_count);
    std::vector<Search*> tied, unlisted;
    for (Search* search : searches) {
        const Narrowing& n = search->narrowing;
        if (n.rank == 0) continue;
        search->cut = cut_of(search->takes_all() ? 0 : n.key, SP_EVERY);
        if (search->takes_all() || n.rank == n.greater + n.equal) continue;
        search->notes->ties.room<int64_t>(static_cast<size_t>(chunks.count()));
        tied.push_back(search);
        if (!search->listed) unlisted.push_back(search);
    }

    pool_.run(chunks.count(), [&](int i, int64_t slot) {
        for (const Search* search : tied) {
            if (!search->listed) continue;
            Notes& notes = *search->notes;
            const Span span = notes.spans.get<Span>()[slot];
            uint32_t counts[2] = {};
            Window window{search->narrowing.key, 0, 1, counts};
            isa_.count(notes.keys.get<uint32_t>() + span.begin, span.n, threads_[static_cast<size_t>(i)]->space,
                       window);
            notes.ties.get<int64_t>()[slot] = int64_t{counts[0]} + counts[1];
        }
    });
    for (const Search* search : unlisted) {
        Task& task = tasks[search->patch];
        recall(block, *search, task);
        task.only = true;
        task.only_key = search->narrowing.key;
    }
    if (!unlisted.empty()) {
        sweep({&block, &tasks, nullptr}, {}, [&](Thread& thread, const Range& range) {
            for (const Search* search : unlisted) {
                int64_t& here = thread.sinks[search->patch].eligible;
                search->notes->ties.get<int64_t>()[range.slot] = std::exchange(here, 0);
            }
        });
    }

    for (Search* search : tied) {
        Notes& notes = *search->notes;
        int64_t left = search->quota() - search->narrowing.greater;
        int64_t slot = 0;
        for (; left > notes.ties.get<int64_t>()[slot]; ++slot) left -= notes.ties.get<int64_t>()[slot];
        search->cut.before =
            block.start + chunks.at(slot).begin + last_tie(block, *search, chunks.at(slot), left) + 1;
    }
}

// Where in its chunk the n-th entry with the cut's key is: from its list, or by marking those of the chunk anew.
int64_t Engine::last_tie(const sp_block& block, const Search& search, const Range& chunk, int64_t n) {
    const Notes& notes = *search.notes;
    const uint32_t key = search.narrowing.key;
    if (search.listed) {
        int64_t i = notes.spans.get<Span>()[chunk.slot].begin;
        while ((notes.keys.get<uint32_t>()[i] & INT32_MAX) != key || --n > 0) ++i;
        return notes.places.get<uint16_t>()[i];
    }
    std::vector<uint64_t> marks(kChunk / 64);
    std::vector<Task> tasks(block.patch_count);
    Task& task = tasks[search.patch];
    recall(block, search, task);
    task.stored += chunk.word;
    task.only = true;
    task.only_key = key;
    task.save = marks.data();
    prepare(block, {}, false);
    Thread& thread = *threads_[0];
    const Pass pass{&block, &tasks, nullptr};
    isa_.visit(pass, thread.space, {chunk.begin, chunk.n, 0, 0}, thread.sinks.data(), thread.written);
    int64_t i = 0;
    while ((marks[static_cast<size_t>(i / 64)] >> i % 64 & 1) == 0 || --n > 0) ++i;
    return i;
}

// The guess, and the pass over the inputs that makes the notes.
void Engine::look(const sp_block& block, std::deque<Search>& searches) {
    if (searches.empty()) return;
    if (block.entries > kSmall) guess(block, searches);
    std::vector<Search*> todo;
    for (Search& search : searches) todo.push_back(&search);
    scan(block, todo);
    // Too many keys for the list, or too few because the floor was too high: mark all and start without a guess.
    std::erase_if(todo, [&](Search* search) { return search->suffices(list_capacity(block.entries)); });
    for (Search* search : todo) {
        search->listed = false;
        search->look_everywhere();
    }
    if (!todo.empty()) scan(block, todo);
}

// All that is left once the notes are there: the cuts, and the pass that writes.
void Engine::finish(const sp_block& block, std::deque<Search>& searches, void* out, sp_cut* cuts, sp_report& report) {
    std::vector<Search*> outer, inner;
    for (Search& search : searches) {
        outer.push_back(&search);
        if (Search* skipped = search.hand_on()) inner.push_back(skipped);
    }
    std::vector<Search*> both = outer;
    both.insert(both.end(), inner.begin(), inner.end());
    narrow(block, both);
    place_cuts(block, outer);
    place_cuts(block, inner);

    std::vector<Task> tasks = fresh_tasks(block);
    for (const Search& search : searches) {
        cuts[search.patch] = search.skipped ? without(search.cut, search.skipped->cut) : search.cut;
        const bool complete = !search.listed || search.used == search.found.eligible;
        if (!search.takes_all() || complete) recall(block, search, tasks[search.patch]);
    }
    for (size_t p = 0; p < tasks.size(); ++p) tasks[p].cut = cuts[p];
    sweep({&block, &tasks, out});
    report_all(report, block.patch_count);
    for (const Search& search : searches) {
        give_facts(search.found, report.patches[search.patch]);
    }
}

void Engine::merge(const sp_block& block, const int64_t* quotas, void* out, sp_cut* cuts, sp_report& report) {
    const std::lock_guard lock(turn_);
    if (notes_.size() < block.patch_count) notes_.resize(block.patch_count);
    std::deque<Search> searches;
    for (size_t p = 0; p < block.patch_count; ++p) {
        if (!block.patches[p].present || quotas[p] == 0) {
            cuts[p] = cut_of(SP_NO_KEY, 0);
        } else if (quotas[p] >= block.entries && block.patches[p].skip == 0) {
            cuts[p] = cut_of(0, SP_EVERY);
        } else {
            searches.emplace_back(p, notes_[p], quotas[p], block.patches[p].skip);
        }
    }
    look(block, searches);
    finish(block, searches, out, cuts, report);
}

// Keys must stand for deltas, or the patches would have to be read again; and a list must hold all that is asked for.
std::unique_ptr<Kept> Engine::keep(const sp_block& block, const int64_t* quotas) {
    const std::lock_guard lock(turn_);
    if (notes_.size() < block.patch_count) notes_.resize(block.patch_count);
    std::deque<Search> searches;
    for (size_t p = 0; p < block.patch_count; ++p) {
        const sp_patch& patch = block.patches[p];
        if (!patch.present) continue;
        if (patch.importance != SP_MAGNITUDE || quotas[p] == 0 || quotas[p] >= block.entries) return nullptr;
        searches.emplace_back(p, notes_[p], quotas[p], 0);
    }
    if (searches.empty()) return nullptr;
    if (block.entries > kSmall) guess(block, searches);
    std::vector<Search*> all;
    for (Search& search : searches) {
        if (!search.listed) return nullptr;
        all.push_back(&search);
    }
    scan(block, all);
    auto kept = std::make_unique<Kept>(block);
    const Chunks chunks(block);
    for (Search& search : searches) {
        const bool holds = search.used >= search.quota() || search.used == search.found.eligible;
        if (!holds || search.used > list_capacity(block.entries)) return nullptr;
        Kept::Patch& to = kept->patches[search.patch];
        to.take(*search.notes, search.used, search.floor, chunks.count(), search.found);
        to.quota = search.quota();
    }
    return kept;
}

void Engine::merge(const sp_block& block, const int64_t* quotas, Kept& kept, void* out, sp_cut* cuts,
                   sp_report& report) {
    const std::lock_guard lock(turn_);
    std::deque<Search> searches;
    for (size_t p = 0; p < block.patch_count; ++p) {
        cuts[p] = cut_of(SP_NO_KEY, 0);
        if (!block.patches[p].present) continue;
        Kept::Patch& from = kept.patches[p];
        Search& search = searches.emplace_back(p, from.notes, quotas[p], quotas[p] > 0 ? block.patches[p].skip : 0);
        search.used = from.used;
        search.floor = from.floor;
        search.found = from.found;
        search.look_everywhere();
    }
    finish(block, searches, out, cuts, report);
}

size_t Engine::scratch(int64_t entries, size_t patches) const {
    const size_t tile = sizeof(Lane) + sizeof(Sink) + sizeof(Remains) +
                        (kChunk + kSlack) * (sizeof(float) + sizeof(uint32_t) + sizeof(uint16_t));
    const size_t bins = 2 * 2 * kBins * sizeof(uint32_t);
    const size_t thread = sizeof(Thread) + std::max<size_t>(patches, 1) * (tile + bins + 256);
    const auto chunks = static_cast<size_t>(entries / (kChunk / 2)) + 2;  // LoRA's rows may shorten them
    const size_t chunk = sizeof(Span) + sizeof(int64_t);
    // Room for the list is more than enough for the marks.
    const size_t key = sizeof(uint32_t) + sizeof(uint16_t);
    const size_t list = (static_cast<size_t>(list_capacity(entries)) + kSlack) * key;
    const size_t search = 2 * (sizeof(Search) + kBins * sizeof(int64_t));  // and one for what is skipped
    return static_cast<size_t>(threads()) * thread + patches * (chunks * chunk + list + search) + 65536;
}

}  // namespace safepatch
