// The passes in plain C++, for any machine.
#include "passes.h"

namespace safepatch {
namespace scalar {

#define SP_LANES 1
#include "simd.h"

#include "passes.inl"

#include "codes.inl"

}  // namespace scalar

const Isa scalar_isa{"scalar", scalar::visit, scalar::patch_up, scalar::recode, scalar::count};

}  // namespace safepatch
