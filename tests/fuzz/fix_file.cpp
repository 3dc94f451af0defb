// libFuzzer target for fix files over callbacks: whatever lies in a fix or in a shard, a call keeps within its memory,
// says why it refuses, and leaves the shard alone when it does; what it applies, it takes out again to the byte.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "safepatch.h"

namespace {

[[noreturn]] void wrong(const char* what) {
    std::fprintf(stderr, "wrong: %s\n", what);
    std::abort();
}

using Bytes = std::vector<uint8_t>;

int64_t read_at(void* user, uint64_t offset, void* data, size_t bytes) {
    const auto& file = *static_cast<Bytes*>(user);
    if (offset >= file.size()) return -1;
    const size_t n = std::min<size_t>(bytes, file.size() - offset);
    std::memcpy(data, file.data() + offset, n);
    return static_cast<int64_t>(n);
}

int64_t write_at(void* user, uint64_t offset, const void* data, size_t bytes) {
    auto& file = *static_cast<Bytes*>(user);
    if (offset > file.size() || bytes > file.size() - offset) wrong("a write beyond the shard");
    std::memcpy(file.data() + offset, data, bytes);
    return static_cast<int64_t>(bytes);
}

int64_t length(void* user) { return static_cast<int64_t>(static_cast<Bytes*>(user)->size()); }

sp_io io_of(Bytes& file) { return {sizeof(sp_io), &file, read_at, write_at, nullptr, length}; }

void refused(sp_status status) {
    if (status == SP_INTERNAL) wrong("an internal error");
    if (std::strlen(sp_last_error()) == 0) wrong("no reason given");
}

}  // namespace

// Four bytes with the length of the fix, the fix, and the only shard of a checkpoint.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 4) return 0;
    uint32_t first = 0;
    std::memcpy(&first, data, 4);
    const size_t cut = 4 + std::min<size_t>(first, size - 4);
    Bytes fix_file(data + 4, data + cut), shard(data + cut, data + size);
    const Bytes before = shard;
    sp_io fix_io = io_of(fix_file), shard_io = io_of(shard);
    sp_fix* fix = nullptr;
    if (const sp_status status = sp_fix_open(&fix_io, &fix); status != SP_OK) {
        refused(status);
        return 0;
    }
    sp_fix_sides sides{sizeof sides, 0, 0};
    for (const int32_t resume : {0, 1}) {
        shard = before;
        const sp_status status = sp_fix_apply(fix, &shard_io, 1, resume, &sides);
        if (status != SP_OK) {
            refused(status);
            if (shard != before) wrong("a refused fix has changed the shard");
            continue;
        }
        if (sp_fix_revert(fix, &shard_io, 1, 0, &sides) != SP_OK) wrong("what was applied can't be taken out");
        if (sides.new_count == 0 || sides.old_count != 0) wrong("an applied fix is not there");
        if (resume == 0 && shard != before) wrong("a fix that was taken out has left something");
    }
    sp_fix_close(fix);
    return 0;
}
