// Pool and engine under ThreadSanitizer: loops of all lengths, bodies that throw, engines that several callers share,
// and engines that come and go. Prints nothing but the sanitizer's reports; exit status 1 if a result is wrong.
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "pool.h"
#include "safepatch.h"

namespace {

void require(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
}

void loops(int threads) {
    safepatch::Pool pool(threads);
    std::vector<int64_t> seen;
    for (int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
        for (int round = 0; round < 50; ++round) {
            seen.assign(static_cast<size_t>(count), 0);
            pool.run(count, [&](int, int64_t i) { seen[static_cast<size_t>(i)] += i + 1; });
            require(std::accumulate(seen.begin(), seen.end(), int64_t{0}) == count * (count + 1) / 2, "a loop");
        }
    }
    for (int round = 0; round < 50; ++round) {
        bool caught = false;
        try {
            pool.run(100, [&](int, int64_t i) {
                if (i % 9 == 5) throw std::runtime_error("on purpose");
            });
        } catch (const std::runtime_error&) {
            caught = true;
        }
        require(caught, "an exception of a body");
    }
}

struct Job {
    std::vector<uint16_t> base, patched, out;
    sp_patch patch{};
    sp_block block{};
    sp_patch_report found{};
    sp_report report{};

    Job(size_t entries, unsigned seed) : base(entries), patched(entries), out(entries) {
        for (size_t i = 0; i < entries; ++i) {
            seed = seed * 1664525u + 1013904223u;
            base[i] = static_cast<uint16_t>(0x3f00 | (seed >> 25));
            patched[i] = static_cast<uint16_t>(base[i] ^ ((seed >> 20) & 7));
        }
        patch.size = sizeof patch;
        patch.present = 1;
        patch.kind = SP_CHECKPOINT;
        patch.values = {patched.data(), SP_BF16};
        patch.random_key = 42;
        patch.keep = SP_KEEP_ALL / 2;
        patch.scale = 0.5f;
        block.size = sizeof block;
        block.base = {base.data(), SP_BF16};
        block.entries = static_cast<int64_t>(entries);
        block.patches = &patch;
        block.patch_count = 1;
        found.size = sizeof found;
        report.size = sizeof report;
        report.patches = &found;
    }

    void merge(sp_engine* engine) {
        const int64_t quota = block.entries / 10;
        sp_cut cut{};
        cut.size = sizeof cut;
        require(sp_merge(engine, &block, &quota, out.data(), &cut, &report) == SP_OK, sp_last_error());
        require(found.selected <= quota, "a quota");
        std::vector<int64_t> counts(256);
        sp_window window{sizeof window, 0, 0, 23, counts.size(), counts.data()};
        require(sp_histogram(engine, &block, &window, 1, &report) == SP_OK, sp_last_error());
        require(std::accumulate(counts.begin(), counts.end(), int64_t{0}) == found.eligible, "a histogram");
    }
};

void shared_engine(int threads) {
    sp_engine* engine = nullptr;
    require(sp_engine_open(threads, nullptr, &engine) == SP_OK, sp_last_error());
    Job alone(70000, 1);
    alone.merge(engine);
    std::vector<std::thread> callers;
    for (int c = 0; c < 3; ++c) {
        callers.emplace_back([&] {
            for (int round = 0; round < 10; ++round) {
                Job job(70000, 1);
                job.merge(engine);
                require(job.out == alone.out, "the same bytes from every caller");
            }
        });
    }
    for (auto& caller : callers) caller.join();
    sp_engine_close(engine);
}

}  // namespace

int main() {
    for (int threads : {1, 2, 4}) {
        loops(threads);
        shared_engine(threads);
    }
    for (int round = 0; round < 30; ++round) {
        sp_engine* engine = nullptr;
        require(sp_engine_open(1 + round % 4, "scalar", &engine) == SP_OK, sp_last_error());
        if (round % 2) Job(1000, 3).merge(engine);
        sp_engine_close(engine);
    }
}
