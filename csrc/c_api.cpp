// The C interface: checks every argument that could lead out of bounds, and lets no exception through.
#include "block.h"
#include "dispatch.h"
#include "engine.h"
#include "fix.h"
#include "guard.h"
#include "sized.h"

using safepatch::adopted;
using safepatch::aligned;
using safepatch::give;
using safepatch::guarded;
using safepatch::need;
using safepatch::OwnBlock;

namespace {

// A caller's report: filled on our side, handed over when all has gone well.
class Findings {
  public:
    Findings(sp_report* report, const OwnBlock& block) : to_(report), own_{}, patches_(block.patch_count) {
        safepatch::stride_of(report, "report");
        if (block.patch_count > 0) safepatch::stride_of(report->patches, "report of a patch");
        own_.patches = patches_.data();
        if (block.codes == nullptr || block.patch_count == 0) return;
        need(report->size >= offsetof(sp_report, bad_scale), "report: too small for codes");
        safepatch::stride_of(report->kept, "what is kept of a patch");
        kept_.resize(block.patch_count);
        own_.kept = kept_.data();
    }
    sp_report& report() { return own_; }
    void hand_over() {
        own_.patches = to_->patches;
        give(own_.patches, patches_);
        own_.kept = nullptr;
        if (to_->size >= offsetof(sp_report, bad_scale)) own_.kept = to_->kept;
        if (!kept_.empty()) give(own_.kept, kept_);
        give(to_, own_);
    }

  private:
    sp_report* to_;
    sp_report own_;
    std::vector<sp_patch_report> patches_;
    std::vector<sp_kept> kept_;
};

std::vector<sp_window> checked(const sp_window* windows, size_t count, const OwnBlock& block) {
    need(count == 0 || windows != nullptr, "null windows");
    std::vector<sp_window> all = adopted(windows, count, "window");
    for (const sp_window& window : all) {
        need(window.patch < block.patch_count, "window patch");
        need(window.shift <= 31, "window shift");
        need(window.bins == 0 || (window.counts != nullptr && aligned(window.counts, 8)), "window counts");
    }
    return all;
}

void check_output(const sp_block& block, const void* out) {
    if (block.codes != nullptr) {
        need(out == block.codes->data, "output: of codes, their own data");
        return;
    }
    need(block.entries == 0 || (out != nullptr && aligned(out, block.base.dtype == SP_F32 ? 4 : 2)), "output");
}

void check_quotas(const OwnBlock& block, const int64_t* quotas) {
    need(block.patch_count == 0 || quotas != nullptr, "null array");
    for (size_t p = 0; p < block.patch_count; ++p) need(quotas[p] >= 0, "negative quota");
}

// What all ways to merge a whole tensor have in common.
template <class Call>
void merge_by(const OwnBlock& block, const int64_t* quotas, const void* out, sp_cut* cuts, sp_report* report,
              const Call& call) {
    Findings found(report, block);
    check_quotas(block, quotas);
    need(block.patch_count == 0 || cuts != nullptr, "null array");
    check_output(block, out);
    if (block.patch_count > 0) safepatch::stride_of(cuts, "cut");
    std::vector<sp_cut> chosen(block.patch_count);
    call(chosen.data(), found.report());
    give(cuts, chosen);
    found.hand_over();
}

void check_width(int32_t width) { need(width == 1 || width == 2 || width == 4, "entry width"); }

void check(const sp_fix_changes& out, int32_t width, int64_t start, int64_t entries) {
    need(start >= 0 && entries >= 0 && start <= INT64_MAX - entries, "range of entries");
    if (entries == 0) return;
    need(out.counts != nullptr && out.at != nullptr && out.side != nullptr, "null array");
    for (int32_t k = 0; k < width; ++k) need(out.planes[k] != nullptr, "null plane");
    need(out.old_entries != nullptr && aligned(out.old_entries, width), "old entries");
    need(out.new_entries != nullptr && aligned(out.new_entries, width), "new entries");
}

// The table must fit the lengths and go upwards: then no array is left.
void check(const sp_fix_run& run) {
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
        case SP_STOPPED:
            return "stopped by the caller";
        case SP_IO_FAILED:
            return "reading or writing failed";
    }
    return "unknown status";
}

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

const char* sp_engine_isa(const sp_engine* engine) { return engine == nullptr ? "none" : engine->engine.isa().name; }

int32_t sp_engine_threads(const sp_engine* engine) { return engine == nullptr ? 0 : engine->engine.threads(); }

size_t sp_scratch(const sp_engine* engine, int64_t entries, size_t patches) {
    return engine == nullptr || entries < 0 ? 0 : engine->engine.scratch(entries, patches);
}

sp_status sp_histogram(sp_engine* engine, const sp_block* block, const sp_window* windows, size_t count,
                       sp_report* report) {
    return guarded([&] {
        need(engine != nullptr, "null engine");
        const OwnBlock own(block);
        Findings found(report, own);
        engine->engine.histogram(own, checked(windows, count, own).data(), count, found.report());
        found.hand_over();
    });
}

sp_status sp_count_equal(sp_engine* engine, const sp_block* block, const uint32_t* keys, int64_t* counts) {
    return guarded([&] {
        need(engine != nullptr, "null engine");
        const OwnBlock own(block);
        need(own.patch_count == 0 || (keys != nullptr && counts != nullptr), "null array");
        engine->engine.count_equal(own, keys, counts);
    });
}

sp_status sp_apply(sp_engine* engine, const sp_block* block, const sp_cut* cuts, void* out, sp_report* report) {
    return guarded([&] {
        need(engine != nullptr, "null engine");
        const OwnBlock own(block);
        Findings found(report, own);
        need(own.patch_count == 0 || cuts != nullptr, "null array");
        check_output(own, out);
        engine->engine.apply(own, adopted(cuts, own.patch_count, "cut").data(), out, found.report());
        found.hand_over();
    });
}

sp_status sp_merge(sp_engine* engine, const sp_block* block, const int64_t* quotas, void* out, sp_cut* cuts,
                   sp_report* report) {
    return guarded([&] {
        need(engine != nullptr, "null engine");
        const OwnBlock own(block);
        merge_by(own, quotas, out, cuts, report,
                 [&](sp_cut* chosen, sp_report& found) { engine->engine.merge(own, quotas, out, chosen, found); });
    });
}

sp_status sp_notes_take(sp_engine* engine, const sp_block* block, const int64_t* quotas, sp_notes** notes) {
    if (notes != nullptr) *notes = nullptr;
    return guarded([&] {
        need(engine != nullptr && notes != nullptr, "null engine or notes");
        const OwnBlock own(block);
        check_quotas(own, quotas);
        if (auto kept = engine->engine.keep(own, quotas)) *notes = new sp_notes{std::move(kept)};
    });
}

sp_status sp_notes_count(sp_engine* engine, const sp_block* block, const sp_window* windows, size_t count,
                         sp_report* report, sp_notes** notes) {
    if (notes != nullptr) *notes = nullptr;
    return guarded([&] {
        need(engine != nullptr && notes != nullptr, "null engine or notes");
        const OwnBlock own(block);
        Findings found(report, own);
        auto kept = engine->engine.note(own, checked(windows, count, own).data(), count, found.report());
        if (kept) *notes = new sp_notes{std::move(kept)};
        found.hand_over();
    });
}

void sp_notes_close(sp_notes* notes) { delete notes; }

size_t sp_notes_bytes(const sp_notes* notes) { return notes == nullptr ? 0 : notes->kept->bytes(); }

sp_status sp_notes_merge(sp_notes* notes, sp_engine* engine, const sp_block* block, const int64_t* quotas, void* out,
                         sp_cut* cuts, sp_report* report) {
    return guarded([&] {
        need(engine != nullptr && notes != nullptr, "null engine or notes");
        const OwnBlock own(block, false);
        need(notes->kept->fits(own), "another block than the notes are of");
        merge_by(own, quotas, out, cuts, report, [&](sp_cut* chosen, sp_report& found) {
            need(notes->kept->reach(own, quotas), "a quota or skip beyond the notes'");
            engine->engine.merge(own, quotas, *notes->kept, out, chosen, found);
        });
    });
}

sp_status sp_notes_apply(sp_notes* notes, sp_engine* engine, const sp_block* block, const sp_cut* cuts, void* out,
                         sp_report* report) {
    return guarded([&] {
        need(engine != nullptr && notes != nullptr, "null engine or notes");
        const OwnBlock own(block, false);
        need(notes->kept->fits(own), "another block than the notes are of");
        Findings found(report, own);
        need(own.patch_count == 0 || cuts != nullptr, "null array");
        check_output(own, out);
        const std::vector<sp_cut> wanted = adopted(cuts, own.patch_count, "cut");
        need(notes->kept->reach(own, wanted.data()), "a cut below the notes'");
        engine->engine.apply(own, wanted.data(), *notes->kept, out, found.report());
        found.hand_over();
    });
}

sp_status sp_fix_find(int32_t width, const void* old_entries, const void* new_entries, int64_t entries, int64_t start,
                      const sp_fix_changes* out, int64_t* found) {
    return guarded([&] {
        check_width(width);
        need(found != nullptr, "null output");
        const sp_fix_changes to = adopted(out, "changes");
        check(to, width, start, entries);
        need(entries == 0 || (old_entries != nullptr && aligned(old_entries, width)), "old entries");
        need(entries == 0 || (new_entries != nullptr && aligned(new_entries, width)), "new entries");
        *found = safepatch::find_changes(width, old_entries, new_entries, entries, start, to);
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
        const sp_fix_run own = adopted(run, "run");
        safepatch::stride_of(tally, "tally");
        check(own);
        need(goal >= SP_FIX_KEEP && goal <= SP_FIX_NEW, "goal");
        need(own.entries == 0 || (entries != nullptr && aligned(entries, own.width)), "entries");
        for (const void* side : {old_entries, new_entries}) {
            need(own.changes == 0 || (side != nullptr && aligned(side, own.width)), "old or new entries");
        }
        sp_fix_tally found{};
        safepatch::settle(own, entries, goal, old_entries, new_entries, found);
        give(tally, found);
    });
}
