// A caller's block on our side: of this version's size, and checked, so that no call can lead out of its buffers.
#pragma once

#include <vector>

#include "safepatch.h"

namespace safepatch {

struct OwnBlock : sp_block {
    std::vector<sp_patch> held;    // what `patches` points to
    std::vector<sp_codes> stored;  // and `codes`: one or none

    // Without `inputs`, what patches say isn't read and may be missing. Throws std::invalid_argument.
    explicit OwnBlock(const sp_block* from, bool inputs = true);
    OwnBlock(const OwnBlock&) = delete;
    OwnBlock(OwnBlock&&) = default;

    // Its entries [lo, hi).
    OwnBlock part(int64_t lo, int64_t hi) const;

  private:
    OwnBlock(const sp_block& block, std::vector<sp_patch> patches, std::vector<sp_codes> codes);
};

}  // namespace safepatch
