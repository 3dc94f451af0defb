// The passes for AVX2. Nothing but the region below is compiled for it: what a header instantiates here may
// be shared with code that runs on any machine.
#include "passes.h"

#if SP_X86

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,f16c,bmi,bmi2,lzcnt,popcnt")

namespace safepatch {
namespace avx2 {

#define SP_LANES 8
#include "simd.h"

#include "passes.inl"

#include "codes.inl"

}  // namespace avx2
}  // namespace safepatch

#pragma GCC pop_options

const safepatch::Isa safepatch::avx2_isa{"avx2", safepatch::avx2::visit, safepatch::avx2::patch_up,
                                         safepatch::avx2::recode, safepatch::avx2::count};

#endif
