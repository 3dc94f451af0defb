// The passes for AVX-512. Nothing but the region below is compiled for it: what a header instantiates here
// may be shared with code that runs on any machine.
#include "passes.h"

#if SP_X86

#include <immintrin.h>

// GCC 12 warns of the undefined vectors in its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,bmi,bmi2,lzcnt,popcnt")

namespace safepatch {
namespace avx512 {

#define SP_LANES 16
#include "simd.h"

#include "passes.inl"

#include "codes.inl"

}  // namespace avx512
}  // namespace safepatch

#pragma GCC pop_options

const safepatch::Isa safepatch::avx512_isa{"avx512", safepatch::avx512::visit, safepatch::avx512::patch_up,
                                           safepatch::avx512::recode, safepatch::avx512::count};

#endif
