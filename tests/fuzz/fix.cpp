// libFuzzer target for the fix file's calls of the C interface: whatever lies in a run's arrays, a call keeps within
// them, says why it refuses, and leaves the entries alone when it does. What is found in two versions of entries,
// encoded and told again gives these versions.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "safepatch.h"

namespace {

[[noreturn]] void wrong(const char* what) {
    std::fprintf(stderr, "wrong: %s\n", what);
    std::abort();
}

// Memory of exactly so many bytes, so that the sanitizer sees the first byte beyond.
class Memory {
  public:
    explicit Memory(size_t bytes) : bytes_(bytes), data_(std::make_unique<uint8_t[]>(bytes)) {}

    template <class T>
    T* as() {
        return reinterpret_cast<T*>(data_.get());
    }
    uint8_t* data() { return data_.get(); }
    size_t size() const { return bytes_; }
    bool operator==(const Memory& other) const {
        return bytes_ == other.bytes_ && std::memcmp(data_.get(), other.data_.get(), bytes_) == 0;
    }

  private:
    size_t bytes_;
    std::unique_ptr<uint8_t[]> data_;
};

struct Encoded {
    std::vector<uint64_t> rows;
    Memory gap, side;
    std::vector<Memory> planes;
    Memory before, after;  // the touched entries
    int64_t changes;
};

// Two versions of `entries` entries as the fix file has them, once they came back as they were.
Encoded encode(int32_t width, int32_t gap_width, const Memory& old_entries, const Memory& new_entries,
               int64_t entries) {
    const size_t n = static_cast<size_t>(entries), blocks = (n + SP_FIX_BLOCK - 1) / SP_FIX_BLOCK;
    std::vector<int64_t> counts(blocks), lengths(blocks);
    Memory at(2 * n), side(n), before(n * width), after(n * width);
    std::vector<Memory> planes;
    sp_fix_changes out{sizeof out, counts.data(), at.as<uint16_t>(), side.data(), {}, before.data(), after.data()};
    for (int32_t k = 0; k < width; ++k) {
        planes.emplace_back(n);
        out.planes[k] = planes.back().data();
    }
    int64_t found = 0;
    auto* a = const_cast<Memory&>(old_entries).data();
    auto* b = const_cast<Memory&>(new_entries).data();
    if (sp_fix_find(width, a, b, entries, 0, &out, &found) != SP_OK) wrong("find refuses");
    if (sp_fix_gaps(out.at, counts.data(), blocks, gap_width, nullptr, lengths.data()) != SP_OK) wrong("gaps refuse");
    std::vector<uint64_t> rows(2 * blocks + 2);
    for (size_t i = 0; i < blocks; ++i) {
        rows[2 * i + 2] = rows[2 * i] + static_cast<uint64_t>(lengths[i]);
        rows[2 * i + 3] = rows[2 * i + 1] + static_cast<uint64_t>(counts[i]);
    }
    Memory gap(rows[2 * blocks] * static_cast<size_t>(gap_width)), packed((static_cast<size_t>(found) + 7) / 8);
    if (sp_fix_gaps(out.at, counts.data(), blocks, gap_width, gap.data(), lengths.data()) != SP_OK)
        wrong("gaps refuse");
    for (int64_t i = 0; i < found; ++i) packed.data()[i / 8] |= static_cast<uint8_t>(side.data()[i] << (i % 8));
    std::vector<Memory> cut;
    for (Memory& plane : planes) {
        cut.emplace_back(static_cast<size_t>(found));
        if (found != 0) std::memcpy(cut.back().data(), plane.data(), static_cast<size_t>(found));
    }
    return {std::move(rows),  std::move(gap), std::move(packed), std::move(cut), std::move(before),
            std::move(after), found};
}

sp_fix_run run_of(Encoded& from, int32_t width, int32_t gap_width, int64_t entries) {
    sp_fix_run run{};
    run.size = sizeof run;
    run.width = width, run.gap_width = gap_width, run.entries = entries;
    run.blocks = from.rows.size() / 2 - 1;
    run.rows = from.rows.data();
    run.gap = from.gap.data(), run.gap_count = from.gap.size() / static_cast<size_t>(gap_width);
    run.side = from.side.data(), run.side_count = from.side.size();
    for (int32_t k = 0; k < width; ++k) run.planes[k] = from.planes[static_cast<size_t>(k)].data();
    run.changes = static_cast<size_t>(from.changes);
    return run;
}

void settle(const sp_fix_run& run, Memory& entries, int32_t goal, sp_status& status, sp_fix_tally& tally) {
    Memory before(run.changes * static_cast<size_t>(run.width)), after(before.size());
    status = sp_fix_settle(&run, entries.data(), goal, before.data(), after.data(), &tally);
    if (status == SP_INTERNAL) wrong("an internal error");
    if (status != SP_OK && std::strlen(sp_last_error()) == 0) wrong("no reason given");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 8) return 0;
    const int32_t width = 1 << data[0] % 3, gap_width = 1 + data[1] % 2;
    const int64_t entries = 1 + (data[2] % 4 == 0 ? SP_FIX_BLOCK : 0) + data[3] * 3;
    const size_t step = 1 + data[4];  // about how far changes lie apart
    const size_t bytes = static_cast<size_t>(entries * width);
    Memory old_entries(bytes), new_entries(bytes);
    for (size_t i = 0; i < bytes; ++i) old_entries.data()[i] = static_cast<uint8_t>(i * 37 + data[i % size]);
    std::memcpy(new_entries.data(), old_entries.data(), bytes);
    for (size_t i = 0, j = 5; i < bytes; i += 1 + step * data[j % size] / 16, ++j)
        new_entries.data()[i] ^= data[j % size];
    Encoded from = encode(width, gap_width, old_entries, new_entries, entries);
    sp_fix_run run = run_of(from, width, gap_width, entries);

    Memory live(bytes);
    sp_status status = SP_OK;
    sp_fix_tally tally{sizeof tally, 0, 0, 0};
    std::memcpy(live.data(), old_entries.data(), bytes);
    settle(run, live, SP_FIX_NEW, status, tally);
    if (status != SP_OK || !(live == new_entries) || tally.old_count != from.changes) wrong("apply");
    settle(run, live, SP_FIX_OLD, status, tally);
    if (status != SP_OK || !(live == old_entries) || tally.new_count != from.changes) wrong("revert");

    // Now anything may lie in the arrays, and lengths may lie too, as far as the memory goes.
    for (size_t i = 5; i + 2 < size && i < 64; i += 3) {
        const size_t at = data[i] * 257u + data[i + 1];
        const uint8_t value = data[i + 2];
        switch (data[i] % 6) {
            case 0:
                if (from.gap.size() != 0) from.gap.data()[at % from.gap.size()] = value;
                break;
            case 1:
                from.rows[at % from.rows.size()] += static_cast<uint64_t>(value) - 128;
                break;
            case 2:
                if (from.changes != 0)
                    from.planes[at % from.planes.size()].data()[at % static_cast<size_t>(from.changes)] = value;
                break;
            case 3:
                run.planes[at % 4] = nullptr;
                break;
            case 4:
                run.side_count = std::min<size_t>(run.side_count, at % 8);
                break;
            default:
                run.blocks = std::min<size_t>(run.blocks, at % 3);
        }
    }
    std::memcpy(live.data(), old_entries.data(), bytes);
    settle(run, live, data[5] % 4, status, tally);
    if (status != SP_OK && !(live == old_entries)) wrong("a refused run has changed entries");
    return 0;
}
