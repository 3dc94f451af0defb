// The fix file's codec, at the level of buffers: see "The fix file" in safepatch.h.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "safepatch.h"

namespace safepatch {

// A run breaks a rule of the encoding.
struct Broken : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Arguments have been checked by the C interface; what lies in a run's arrays has not.
int64_t find_changes(int32_t width, const void* old_entries, const void* new_entries, int64_t entries, int64_t start,
                     const sp_fix_changes& out);
int64_t encode_gaps(const uint16_t* at, const int64_t* counts, size_t blocks, int32_t gap_width, void* codes,
                    int64_t* lengths);
void settle(const sp_fix_run& run, void* entries, int32_t goal, void* old_entries, void* new_entries,
            sp_fix_tally& tally);

}  // namespace safepatch
