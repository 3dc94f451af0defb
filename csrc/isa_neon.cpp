// The passes for AArch64, every one of which has NEON: no region, and nothing to ask at run time.
#include "passes.h"

#if SP_NEON

#include <arm_neon.h>

namespace safepatch {
namespace neon {

#define SP_LANES 4
#include "simd.h"

#include "passes.inl"

#include "codes.inl"

}  // namespace neon

const Isa neon_isa{"neon", neon::visit, neon::patch_up, neon::recode, neon::count};

}  // namespace safepatch

#endif
