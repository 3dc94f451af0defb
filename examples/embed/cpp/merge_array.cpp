// Merge one array of bf16 entries: merge_array BASE PATCHED OUT TOP RETAIN, files of raw entries.
// Any number of threads, any instruction set: the same bytes as `safepatch merge` gives the tensor "array".
#include <safepatch.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void check(sp_status status) {
    if (status != SP_OK) throw std::runtime_error(std::string(sp_strerror(status)) + ": " + sp_last_error());
}

struct Close {
    void operator()(sp_engine* engine) const { sp_engine_close(engine); }
};
using Engine = std::unique_ptr<sp_engine, Close>;

Engine open_engine(int32_t threads) {
    sp_engine* engine = nullptr;
    check(sp_engine_open(threads, nullptr, &engine));
    return Engine(engine);
}

std::vector<char> read(const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(std::string(path) + ": cannot be read");
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Told between steps; anything but 0 would end the call with SP_STOPPED.
int tell(void* user, int64_t done, int64_t total) {
    *static_cast<double*>(user) = static_cast<double>(done) / static_cast<double>(total);
    return 0;
}

void merge(sp_engine* engine, std::vector<char>& base, const std::vector<char>& patched, double top, double retain) {
    if (base.size() != patched.size() || base.size() % 2 != 0) throw std::runtime_error("arrays of other lengths");
    const auto entries = static_cast<int64_t>(base.size() / 2);
    double share = 0;
    int64_t quota = 0;
    check(sp_quota(top, entries, &quota));

    sp_patch patch{};
    patch.size = sizeof patch;
    patch.present = 1;
    patch.kind = SP_CHECKPOINT;
    patch.importance = SP_MAGNITUDE;
    patch.values = {patched.data(), SP_BF16};
    patch.scale = 1;
    check(sp_random_key(0, "patch", "array", &patch.random_key));
    check(sp_keep(retain, &patch.keep));

    sp_block block{};
    block.size = sizeof block;
    block.base = {base.data(), SP_BF16};
    block.entries = entries;
    block.patches = &patch;
    block.patch_count = 1;
    block.acts = SP_ALONE;
    block.join = SP_SUM;
    block.progress = tell;
    block.user = &share;

    sp_cut cut{};
    cut.size = sizeof cut;
    sp_patch_report found{};
    found.size = sizeof found;
    sp_report report{};
    report.size = sizeof report;
    report.patches = &found;
    check(sp_merge(engine, &block, &quota, base.data(), &cut, &report));
    if (found.bad_delta.count > 0) throw std::runtime_error("a difference is NaN or infinite");
    std::printf("%lld selected, %lld changed\n", static_cast<long long>(found.selected),
                static_cast<long long>(report.changed));
}

}  // namespace

int main(int argc, char** argv) {
    try {
        if (argc != 6) throw std::runtime_error("usage: merge_array BASE PATCHED OUT TOP RETAIN");
        std::vector<char> base = read(argv[1]);
        merge(open_engine(2).get(), base, read(argv[2]), std::stod(argv[4]), std::stod(argv[5]));
        std::ofstream(argv[3], std::ios::binary).write(base.data(), static_cast<std::streamsize>(base.size()));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
