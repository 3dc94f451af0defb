#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>

namespace safepatch {
namespace {

struct Entry {
    const char* name;
    const Isa* isa;  // null where the build's target can't have it
    bool (*here)();
};

#if SP_X86
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first.
const Entry table[] = {
#if SP_X86
    {"avx512", &avx512_isa, has_avx512},
    {"avx2", &avx2_isa, has_avx2},
#else
    {"avx512", nullptr, nullptr},
    {"avx2", nullptr, nullptr},
#endif
#if SP_NEON
    {"neon", &neon_isa, [] { return true; }},
#else
    {"neon", nullptr, nullptr},
#endif
    {"scalar", &scalar_isa, [] { return true; }},
};

bool runs(const Entry& entry) { return entry.isa != nullptr && entry.here(); }

}  // namespace

const Isa& choose_isa(const char* name) {
    const char* wanted = name != nullptr ? name : std::getenv("SAFEPATCH_FORCE_ISA");
    const bool any = wanted == nullptr || *wanted == '\0';
    const std::string who = name != nullptr ? "instruction set" : "SAFEPATCH_FORCE_ISA";
    for (const Entry& entry : table) {
        if (any && runs(entry)) return *entry.isa;
        if (any || std::strcmp(entry.name, wanted) != 0) continue;
        if (runs(entry)) return *entry.isa;
        throw Unsupported(who + ": this machine has no " + wanted);
    }
    throw std::invalid_argument(who + ": found '" + wanted + "', expected avx512, avx2, neon or scalar");
}

bool usable(const char* name) {
    for (const Entry& entry : table) {
        if (std::strcmp(entry.name, name) == 0) return runs(entry);
    }
    return false;
}

}  // namespace safepatch
