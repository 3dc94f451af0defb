// The numbers that a recipe's settings come down to. What they mean is in safepatch_core/SPEC.md.
#include <cmath>
#include <cstring>
#include <string_view>

#include "blake2b.h"
#include "guard.h"
#include "plain_float.h"

namespace safepatch {
namespace {

std::string_view with_end(const char* text) { return {text, std::strlen(text) + 1}; }

uint64_t random_key(uint64_t seed, const char* patch, const char* tensor) {
    char number[8];
    for (int i = 0; i < 8; ++i) number[i] = static_cast<char>(seed >> (8 * i));
    Blake2b hash(8);
    hash.add(with_end("safepatch"));
    hash.add({number, sizeof number});
    hash.add(with_end(patch));
    hash.add(tensor);
    return hash.word();
}

int64_t half_to_even(double value) {
    const double floor = std::floor(value), rest = value - floor;
    const auto whole = static_cast<int64_t>(floor);
    return whole + (rest > 0.5 || (rest == 0.5 && whole % 2 != 0) ? 1 : 0);
}

}  // namespace
}  // namespace safepatch

using safepatch::guarded;
using safepatch::need;

sp_status sp_random_key(uint64_t seed, const char* patch, const char* tensor, uint64_t* random_key) {
    return guarded([&] {
        need(patch != nullptr && tensor != nullptr && random_key != nullptr, "null name or output");
        *random_key = safepatch::random_key(seed, patch, tensor);
    });
}

sp_status sp_keep(double retain, uint64_t* keep) {
    return guarded([&] {
        const safepatch::PlainFloat plain;
        need(keep != nullptr, "null output");
        need(retain >= 0, "retain: expected 0 and more");
        *keep = retain >= 1 ? SP_KEEP_ALL : static_cast<uint64_t>(retain * 4294967296.0);
    });
}

sp_status sp_quota(double top, int64_t entries, int64_t* quota) {
    return guarded([&] {
        const safepatch::PlainFloat plain;
        need(quota != nullptr, "null output");
        need(top >= 0 && top <= 1, "top: expected 0 to 1");
        need(entries >= 0, "entries: expected 0 and more");
        const double product = top * static_cast<double>(entries);
        // 2^63 itself is what the largest counts round to.
        *quota = product >= 9223372036854775808.0 ? INT64_MAX : safepatch::half_to_even(product);
    });
}
