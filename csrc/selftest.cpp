// Known inputs, known results: a build that fuses products and sums, flushes small numbers or has a broken
// instruction set says so here. tests/test_c_abi.py takes the digests from the reference engine.
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "guard.h"

namespace {

constexpr size_t kPatches = 2;

struct Case {
    int32_t dtype;
    int32_t kind[kPatches];
    int32_t importance[kPatches];
    int32_t weight, acts, join, order;
    int64_t entries;
    uint64_t digest;
};

// Each value of each field, and sizes below and beyond what is done in one piece.
constexpr Case kCases[] = {
    {SP_F32, {0, 0}, {0, 0}, 0, SP_ALONE, SP_SUM, 0, 3001, 0x15cebbcbf5e8a2ea},
    {SP_BF16, {0, 1}, {1, 0}, 0, SP_ALL, SP_SUM, 1, 3001, 0xbfb1d4594376d4c3},
    {SP_F16, {1, 1}, {2, 2}, 1, SP_ELECTED, SP_MEAN, 0, 3001, 0xc5a87657841fcaac},
    {SP_BF16, {2, 0}, {0, 2}, 2, SP_ALL, SP_MEAN, 1, 3001, 0x678d62b3a4442dc5},
    {SP_F32, {2, 1}, {2, 1}, 0, SP_ELECTED, SP_SUM, 0, 3001, 0xdab216a59f6d7458},
    {SP_BF16, {0, 0}, {0, 1}, 0, SP_ALONE, SP_SUM, 0, 150001, 0xf4843db192447bdc},
};

// Word i of one of a case's inputs.
uint64_t word(size_t of, uint64_t input, int64_t i) {
    uint64_t x = (of * 16 + input) * 0x100000000 + static_cast<uint64_t>(i) + 1;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

// A finite number of moderate size, one in 64 subnormal; in 16 bits with few digits, so that scores are often equal.
uint32_t bits_of(uint64_t word, int32_t dtype) {
    const auto sign = static_cast<uint32_t>(word >> 63), digits = static_cast<uint32_t>(word);
    const uint32_t scale = (word >> 40) % 64 == 0 ? 0 : static_cast<uint32_t>(word >> 48) % 12 + 1;
    if (dtype == SP_F32) return sign << 31 | (scale == 0 ? 0 : scale + 118) << 23 | (digits & 0x7fffff);
    if (dtype == SP_BF16) return sign << 15 | (scale == 0 ? 0 : scale + 118) << 7 | (digits & 0x70);
    return sign << 15 | scale << 10 | (digits & 0x380);
}

// Entries of an input as they lie in a file.
class Numbers {
  public:
    Numbers(size_t of, uint64_t input, int64_t entries, int32_t dtype) : dtype_(dtype) {
        for (int64_t i = 0; i < entries; ++i) {
            const uint32_t bits = bits_of(word(of, input, i), dtype);
            wide_.push_back(bits);
            narrow_.push_back(static_cast<uint16_t>(bits));
        }
    }
    void lose_signs() {
        for (uint32_t& bits : wide_) bits &= 0x7fffffff;
        for (uint16_t& bits : narrow_) bits &= 0x7fff;
    }
    sp_bits bits() { return {data(), dtype_}; }
    void* data() { return dtype_ == SP_F32 ? static_cast<void*>(wide_.data()) : narrow_.data(); }
    const float* floats() const { return reinterpret_cast<const float*>(wide_.data()); }
    uint32_t at(size_t i) const { return dtype_ == SP_F32 ? wide_[i] : narrow_[i]; }

  private:
    int32_t dtype_;
    std::vector<uint32_t> wide_;
    std::vector<uint16_t> narrow_;
};

// FNV-1a over words.
class Digest {
  public:
    void add(uint64_t word) { value_ = (value_ ^ word) * 0x100000001b3; }
    uint64_t value() const { return value_; }

  private:
    uint64_t value_ = 0xcbf29ce484222325;
};

void need_ok(sp_status status) {
    if (status == SP_NO_MEMORY) throw std::bad_alloc();
    if (status != SP_OK) throw std::runtime_error(sp_last_error());
}

uint64_t digest(sp_engine* engine, size_t of, const Case& test) {
    constexpr int64_t rank = 3, cols = 50;
    const int64_t rows = (test.entries + 3) / cols + 1;
    Numbers base(of, 0, test.entries, test.dtype);
    std::vector<Numbers> inputs;
    inputs.reserve(4 * kPatches);
    sp_patch patches[kPatches] = {};
    for (size_t p = 0; p < kPatches; ++p) {
        patches[p].size = sizeof patches[p];
        patches[p].present = 1;
        patches[p].kind = test.kind[p];
        patches[p].importance = test.importance[p];
        patches[p].weight = test.weight;
        patches[p].values = inputs.emplace_back(of, 5 * p + 1, test.entries, test.dtype).bits();
        Numbers& scores = inputs.emplace_back(of, 5 * p + 2, test.entries, test.dtype);
        if (test.importance[p] == SP_SCORES) scores.lose_signs();
        patches[p].scores = scores.bits();
        const float* a = inputs.emplace_back(of, 5 * p + 3, rank * cols, SP_F32).floats();
        const float* b = inputs.emplace_back(of, 5 * p + 4, rank * rows, SP_F32).floats();
        patches[p].lora = {a, b, rank, rows, cols, 0.75f};
        sp_random_key(7, p == 0 ? "one" : "two", "tensor", &patches[p].random_key);
        sp_keep(p == 0 ? 0.3 : 0.9, &patches[p].keep);
        patches[p].scale = p == 0 ? 0.7f : -1.3f;
    }
    sp_block block{};
    block.size = sizeof block;
    block.base = base.bits();
    block.entries = test.entries;
    block.start = 3;
    block.patches = patches;
    block.patch_count = kPatches;
    block.acts = test.acts;
    block.join = test.join;
    block.order = test.order;

    const int64_t quotas[kPatches] = {test.entries / 7, test.entries / 3};
    sp_cut cuts[kPatches] = {};
    cuts[0].size = sizeof cuts[0];
    sp_patch_report reports[kPatches] = {};
    reports[0].size = sizeof reports[0];
    sp_report report{};
    report.size = sizeof report;
    report.patches = reports;
    const sp_status status = sp_merge(engine, &block, quotas, base.data(), cuts, &report);
    need_ok(status);
    Digest found;
    for (size_t i = 0; i < static_cast<size_t>(test.entries); ++i) found.add(base.at(i));
    for (size_t p = 0; p < kPatches; ++p) {
        const sp_patch_report& of_patch = reports[p];
        for (const int64_t n : {of_patch.eligible, of_patch.selected, of_patch.applied, of_patch.negative.count}) {
            found.add(static_cast<uint64_t>(n));
        }
        found.add(cuts[p].key);
        found.add(static_cast<uint64_t>(cuts[p].before));
    }
    found.add(static_cast<uint64_t>(report.acted));
    found.add(static_cast<uint64_t>(report.changed));
    return found.value();
}

void check_isa(const char* isa) {
    sp_engine* engine = nullptr;
    need_ok(sp_engine_open(1, isa, &engine));
    const struct Close {
        sp_engine* engine;
        ~Close() { sp_engine_close(engine); }
    } close{engine};
    for (size_t i = 0; i < std::size(kCases); ++i) {
        const uint64_t found = digest(engine, i, kCases[i]);
        if (found != kCases[i].digest) {
            throw std::runtime_error("self-test: case " + std::to_string(i) + " differs with " + isa + ": found " +
                                     std::to_string(found) + ", expected " + std::to_string(kCases[i].digest));
        }
    }
}

}  // namespace

sp_status sp_selftest(void) {
    return safepatch::guarded([] {
        for (const char* isa : {"scalar", "neon", "avx2", "avx512"}) {
            if (sp_isa_usable(isa)) check_isa(isa);
        }
    });
}
