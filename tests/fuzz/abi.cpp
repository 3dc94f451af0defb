// libFuzzer target for the C interface: any call that passes memory of the size it claims returns a status, keeps
// within that memory, and gives the same bytes on every instruction set. Sizes are small so that an input costs
// microseconds.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "safepatch.h"

namespace {

class Input {
  public:
    Input(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

    template <class T>
    T take() {
        T value{};
        const size_t n = std::min(sizeof(T), static_cast<size_t>(end_ - at_));
        if (n != 0) std::memcpy(&value, at_, n);
        at_ += n;
        return value;
    }
    // Mostly small and allowed values; one in 32 is anything.
    int32_t choice(int32_t count) {
        const auto byte = take<uint8_t>();
        return byte >= 248 ? take<int32_t>() : byte % count;
    }
    int64_t number(int64_t below) {
        const auto word = take<uint16_t>();
        return word >= 65024 ? take<int64_t>() : word % below;
    }
    // A buffer of exactly so many bytes, so that the sanitizer sees the first byte beyond.
    uint8_t* buffer(size_t bytes) {
        memory_.push_back(std::make_unique<uint8_t[]>(bytes));
        uint8_t* data = memory_.back().get();
        const size_t n = std::min(bytes, static_cast<size_t>(end_ - at_));
        if (n != 0) std::memcpy(data, at_, n);
        for (size_t i = n; i < bytes; ++i) data[i] = static_cast<uint8_t>(i * 37 + n);
        at_ += n;
        return data;
    }

  private:
    const uint8_t *at_, *end_;
    std::vector<std::unique_ptr<uint8_t[]>> memory_;
};

constexpr int64_t kMost = 600;

// As many bytes as the entries of a valid call need; a call that is refused may name any number.
sp_bits bits(Input& in, int64_t entries) {
    sp_bits of{nullptr, in.choice(3)};
    const int64_t n = entries >= 0 && entries <= kMost ? entries : 0;
    if (in.choice(32) != 0) of.data = in.buffer(static_cast<size_t>(n) * (of.dtype == SP_F32 ? 4 : 2));
    return of;
}

// A way in which the block may be stored, and the bytes of its codes; as much memory as it needs and no more.
std::vector<uint8_t> coded(Input& in, const sp_block& block, sp_codes& codes) {
    codes.size = sizeof codes;
    codes.grid = in.take<uint8_t>() % 4;
    codes.flip = in.take<uint8_t>();
    codes.rows = 1 + in.take<uint8_t>() % 20;
    codes.cols = 1 + in.take<uint8_t>() % 40;
    codes.block_rows = 1 + in.take<uint8_t>() % 24;
    codes.block_cols = 1 + in.take<uint8_t>() % 48;
    codes.turned = in.take<uint8_t>() % 4 == 0;
    codes.handed = in.take<uint8_t>() % 3;
    codes.rounding = in.take<uint8_t>() % 2;
    codes.random_key = in.take<uint64_t>();
    const bool halves = codes.grid == SP_E2M1 || codes.grid == SP_INT4;
    const int64_t matrix = codes.rows * codes.cols, whole = codes.turned ? (matrix % 2 ? 2 * matrix : matrix) : 2;
    codes.first = block.start / whole * whole;
    codes.entries = (block.start + block.entries + whole - 1) / whole * whole - codes.first;
    const auto row = [&codes](int64_t place) {
        const int64_t down = (codes.rows - 1) / codes.block_rows + 1, at = place / codes.cols;
        return at / codes.rows * down + at % codes.rows / codes.block_rows;
    };
    codes.scale_first = row(codes.first);
    codes.scale_rows = codes.entries > 0 ? row(codes.first + codes.entries - 1) + 1 - codes.scale_first : 0;
    const int64_t scales = codes.scale_rows * ((codes.cols - 1) / codes.block_cols + 1);
    codes.scales = reinterpret_cast<const float*>(in.buffer(static_cast<size_t>(scales) * 4));
    codes.original.dtype = in.take<uint8_t>() % 3;
    const size_t width = codes.original.dtype == SP_F32 ? 4 : 2;
    if (in.take<uint8_t>() % 4 == 0) codes.original.data = in.buffer(static_cast<size_t>(codes.entries) * width);
    const auto n = static_cast<size_t>(halves ? codes.entries / 2 : codes.entries);
    const uint8_t* data = in.buffer(n);
    return {data, data + n};
}

// One engine per instruction set, alone and with a helper thread.
std::vector<sp_engine*> open_all() {
    std::vector<sp_engine*> engines;
    for (const char* isa : {"scalar", "neon", "avx2", "avx512"}) {
        for (int32_t threads : {1, 2}) {
            sp_engine* engine = nullptr;
            if (sp_isa_usable(isa) && sp_engine_open(threads, isa, &engine) == SP_OK) engines.push_back(engine);
        }
    }
    std::fprintf(stderr, "%zu engines\n", engines.size());
    return engines;
}

[[noreturn]] void wrong(const char* what) {
    std::fprintf(stderr, "wrong: %s\n", what);
    std::abort();
}

bool same(const sp_fault& a, const sp_fault& b) {
    return a.count == b.count && a.first == b.first;
}

bool same(const sp_patch_report& a, const sp_patch_report& b) {
    return a.eligible == b.eligible && a.selected == b.selected && a.applied == b.applied &&
           same(a.bad_delta, b.bad_delta) && same(a.bad_score, b.bad_score) && same(a.negative, b.negative);
}

}  // namespace

// Notes of what is counted from the cuts' keys on: the counts are those of a histogram, and applying the cuts gives
// what it gives, without the patches.
static void apply_by_notes(sp_engine* engine, sp_block block, std::vector<sp_patch> patches,
                           const std::vector<sp_cut>& cuts, size_t bytes) {
    constexpr size_t bins = 8;
    block.patches = patches.data();
    std::vector<int64_t> counts[2];
    std::vector<sp_patch_report> reports[2][2];  // [counting, applying][by notes]
    std::vector<uint32_t> out[2];
    sp_notes* notes = nullptr;
    for (const int by_notes : {0, 1}) {
        counts[by_notes].assign(patches.size() * bins, 0);
        std::vector<sp_window> windows;
        for (size_t p = 0; p < patches.size(); ++p) {
            int64_t* to = counts[by_notes].data() + p * bins;
            const uint32_t lo = std::min(cuts[p].key, cuts[p].skip_key == 0 ? cuts[p].key : cuts[p].skip_key);
            if (patches[p].present) windows.push_back({sizeof(sp_window), p, lo, 20, bins, to});
        }
        sp_report report{};
        report.size = sizeof report;
        for (auto& of : reports) {
            of[by_notes].assign(patches.size(), {});
            for (sp_patch_report& each : of[by_notes]) each.size = sizeof each;
        }
        report.patches = reports[0][by_notes].data();
        const sp_status counted =
            by_notes == 0 ? sp_histogram(engine, &block, windows.data(), windows.size(), &report)
                          : sp_notes_count(engine, &block, windows.data(), windows.size(), &report, &notes);
        if (counted != SP_OK) wrong("another status of counting by notes");
        if (by_notes == 1 && notes == nullptr) break;
        if (by_notes == 1) {
            for (sp_patch& patch : patches) patch.values.data = patch.lora.a = patch.lora.b = nullptr;
        }
        report.patches = reports[1][by_notes].data();
        out[by_notes].resize(bytes / 4 + 1);
        const sp_status applied = by_notes == 0
                                      ? sp_apply(engine, &block, cuts.data(), out[0].data(), &report)
                                      : sp_notes_apply(notes, engine, &block, cuts.data(), out[1].data(), &report);
        if (applied != SP_OK) wrong("another status of applying by notes");
    }
    if (counts[0] != counts[1]) wrong("other counts by notes");
    for (size_t p = 0; p < patches.size(); ++p) {
        if (!same(reports[0][0][p], reports[0][1][p])) wrong("another report of counting by notes");
        if (notes != nullptr && !same(reports[1][0][p], reports[1][1][p]))
            wrong("another report of applying by notes");
    }
    if (notes != nullptr && out[0] != out[1]) wrong("other bytes of applying by notes");
    sp_notes_close(notes);
}

// Of the same block with magnitudes and quotas that lists can hold: notes give what a merge gives, without the
// patches.
static void merge_by_notes(sp_engine* engine, sp_block block, std::vector<sp_patch> patches,
                           std::vector<int64_t> quotas, size_t bytes) {
    bool within = true;
    for (size_t p = 0; p < patches.size(); ++p) {
        patches[p].importance = SP_MAGNITUDE;
        quotas[p] = 1 + quotas[p] % (block.entries - 1);
        within = within && (!patches[p].present || patches[p].skip <= quotas[p]);
    }
    block.patches = patches.data();
    sp_notes* notes = nullptr;
    if (sp_notes_take(engine, &block, quotas.data(), &notes) != SP_OK) wrong("no notes of a block that merges");
    if (notes == nullptr) return;
    std::vector<sp_patch_report> reports[2];
    std::vector<uint32_t> out[2];  // aligned for any dtype
    for (const int by_notes : {0, 1}) {
        reports[by_notes].assign(patches.size(), {});
        for (sp_patch_report& of : reports[by_notes]) of.size = sizeof of;
        sp_report report{};
        report.size = sizeof report;
        report.patches = reports[by_notes].data();
        std::vector<sp_cut> cuts(patches.size(), {sizeof(sp_cut), 0, 0, 0, 0});
        out[by_notes].resize(bytes / 4 + 1);
        const sp_status status =
            by_notes == 0 ? sp_merge(engine, &block, quotas.data(), out[0].data(), cuts.data(), &report)
                          : sp_notes_merge(notes, engine, &block, quotas.data(), out[1].data(), cuts.data(), &report);
        if (status != (by_notes == 0 || within ? SP_OK : SP_BAD_ARGUMENT)) wrong("another status by notes");
        if (by_notes == 0) apply_by_notes(engine, block, patches, cuts, bytes);
        for (sp_patch& patch : patches) patch.values.data = patch.lora.a = patch.lora.b = nullptr;
    }
    sp_notes_close(notes);
    if (!within) return;
    if (out[0] != out[1]) wrong("other bytes by notes");
    for (size_t p = 0; p < patches.size(); ++p) {
        if (!same(reports[0][p], reports[1][p])) wrong("another report by notes");
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const std::vector<sp_engine*> engines = open_all();
    Input in(data, size);
    const int what = in.take<uint8_t>() % 4;
    // The plain engine and one of the others.
    const size_t other = in.take<uint8_t>() % engines.size();
    sp_block block{};
    block.size = sizeof block;
    block.entries = in.number(kMost);
    block.start = in.number(1 << 16);
    const int32_t rule = in.choice(6);
    block.acts = rule % 3;
    block.join = rule / 3;
    block.order = in.choice(2);
    // A range that would be valid has its memory; one that is too long must be refused before it is read.
    if (block.entries > kMost) block.entries = INT64_MAX - block.entries % 1000, block.start |= 1 << 20;
    block.base = bits(in, block.entries);
    std::vector<sp_patch> patches(static_cast<size_t>(in.take<uint8_t>() % 5));
    for (sp_patch& patch : patches) {
        patch.size = sizeof patch;
        patch.present = in.choice(4) != 0;
        patch.kind = in.choice(3);
        patch.importance = in.choice(3);
        patch.weight = in.choice(3);
        patch.random_key = in.take<uint64_t>();
        patch.keep = in.choice(3) == 0 ? SP_KEEP_ALL : in.take<uint64_t>();
        patch.scale = in.take<float>();
        patch.values = bits(in, block.entries);
        patch.scores = bits(in, block.entries);
        if (patch.kind != SP_LORA) continue;
        sp_lora& lora = patch.lora;
        lora.rank = in.number(5), lora.cols = in.number(40), lora.scale = in.take<float>();
        const bool usable = lora.rank >= 0 && lora.rank <= 64 && lora.cols > 0 && lora.cols <= 4096 &&
                            block.start >= 0 && block.start <= (1 << 20) && block.entries >= 0 &&
                            block.entries <= kMost;
        lora.rows = usable ? (block.start + block.entries) / lora.cols + in.choice(2) : in.number(100);
        if (!usable || lora.rows < 0 || lora.rows > (1 << 21)) {
            lora.rows = 0;  // refused unless the block is empty
            continue;
        }
        lora.a = reinterpret_cast<const float*>(in.buffer(static_cast<size_t>(lora.rank * lora.cols) * 4));
        lora.b = reinterpret_cast<const float*>(in.buffer(static_cast<size_t>(lora.rank * lora.rows) * 4));
    }
    block.patches = patches.data();
    block.patch_count = patches.size();

    std::vector<sp_cut> cuts(patches.size());
    std::vector<int64_t> quotas(patches.size());
    std::vector<uint32_t> keys(patches.size());
    for (size_t p = 0; p < patches.size(); ++p) {
        cuts[p] = {sizeof(sp_cut), in.take<uint32_t>(), in.number(1 << 16), 0, 0};
        quotas[p] = in.number(kMost);
        keys[p] = in.take<uint32_t>();
    }
    std::vector<std::vector<int64_t>> counts;
    std::vector<sp_window> windows(static_cast<size_t>(in.take<uint8_t>() % 4));
    for (sp_window& window : windows) {
        window = {sizeof window,
                  static_cast<size_t>(in.choice(4)),
                  in.take<uint32_t>(),
                  static_cast<uint32_t>(in.choice(32)),
                  0,
                  nullptr};
        window.bins = in.take<uint8_t>();
        counts.emplace_back(window.bins);
        window.counts = counts.back().data();
    }
    // Last, so that inputs from before these fields mean what they meant.
    for (size_t p = 0; p < patches.size(); ++p) {
        patches[p].skip = in.number(kMost);
        cuts[p].skip_key = in.take<uint32_t>();
        cuts[p].skip_before = in.number(1 << 16);
    }
    const auto lambda = in.take<float>();
    if (in.choice(2) != 0) block.lambda = &lambda;

    const bool valid = block.entries >= 0 && block.entries <= kMost;
    sp_codes codes{};
    std::vector<uint8_t> code_bytes;
    if (valid && block.start >= 0 && block.start < 1 << 20 && in.take<uint8_t>() % 4 == 1) {
        code_bytes = coded(in, block, codes);
        block.codes = &codes;
    }
    const size_t bytes = valid ? static_cast<size_t>(block.entries) * (block.base.dtype == SP_F32 ? 4 : 2) : 0;
    struct Outcome {
        sp_status status;
        std::vector<uint8_t> out;
        std::vector<sp_patch_report> reports;
        sp_fault overflow;
        std::vector<int64_t> numbers;
        std::vector<uint8_t> codes{};
        std::vector<sp_kept> kept{};
        sp_fault saturated{}, bad_scale{};
    };
    std::vector<Outcome> outcomes;
    for (sp_engine* engine : {engines[0], engines[other]}) {
        Outcome o{SP_OK, std::vector<uint8_t>(bytes), std::vector<sp_patch_report>(patches.size()), {}, {}};
        o.kept.resize(patches.size());
        auto out = std::make_unique<uint8_t[]>(bytes);
        for (sp_patch_report& of : o.reports) of.size = sizeof of;
        sp_report report{};
        report.size = sizeof report;
        report.patches = o.reports.data();
        report.kept = o.kept.data();
        for (sp_kept& of : o.kept) of.size = sizeof of;
        auto changed = std::make_unique<uint8_t[]>(code_bytes.size());
        std::copy(code_bytes.begin(), code_bytes.end(), changed.get());
        codes.data = changed.get();
        void* to = block.codes != nullptr ? static_cast<void*>(codes.data) : out.get();
        if (what == 0) {
            for (auto& of : counts) std::fill(of.begin(), of.end(), 0);
            o.status = sp_histogram(engine, &block, windows.data(), windows.size(), &report);
            for (const auto& of : counts) o.numbers.insert(o.numbers.end(), of.begin(), of.end());
        } else if (what == 1) {
            o.numbers.resize(patches.size());
            o.status = sp_count_equal(engine, &block, keys.data(), o.numbers.data());
        } else if (what == 2) {
            o.status = sp_apply(engine, &block, cuts.data(), to, &report);
        } else {
            std::vector<sp_cut> found(patches.size(), {sizeof(sp_cut), 0, 0, 0, 0});
            o.status = sp_merge(engine, &block, quotas.data(), to, found.data(), &report);
            for (size_t p = 0; o.status == SP_OK && p < found.size(); ++p) {
                if (o.reports[p].selected > std::max<int64_t>(quotas[p], 0)) wrong("more selected than the quota");
            }
            const bool floats = block.codes == nullptr;
            if (o.status == SP_OK && block.entries > 1 && floats)
                merge_by_notes(engine, block, patches, quotas, bytes);
        }
        if (o.status == SP_INTERNAL) wrong("an internal error");
        if (o.status != SP_OK && std::strlen(sp_last_error()) == 0) wrong("no reason given");
        if (bytes != 0) std::memcpy(o.out.data(), out.get(), bytes);
        o.codes.assign(changed.get(), changed.get() + code_bytes.size());
        o.overflow = report.overflow;
        o.saturated = report.saturated;
        o.bad_scale = report.bad_scale;
        outcomes.push_back(std::move(o));
    }
    const Outcome& first = outcomes.front();
    for (const Outcome& o : outcomes) {
        if (o.status != first.status) wrong("another status");
        if (o.status != SP_OK) continue;
        if (o.numbers != first.numbers) wrong("other counts");
        if (what == 1) continue;
        for (size_t p = 0; p < patches.size(); ++p) {
            if (!same(o.reports[p], first.reports[p])) wrong("another report");
        }
        if (what >= 2 && (o.out != first.out || !same(o.overflow, first.overflow))) wrong("other bytes");
        if (what < 2 || block.codes == nullptr) continue;
        if (o.codes != first.codes) wrong("other codes");
        if (!same(o.saturated, first.saturated) || !same(o.bad_scale, first.bad_scale)) wrong("other faults");
        for (size_t p = 0; p < patches.size(); ++p) {
            if (std::memcmp(&o.kept[p], &first.kept[p], sizeof(sp_kept)) != 0) wrong("other sums");
        }
    }
    return 0;
}
