// The C interface: checks every argument that could lead out of bounds, and lets no exception through.
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

#include "dispatch.h"
#include "engine.h"
#include "fix.h"

struct sp_engine {
    safepatch::Engine engine;
};

namespace {

thread_local std::string last_error;

void need(bool good, const char* what) {
    if (!good) throw std::invalid_argument(what);
}

bool aligned(const void* p, size_t size) { return reinterpret_cast<uintptr_t>(p) % size == 0; }

void check(const sp_bits& bits, bool any, const char* what) {
    need(bits.dtype >= SP_F32 && bits.dtype <= SP_BF16, what);
    need(!any || (bits.data != nullptr && aligned(bits.data, bits.dtype == SP_F32 ? 4 : 2)), what);
}

void check(const sp_patch& patch, const sp_block& block) {
    if (!patch.present) return;
    const bool any = block.entries > 0;
    need(patch.kind >= SP_CHECKPOINT && patch.kind <= SP_LORA, "patch kind");
    need(patch.importance >= SP_MAGNITUDE && patch.importance <= SP_GRADIENTS, "patch importance");
    need(patch.weight >= SP_WEIGHT_PATCHED && patch.weight <= SP_WEIGHT_DELTA, "patch weight");
    if (patch.importance != SP_MAGNITUDE) check(patch.scores, any, "patch scores");
    if (patch.kind != SP_LORA) {
        check(patch.values, any, "patch values");
        return;
    }
    const sp_lora& lora = patch.lora;
    need(lora.rank >= 0 && lora.rows >= 0 && lora.cols >= 0, "LoRA shape");
    need(lora.rank == 0 || !any ||
             (lora.a != nullptr && lora.b != nullptr && aligned(lora.a, 4) && aligned(lora.b, 4)),
         "LoRA factors");
    need(!any || (lora.cols > 0 && (block.start + block.entries - 1) / lora.cols < lora.rows),
         "LoRA factors: the block ends beyond their product");
}

void check(const sp_engine* engine, const sp_block* block) {
    need(engine != nullptr && block != nullptr, "null engine or block");
    need(block->entries >= 0 && block->start >= 0 && block->start <= INT64_MAX - block->entries, "block range");
    need(block->patch_count == 0 || block->patches != nullptr, "block patches");
    need(block->acts >= SP_ALONE && block->acts <= SP_ELECTED, "block acts");
    need(block->join >= SP_SUM && block->join <= SP_MEAN, "block join");
    need(block->order >= SP_RETAIN_FIRST && block->order <= SP_SELECT_FIRST, "block order");
    check(block->base, block->entries > 0, "block base");
    for (size_t p = 0; p < block->patch_count; ++p) check(block->patches[p], *block);
}

void check(const sp_block* block, const void* per_patch, const void* out, const sp_report* report) {
    need(block->patch_count == 0 || (per_patch != nullptr && report != nullptr && report->patches != nullptr),
         "null array");
    need(report != nullptr, "null report");
    need(block->entries == 0 || (out != nullptr && aligned(out, block->base.dtype == SP_F32 ? 4 : 2)), "output");
}

void check_width(int32_t width) { need(width == 1 || width == 2 || width == 4, "entry width"); }

void check(const sp_fix_changes& out, int32_t width, int64_t start, int64_t entries) {
    need(out.size >= sizeof out, "size of the changes");
    need(start >= 0 && entries >= 0 && start <= INT64_MAX - entries, "range of entries");
    if (entries == 0) return;
    need(out.counts != nullptr && out.at != nullptr && out.side != nullptr, "null array");
    for (int32_t k = 0; k < width; ++k) need(out.planes[k] != nullptr, "null plane");
    need(out.old_entries != nullptr && aligned(out.old_entries, width), "old entries");
    need(out.new_entries != nullptr && aligned(out.new_entries, width), "new entries");
}

// The table must fit the lengths and go upwards: then no array is left.
void check(const sp_fix_run& run) {
    need(run.size >= sizeof run, "size of the run");
    check_width(run.width);
    need(run.gap_width == 1 || run.gap_width == 2, "gap width");
    need(run.entries >= 0 && run.entries <= INT64_MAX - SP_FIX_BLOCK, "entries");
    need(run.blocks == static_cast<size_t>((run.entries + SP_FIX_BLOCK - 1) / SP_FIX_BLOCK), "number of blocks");
    need(run.rows != nullptr && aligned(run.rows, 8), "block table");
    for (size_t i = 0; i < 2 * run.blocks; ++i)
        need(run.rows[i] <= run.rows[i + 2], "the block table is not in order");
    need(run.rows[2 * run.blocks] - run.rows[0] == run.gap_count, "number of gap codes");
    need(run.rows[2 * run.blocks + 1] - run.rows[1] == run.changes, "number of changes");
    need(run.changes == 0 || (run.side_count <= SIZE_MAX / 8 && run.changes < SIZE_MAX - 8 &&
                              8 * run.side_count >= run.rows[1] % 8 + run.changes),
         "number of side bits");
    need(run.gap_count == 0 || (run.gap != nullptr && aligned(run.gap, run.gap_width)), "gap codes");
    need(run.side_count == 0 || run.side != nullptr, "side bits");
}

// Run `body`, and turn what it throws into a status with a text.
template <class Body>
sp_status guarded(const Body& body) {
    const auto failed = [](sp_status status, const char* why) {
        try {
            last_error = why;
        } catch (...) {
            last_error.clear();
        }
        return status;
    };
    try {
        body();
        return SP_OK;
    } catch (const std::bad_alloc&) {
        return failed(SP_NO_MEMORY, "out of memory");
    } catch (const safepatch::Broken& error) {
        return failed(SP_BAD_DATA, error.what());
    } catch (const safepatch::Unsupported& error) {
        return failed(SP_UNSUPPORTED, error.what());
    } catch (const std::invalid_argument& error) {
        return failed(SP_BAD_ARGUMENT, error.what());
    } catch (const std::system_error& error) {
        const bool full = error.code() == std::errc::resource_unavailable_try_again;
        return full ? failed(SP_NO_MEMORY, "no thread can be started") : failed(SP_INTERNAL, error.what());
    } catch (const std::exception& error) {
        return failed(SP_INTERNAL, error.what());
    } catch (...) {
        return failed(SP_INTERNAL, "unknown exception");
    }
}

}  // namespace

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

const char* sp_version_string(void) {
    return TEXT(SP_VERSION_MAJOR) "." TEXT(SP_VERSION_MINOR) "." TEXT(SP_VERSION_PATCH);
}

uint32_t sp_abi_version(void) { return SP_ABI_VERSION; }

uint32_t sp_spec_version(void) { return SP_SPEC_VERSION; }

const char* sp_strerror(sp_status status) {
    switch (status) {
        case SP_OK:
            return "success";
        case SP_BAD_ARGUMENT:
            return "bad argument";
        case SP_UNSUPPORTED:
            return "not supported by this machine";
        case SP_NO_MEMORY:
            return "out of memory";
        case SP_INTERNAL:
            return "internal error";
        case SP_BAD_DATA:
            return "bad data";
    }
    return "unknown status";
}

const char* sp_last_error(void) { return last_error.c_str(); }

int sp_isa_usable(const char* isa) { return isa != nullptr && safepatch::usable(isa); }

sp_status sp_engine_open(int32_t threads, const char* isa, sp_engine** engine) {
    if (engine != nullptr) *engine = nullptr;
    return guarded([&] {
        need(engine != nullptr, "null engine");
        need(threads >= 1, "threads: expected at least 1");
        *engine = new sp_engine{safepatch::Engine(threads, safepatch::choose_isa(isa))};
    });
}

void sp_engine_close(sp_engine* engine) {
    if (engine != nullptr && !engine->engine.forked()) delete engine;
}

const char* sp_engine_isa(const sp_engine* engine) { return engine != nullptr ? engine->engine.isa().name : "none"; }

int32_t sp_engine_threads(const sp_engine* engine) { return engine != nullptr ? engine->engine.threads() : 0; }

size_t sp_scratch(const sp_engine* engine, int64_t entries, size_t patches) {
    return engine != nullptr ? engine->engine.scratch(entries, patches) : 0;
}

sp_status sp_histogram(sp_engine* engine, const sp_block* block, const sp_window* windows, size_t count,
                       sp_report* report) {
    return guarded([&] {
        check(engine, block);
        need(report != nullptr && (block->patch_count == 0 || report->patches != nullptr), "null report");
        need(count == 0 || windows != nullptr, "null windows");
        for (size_t i = 0; i < count; ++i) {
            need(windows[i].patch < block->patch_count, "window patch");
            need(windows[i].shift <= 31, "window shift");
            need(windows[i].bins == 0 || windows[i].counts != nullptr, "window counts");
        }
        engine->engine.histogram(*block, windows, count, *report);
    });
}

sp_status sp_count_equal(sp_engine* engine, const sp_block* block, const uint32_t* keys, int64_t* counts) {
    return guarded([&] {
        check(engine, block);
        need(block->patch_count == 0 || (keys != nullptr && counts != nullptr), "null array");
        engine->engine.count_equal(*block, keys, counts);
    });
}

sp_status sp_apply(sp_engine* engine, const sp_block* block, const sp_cut* cuts, void* out, sp_report* report) {
    return guarded([&] {
        check(engine, block);
        check(block, cuts, out, report);
        engine->engine.apply(*block, cuts, out, *report);
    });
}

sp_status sp_merge(sp_engine* engine, const sp_block* block, const int64_t* quotas, void* out, sp_cut* cuts,
                   sp_report* report) {
    return guarded([&] {
        check(engine, block);
        check(block, quotas, out, report);
        for (size_t p = 0; p < block->patch_count; ++p) need(quotas[p] >= 0, "negative quota");
        need(block->patch_count == 0 || cuts != nullptr, "null cuts");
        engine->engine.merge(*block, quotas, out, cuts, *report);
    });
}

sp_status sp_fix_find(int32_t width, const void* old_entries, const void* new_entries, int64_t entries, int64_t start,
                      const sp_fix_changes* out, int64_t* found) {
    return guarded([&] {
        check_width(width);
        need(out != nullptr && found != nullptr, "null output");
        check(*out, width, start, entries);
        need(entries == 0 || (old_entries != nullptr && aligned(old_entries, width)), "old entries");
        need(entries == 0 || (new_entries != nullptr && aligned(new_entries, width)), "new entries");
        *found = safepatch::find_changes(width, old_entries, new_entries, entries, start, *out);
    });
}

sp_status sp_fix_gaps(const uint16_t* at, const int64_t* counts, size_t blocks, int32_t gap_width, void* codes,
                      int64_t* lengths) {
    return guarded([&] {
        need(gap_width == 1 || gap_width == 2, "gap width");
        need(blocks == 0 || (counts != nullptr && lengths != nullptr), "null array");
        for (size_t b = 0; b < blocks; ++b) {
            need(counts[b] >= 0 && (counts[b] == 0 || (at != nullptr && aligned(at, 2))), "positions");
        }
        need(aligned(codes, gap_width), "codes");
        safepatch::encode_gaps(at, counts, blocks, gap_width, codes, lengths);
    });
}

sp_status sp_fix_settle(const sp_fix_run* run, void* entries, int32_t goal, void* old_entries, void* new_entries,
                        sp_fix_tally* tally) {
    return guarded([&] {
        need(run != nullptr && tally != nullptr, "null run or tally");
        check(*run);
        need(goal >= SP_FIX_KEEP && goal <= SP_FIX_NEW, "goal");
        need(run->entries == 0 || (entries != nullptr && aligned(entries, run->width)), "entries");
        for (const void* side : {old_entries, new_entries}) {
            need(run->changes == 0 || (side != nullptr && aligned(side, run->width)), "old or new entries");
        }
        safepatch::settle(*run, entries, goal, old_entries, new_entries, *tally);
    });
}
