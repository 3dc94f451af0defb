// Fix files over I/O callbacks: told and proved tensor by tensor as fixes/checking.py does it, then set in place.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "blake2b.h"
#include "fix.h"
#include "safetensors.h"
#include "sized.h"

namespace safepatch {
namespace {

constexpr uint64_t kBlock = SP_FIX_BLOCK;
constexpr uint64_t kWidest = 4;
// Bytes of entries that are worked on at once.
constexpr uint64_t kWindow = 4 << 20;
// Codes of one block: a change each, and U8 skips over the rest.
constexpr uint64_t kMostCodes = kBlock + kBlock / 255;

void rule(bool kept, const char* what) {
    if (!kept) throw Broken(what);
}

uint64_t blocks_of(uint64_t entries) { return entries / kBlock + (entries % kBlock != 0); }

// The arrays of a touched tensor. A plane is dense (`at` is null), sparse, or all zero (both are null).
struct Touched {
    struct Plane {
        const Stored* at = nullptr;
        const Stored* values = nullptr;
    };
    Facts facts;
    const Stored *block, *gap, *side;
    std::array<Plane, kWidest> planes;
};

struct Sides {
    int64_t before = 0, after = 0;
};

}  // namespace

// An open fix, and what a window of it needs.
class Fix {
  public:
    explicit Fix(const sp_io& io);

    const std::string& id() const { return id_; }
    const std::string& base() const { return base_; }
    const std::map<std::string, Touched>& tensors() const { return tensors_; }

    // Blocks [first, last) of a tensor; good until the next call.
    sp_fix_run run(const Touched& touched, uint64_t width, uint64_t first, uint64_t last);

  private:
    Touched touched(const std::string& name, const Facts& facts) const;
    const Stored* array(const std::string& name, const char* dtype, uint64_t entries) const;
    void read_rows(const Touched& touched, uint64_t first, uint64_t last);
    const uint8_t* plane(const Touched& touched, uint64_t k, uint64_t first, uint64_t last);
    uint64_t place(const Stored& at, uint64_t i) const;
    uint64_t places_before(const Stored& at, uint64_t rank) const;

    File file_;
    Header header_;
    std::string id_, base_;
    std::map<std::string, Touched> tensors_;
    std::vector<uint64_t> rows_;
    std::vector<unsigned char> gap_, side_;
    std::array<std::vector<uint8_t>, kWidest> planes_;
};

Fix::Fix(const sp_io& io) : file_(io), header_(file_) {
    const auto said = [&](const char* key) -> const std::string& {
        const auto found = header_.metadata.find(key);
        rule(found != header_.metadata.end(), "not a fix file, or one that lacks a key");
        return found->second;
    };
    rule(said("format") == "safepatch-fix", "not a fix file");
    rule(said("version") == "1", "a fix file of another version");
    base_ = said("base"), id_ = said("id");
    Blake2b hash(16);
    hash.add(base_);
    hash.add("\n");
    hash.add(said("tensors"));
    rule(hash.hex() == id_, "its id does not fit what it says");
    for (const auto& [name, facts] : facts_of(said("tensors"))) tensors_.emplace(name, touched(name, facts));
}

// An array by its name, null if there is none; throws unless it is one of so many entries (0: any number) and a
// dtype.
const Stored* Fix::array(const std::string& name, const char* dtype, uint64_t entries) const {
    const auto found = header_.tensors.find(name);
    if (found == header_.tensors.end()) return nullptr;
    rule(found->second.dtype == dtype && (entries == 0 || found->second.entries == entries),
         "an array of another type or length than its tensor's");
    return &found->second;
}

Touched Fix::touched(const std::string& name, const Facts& facts) const {
    const uint64_t n = facts.changes;
    rule(facts.entries <= INT64_MAX - kBlock, "a tensor of more entries than can be counted");
    Touched of{facts,
               array(name + "::block", "U64", 2 * (blocks_of(facts.entries) + 1)),
               nullptr,
               array(name + "::side", "U8", n / 8 + (n % 8 != 0)),
               {}};
    const auto gap = header_.tensors.find(name + "::gap");
    rule(of.block != nullptr && of.side != nullptr && gap != header_.tensors.end(), "an array is missing");
    of.gap = &gap->second;
    rule(of.gap->dtype == "U8" || of.gap->dtype == "U16", "gaps of another type");
    for (uint64_t k = 0; k < kWidest; ++k) {
        const std::string plane = name + "::xor" + std::to_string(k);
        of.planes[k].values = array(plane, "U8", n);
        if (of.planes[k].values != nullptr) continue;
        of.planes[k].at = array(plane + ".at", n < uint64_t{1} << 32 ? "U32" : "U64", 0);
        if (of.planes[k].at == nullptr) continue;
        of.planes[k].values = array(plane + ".val", "U8", 0);
        rule(of.planes[k].values != nullptr && of.planes[k].values->entries == of.planes[k].at->entries,
             "places without their values");
    }
    return of;
}

// Checked, so that whatever they point to lies within bounds.
void Fix::read_rows(const Touched& touched, uint64_t first, uint64_t last) {
    rows_.resize(2 * (last - first + 1));
    file_.read(touched.block->begin + 16 * first, rows_.data(), 8 * rows_.size());
    for (size_t i = 2; i < rows_.size(); ++i) {
        rule(rows_[i] >= rows_[i - 2] && rows_[i] - rows_[i - 2] <= (i % 2 == 0 ? kMostCodes : kBlock),
             "the block table is not in order");
    }
    const uint64_t *begin = rows_.data(), *end = begin + rows_.size() - 2;
    rule(first > 0 || (begin[0] == 0 && begin[1] == 0), "the block table does not begin at 0");
    const uint64_t codes = touched.gap->entries, changes = touched.facts.changes;
    rule(end[0] <= codes && end[1] <= changes, "the block table leads beyond its arrays");
    rule(last < blocks_of(touched.facts.entries) || (end[0] == codes && end[1] == changes),
         "the block table does not end with its arrays");
}

uint64_t Fix::place(const Stored& at, uint64_t i) const {
    const uint64_t width = at.width();
    unsigned char bytes[8] = {};
    file_.read(at.begin + i * width, bytes, width);
    uint64_t value = 0;
    for (uint64_t k = 0; k < width; ++k) value |= uint64_t{bytes[k]} << (8 * k);
    return value;
}

// How many of a sparse plane's places, which should be in order, lie before a rank.
uint64_t Fix::places_before(const Stored& at, uint64_t rank) const {
    uint64_t lo = 0, hi = at.entries;
    while (lo < hi) {
        const uint64_t middle = lo + (hi - lo) / 2;
        if (place(at, middle) < rank) {
            lo = middle + 1;
        } else {
            hi = middle;
        }
    }
    return lo;
}

// Bytes of a plane for the changes [first, last), null for zeros.
const uint8_t* Fix::plane(const Touched& touched, uint64_t k, uint64_t first, uint64_t last) {
    const auto& [at, values] = touched.planes[k];
    if (values == nullptr) return nullptr;
    std::vector<uint8_t>& dense = planes_[k];
    dense.assign(last - first, 0);
    if (at == nullptr) {
        file_.read(values->begin + first, dense.data(), dense.size());
        return dense.data();
    }
    const uint64_t from = places_before(*at, first), to = places_before(*at, last);
    rule(to - from <= last - first && from <= to, "places that are not in order");
    std::vector<uint8_t> found(to - from);
    file_.read(values->begin + from, found.data(), found.size());
    std::vector<unsigned char> raw(at->width() * found.size());
    file_.read(at->begin + at->width() * from, raw.data(), raw.size());
    uint64_t next = first;
    for (size_t i = 0; i < found.size(); ++i) {
        uint64_t where = 0;
        std::memcpy(&where, raw.data() + i * at->width(), at->width());
        rule(where >= next && where < last, "places that are not in order");
        dense[where - first] = found[i];
        next = where + 1;
    }
    return dense.data();
}

sp_fix_run Fix::run(const Touched& touched, uint64_t width, uint64_t first, uint64_t last) {
    read_rows(touched, first, last);
    const uint64_t code = rows_.front(), rank = rows_[1];
    const uint64_t code_end = rows_[rows_.size() - 2], rank_end = rows_.back();
    const uint64_t gap_width = touched.gap->width();
    gap_.resize(gap_width * (code_end - code));
    file_.read(touched.gap->begin + gap_width * code, gap_.data(), gap_.size());
    side_.resize(rank_end / 8 + (rank_end % 8 != 0) - rank / 8);
    file_.read(touched.side->begin + rank / 8, side_.data(), side_.size());
    sp_fix_run run{};
    run.size = sizeof run;
    run.width = static_cast<int32_t>(width);
    run.gap_width = static_cast<int32_t>(gap_width);
    run.entries = static_cast<int64_t>(std::min(touched.facts.entries, last * kBlock) - first * kBlock);
    run.blocks = last - first;
    run.rows = rows_.data();
    run.gap = gap_.data();
    run.gap_count = code_end - code;
    run.side = side_.data();
    run.side_count = side_.size();
    run.changes = rank_end - rank;
    for (uint64_t k = 0; k < kWidest; ++k) {
        if (k < width) {
            run.planes[k] = plane(touched, k, rank, rank_end);
        } else {
            rule(touched.planes[k].values == nullptr, "XORs of wider entries than the tensor's");
        }
    }
    return run;
}

namespace {

// The shards of a checkpoint.
class Checkpoint {
  public:
    struct Place {
        const File* file;
        const Stored* stored;
    };

    Checkpoint(const sp_io* first, size_t count) {
        for (const sp_io& io : adopted(first, count, "shard")) {
            need(io.read_at != nullptr && io.length != nullptr, "a shard without read_at or length");
            files_.push_back(std::make_unique<File>(io));
            headers_.push_back(std::make_unique<Header>(*files_.back()));
            for (const auto& [name, stored] : headers_.back()->tensors) {
                rule(places_.emplace(name, Place{files_.back().get(), &stored}).second, "a tensor is in two shards");
            }
        }
    }

    // By which a fix knows its base.
    std::string table() const {
        Blake2b hash(32);
        for (const auto& [name, place] : places_) {
            hash.add(name + '\0' + place.stored->dtype + '\0' + place.stored->shape + "\n");
        }
        return hash.hex();
    }
    const Place& at(const std::string& name) const {
        const auto found = places_.find(name);
        rule(found != places_.end(), "the fix touches a tensor that is not there");
        return found->second;
    }
    void require_writable() const {
        for (const auto& file : files_) need(file->writable(), "a shard without write_at");
    }
    void sync() const {
        for (const auto& file : files_) file->sync();
    }

  private:
    std::vector<std::unique_ptr<File>> files_;
    std::vector<std::unique_ptr<Header>> headers_;
    std::map<std::string, Place> places_;
};

// Goes through the windows of one tensor, tells the sides of its touched entries, and leaves `goal` in them.
class Teller {
  public:
    Teller(Fix& fix, const Touched& touched, const Checkpoint::Place& place)
        : fix_(fix), touched_(touched), place_(place), width_(place.stored->width()) {
        rule((width_ == 1 || width_ == 2 || width_ == 4) && place.stored->entries == touched.facts.entries,
             "a tensor is not the one that the fix touches");
    }

    Sides settle(int32_t goal) {
        Sides sides;
        const uint64_t count = blocks_of(touched_.facts.entries), step = kWindow / (kBlock * width_);
        for (uint64_t first = 0; first < count; first += step) {
            const sp_fix_run run = fix_.run(touched_, width_, first, std::min(first + step, count));
            if (run.changes == 0) continue;
            sp_fix_tally tally{};
            window(run, first * kBlock, goal, tally);
            sides.before += tally.old_count, sides.after += tally.new_count;
        }
        rule(old_hash_.hex() == touched_.facts.old_hash,
             "a tensor carries something else where the fix acts: another base, an edit, or another fix");
        rule(new_hash_.hex() == touched_.facts.new_hash, "the fix does not lead to the entries that it promises");
        return sides;
    }

  private:
    void window(const sp_fix_run& run, uint64_t start, int32_t goal, sp_fix_tally& tally) {
        const auto bytes = static_cast<size_t>(run.entries) * width_;
        const uint64_t offset = place_.stored->begin + start * width_;
        entries_.resize(bytes);
        olds_.resize(run.changes * width_), news_.resize(run.changes * width_);
        place_.file->read(offset, entries_.data(), bytes);
        safepatch::settle(run, entries_.data(), goal, olds_.data(), news_.data(), tally);
        old_hash_.add(olds_.data(), olds_.size());
        new_hash_.add(news_.data(), news_.size());
        const bool there = goal == SP_FIX_OLD ? tally.new_count == 0 : tally.old_count == 0;
        if (goal != SP_FIX_KEEP && !there) place_.file->write(offset, entries_.data(), bytes);
    }

    Fix& fix_;
    const Touched& touched_;
    const Checkpoint::Place& place_;
    uint64_t width_;
    Blake2b old_hash_{16}, new_hash_{16};
    std::vector<unsigned char> entries_, olds_, news_;
};

Sides settle_all(Fix& fix, const Checkpoint& checkpoint, int32_t goal) {
    Sides all;
    for (const auto& [name, touched] : fix.tensors()) {
        const Sides sides = Teller(fix, touched, checkpoint.at(name)).settle(goal);
        all.before += sides.before, all.after += sides.after;
    }
    return all;
}

Sides check(Fix& fix, const Checkpoint& checkpoint) {
    rule(checkpoint.table() == fix.base(), "another table of tensors than that of the fix's base");
    return settle_all(fix, checkpoint, SP_FIX_KEEP);
}

// Only once every touched entry of all shards is proved does a byte change.
void bring(Fix& fix, const Checkpoint& checkpoint, int32_t goal, bool resume, sp_fix_sides* sides) {
    checkpoint.require_writable();
    const Sides found = check(fix, checkpoint);
    give(sides, {sizeof(sp_fix_sides), found.before, found.after});
    rule(resume || found.before == 0 || found.after == 0, "a mixture of both sides, of a run that was cut off");
    rule(resume || (goal == SP_FIX_NEW ? found.before : found.after) > 0,
         goal == SP_FIX_NEW ? "carries the fix already" : "does not carry the fix: there is nothing to take out");
    settle_all(fix, checkpoint, goal);
    checkpoint.sync();
}

}  // namespace
}  // namespace safepatch

struct sp_fix {
    safepatch::Fix fix;
};

namespace {

using safepatch::Checkpoint;
using safepatch::guarded;
using safepatch::need;

sp_status set(sp_fix* fix, const sp_io* shards, size_t count, int32_t goal, int32_t resume, sp_fix_sides* sides) {
    return guarded([&] {
        need(fix != nullptr && shards != nullptr, "null fix or shards");
        safepatch::stride_of(sides, "sides");
        safepatch::bring(fix->fix, Checkpoint(shards, count), goal, resume != 0, sides);
    });
}

}  // namespace

sp_status sp_fix_open(const sp_io* file, sp_fix** fix) {
    if (fix != nullptr) *fix = nullptr;
    return guarded([&] {
        need(fix != nullptr, "null fix");
        const sp_io io = safepatch::adopted(file, "io");
        need(io.read_at != nullptr && io.length != nullptr, "a fix without read_at or length");
        *fix = new sp_fix{safepatch::Fix(io)};
    });
}

void sp_fix_close(sp_fix* fix) { delete fix; }

const char* sp_fix_id(const sp_fix* fix) { return fix == nullptr ? "" : fix->fix.id().c_str(); }

sp_status sp_fix_check(sp_fix* fix, const sp_io* shards, size_t count, sp_fix_sides* sides) {
    return guarded([&] {
        need(fix != nullptr && shards != nullptr, "null fix or shards");
        safepatch::stride_of(sides, "sides");
        const safepatch::Sides found = safepatch::check(fix->fix, Checkpoint(shards, count));
        safepatch::give(sides, {sizeof(sp_fix_sides), found.before, found.after});
    });
}

sp_status sp_fix_apply(sp_fix* fix, const sp_io* shards, size_t count, int32_t resume, sp_fix_sides* sides) {
    return set(fix, shards, count, SP_FIX_NEW, resume, sides);
}

sp_status sp_fix_revert(sp_fix* fix, const sp_io* shards, size_t count, int32_t resume, sp_fix_sides* sides) {
    return set(fix, shards, count, SP_FIX_OLD, resume, sides);
}
