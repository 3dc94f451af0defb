// The vector operations that passes.inl is written in. Every isa_*.cpp includes this once, inside its own
// namespace and target region, with SP_LANES set: 16 (AVX-512), 8 (AVX2), 4 (NEON) or 1 (plain C++). Hence no
// include guard.
//
//   F, U   SP_LANES float32 or uint32 lanes; comparisons of U are signed, which keys (31 bits) allow
//   M      a mask of SP_LANES lanes;  `bits` and `mask` turn it into the low bits of an integer and back
//   Q      SP_LANES / 2 uint64 lanes (at least one), for random numbers
//
// Arithmetic is one IEEE operation each; -ffp-contract=off keeps the compiler from fusing two of them.
//
// Random numbers come as four words per counter, entries 4k to 4k + 3 being a, b, c, d of counter k. Multiplications
// of 32 bits by 32 need lanes of 64 bits, so each word of several counters is a Q, in the low halves of its lanes.
// `below` makes entries in a row of them. With AVX2 (64-bit lanes, left is low; a0 is word a of counter 0):
//
//   a, b, c, d      a0    a2    a1    a3     ...     the order of `counters`
//   ab              a0 b0 a2 b2 | a1 b1 a3 b3        b's low halves moved up, blended into a's high ones
//   cd              c0 d0 c2 d2 | c1 d1 c3 d3
//   unpacklo(64)    a0 b0 c0 d0 | a1 b1 c1 d1        entries 0 to 7
//   unpackhi(64)    a2 b2 c2 d2 | a3 b3 c3 d3        entries 8 to 15
//
// Unpacking stays within 128 bits, which hold two counters: the first of each go to the front, the second behind.
// Hence the order 0, 2, 1, 3, and with AVX-512 0, 4, 1, 5, 2, 6, 3, 7.

#define SP_OP static inline __attribute__((always_inline))

#if SP_LANES == 16

using F = __m512;
using U = __m512i;
using M = __mmask16;
using Q = __m512i;

SP_OP F load_f(const void* p) { return _mm512_loadu_ps(p); }
SP_OP void store_f(void* p, F a) { _mm512_storeu_ps(p, a); }
SP_OP F set_f(float a) { return _mm512_set1_ps(a); }
SP_OP F add(F a, F b) { return _mm512_add_ps(a, b); }
SP_OP F sub(F a, F b) { return _mm512_sub_ps(a, b); }
SP_OP F mul(F a, F b) { return _mm512_mul_ps(a, b); }
SP_OP F div(F a, F b) { return _mm512_div_ps(a, b); }
SP_OP M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
SP_OP F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
SP_OP U as_u(F a) { return _mm512_castps_si512(a); }

SP_OP U load_u(const void* p) { return _mm512_loadu_si512(p); }
SP_OP void store_u(void* p, U a) { _mm512_storeu_si512(p, a); }
SP_OP U set_u(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
SP_OP U and_u(U a, U b) { return _mm512_and_si512(a, b); }
SP_OP U sub_u(U a, U b) { return _mm512_sub_epi32(a, b); }
SP_OP U shift_right(U a, uint32_t by) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(static_cast<int>(by))); }
SP_OP U max_u(U a, U b) { return _mm512_max_epi32(a, b); }
SP_OP U min_u(U a, U b) { return _mm512_min_epi32(a, b); }
SP_OP M less(U a, U b) { return _mm512_cmplt_epi32_mask(a, b); }
SP_OP M equal(U a, U b) { return _mm512_cmpeq_epi32_mask(a, b); }
SP_OP U select(M m, U yes, U no) { return _mm512_mask_blend_epi32(m, no, yes); }
SP_OP U count_up(U counts, M where) { return _mm512_mask_sub_epi32(counts, where, counts, set_u(~0U)); }

// Not by conversion: GCC 12 may spill a mask as 2 bytes and load it back as 8.
SP_OP uint32_t bits(M m) {
    uint32_t b;
    asm("kmovw %1, %0" : "=r"(b) : "k"(m));
    return b;
}
SP_OP M mask(uint32_t b) { return _cvtu32_mask16(b); }

// Move the marked lanes to the front; `p` may be written as far as a whole vector.
SP_OP uint32_t compress(void* p, U a, uint32_t marked) {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(mask(marked), a));
    return static_cast<uint32_t>(_mm_popcnt_u32(marked));
}

SP_OP F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(mask((1U << n) - 1), p); }
SP_OP void store_part(float* p, F a, int n) { _mm512_mask_storeu_ps(p, mask((1U << n) - 1), a); }

SP_OP U load_u16(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
SP_OP void store_u16(void* p, U a) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a)); }
SP_OP F from_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
SP_OP U to_f16(F a) {
    return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SP_OP F from_bf16(U a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
SP_OP U to_bf16(F a) {
    const U u = as_u(a);
    const U odd = and_u(_mm512_srli_epi32(u, 16), set_u(1));
    return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, set_u(0x7fff)), odd), 16);
}

constexpr int kLanesQ = 8;
SP_OP Q load_q(const void* p) { return _mm512_loadu_si512(p); }
SP_OP void store_q(void* p, Q a) { _mm512_storeu_si512(p, a); }
SP_OP Q set_q(uint64_t a) { return _mm512_set1_epi64(static_cast<long long>(a)); }
SP_OP Q add_q(Q a, Q b) { return _mm512_add_epi64(a, b); }
SP_OP Q mul_q(Q a, Q b) { return _mm512_mul_epu32(a, b); }  // of the low halves
SP_OP Q high(Q a) { return _mm512_srli_epi64(a, 32); }
SP_OP Q xor_q(Q a, Q b) { return _mm512_xor_si512(a, b); }
SP_OP Q xor_q(Q a, Q b, Q c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
SP_OP Q counters() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
// Which of the four words of each counter (low halves) are smaller than `limit`, as bits in order of entries.
SP_OP uint64_t below(Q a, Q b, Q c, Q d, uint32_t limit) {
    const U ab = _mm512_mask_shuffle_epi32(a, 0xaaaa, b, _MM_PERM_CDAB);
    const U cd = _mm512_mask_shuffle_epi32(c, 0xaaaa, d, _MM_PERM_CDAB);
    const U low = _mm512_unpacklo_epi64(ab, cd), up = _mm512_unpackhi_epi64(ab, cd);
    return bits(_mm512_cmplt_epu32_mask(low, set_u(limit))) |
           static_cast<uint64_t>(bits(_mm512_cmplt_epu32_mask(up, set_u(limit)))) << 16;
}

SP_OP int count_bits(uint64_t a) { return static_cast<int>(_mm_popcnt_u64(a)); }
SP_OP int lowest_bit(uint64_t a) { return static_cast<int>(_tzcnt_u64(a)); }

#elif SP_LANES == 8

using F = __m256;
using U = __m256i;
using Q = __m256i;
struct M {
    __m256i lanes;
};
SP_OP M operator&(M a, M b) { return {_mm256_and_si256(a.lanes, b.lanes)}; }
SP_OP M operator|(M a, M b) { return {_mm256_or_si256(a.lanes, b.lanes)}; }

SP_OP F load_f(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
SP_OP void store_f(void* p, F a) { _mm256_storeu_ps(static_cast<float*>(p), a); }
SP_OP F set_f(float a) { return _mm256_set1_ps(a); }
SP_OP F add(F a, F b) { return _mm256_add_ps(a, b); }
SP_OP F sub(F a, F b) { return _mm256_sub_ps(a, b); }
SP_OP F mul(F a, F b) { return _mm256_mul_ps(a, b); }
SP_OP F div(F a, F b) { return _mm256_div_ps(a, b); }
SP_OP M less(F a, F b) { return {_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ))}; }
SP_OP F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m.lanes)); }
SP_OP U as_u(F a) { return _mm256_castps_si256(a); }

SP_OP U load_u(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
SP_OP void store_u(void* p, U a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
SP_OP U set_u(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
SP_OP U and_u(U a, U b) { return _mm256_and_si256(a, b); }
SP_OP U sub_u(U a, U b) { return _mm256_sub_epi32(a, b); }
SP_OP U shift_right(U a, uint32_t by) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(static_cast<int>(by))); }
SP_OP U max_u(U a, U b) { return _mm256_max_epi32(a, b); }
SP_OP U min_u(U a, U b) { return _mm256_min_epi32(a, b); }
SP_OP M less(U a, U b) { return {_mm256_cmpgt_epi32(b, a)}; }
SP_OP M equal(U a, U b) { return {_mm256_cmpeq_epi32(a, b)}; }
SP_OP U select(M m, U yes, U no) { return _mm256_blendv_epi8(no, yes, m.lanes); }
SP_OP U count_up(U counts, M where) { return sub_u(counts, where.lanes); }

SP_OP uint32_t bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m.lanes))); }
SP_OP M mask(uint32_t b) {
    const U lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return {_mm256_cmpeq_epi32(_mm256_and_si256(set_u(b), lane), lane)};
}

// Lane numbers of the set bits of `marked`, packed to the front, a byte each.
SP_OP uint64_t marked_lanes(uint32_t marked) {
    const uint64_t bytes = _pdep_u64(marked, 0x0101010101010101) * 0xff;
    return _pext_u64(0x0706050403020100, bytes);
}
SP_OP uint32_t compress(void* p, U a, uint32_t marked) {
    const U from = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(marked_lanes(marked))));
    store_u(p, _mm256_permutevar8x32_epi32(a, from));
    return static_cast<uint32_t>(_mm_popcnt_u32(marked));
}

SP_OP F load_part(const float* p, int n) { return _mm256_maskload_ps(p, mask((1U << n) - 1).lanes); }
SP_OP void store_part(float* p, F a, int n) { _mm256_maskstore_ps(p, mask((1U << n) - 1).lanes, a); }

SP_OP U load_u16(const void* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
SP_OP void store_u16(void* p, U a) {
    const U packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, a), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
SP_OP F from_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
SP_OP U to_f16(F a) { return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
SP_OP F from_bf16(U a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
SP_OP U to_bf16(F a) {
    const U u = as_u(a);
    const U odd = and_u(_mm256_srli_epi32(u, 16), set_u(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, set_u(0x7fff)), odd), 16);
}

constexpr int kLanesQ = 4;
SP_OP Q load_q(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
SP_OP void store_q(void* p, Q a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
SP_OP Q set_q(uint64_t a) { return _mm256_set1_epi64x(static_cast<long long>(a)); }
SP_OP Q add_q(Q a, Q b) { return _mm256_add_epi64(a, b); }
SP_OP Q mul_q(Q a, Q b) { return _mm256_mul_epu32(a, b); }
SP_OP Q high(Q a) { return _mm256_srli_epi64(a, 32); }
SP_OP Q xor_q(Q a, Q b) { return _mm256_xor_si256(a, b); }
SP_OP Q xor_q(Q a, Q b, Q c) { return xor_q(xor_q(a, b), c); }
SP_OP Q counters() { return _mm256_setr_epi64x(0, 2, 1, 3); }
SP_OP uint64_t below(Q a, Q b, Q c, Q d, uint32_t limit) {
    const U ab = _mm256_blend_epi32(a, _mm256_shuffle_epi32(b, 0xb1), 0xaa);
    const U cd = _mm256_blend_epi32(c, _mm256_shuffle_epi32(d, 0xb1), 0xaa);
    const U sign = set_u(0x80000000), top = set_u(limit ^ 0x80000000);  // AVX2 compares signed only
    const U low = xor_q(_mm256_unpacklo_epi64(ab, cd), sign), up = xor_q(_mm256_unpackhi_epi64(ab, cd), sign);
    return bits(less(low, top)) | static_cast<uint64_t>(bits(less(up, top))) << 8;
}

SP_OP int count_bits(uint64_t a) { return static_cast<int>(_mm_popcnt_u64(a)); }
SP_OP int lowest_bit(uint64_t a) { return static_cast<int>(_tzcnt_u64(a)); }

#elif SP_LANES == 4

using F = float32x4_t;
using U = uint32x4_t;
using Q = uint64x2_t;
struct M {
    uint32x4_t lanes;
};
SP_OP M operator&(M a, M b) { return {vandq_u32(a.lanes, b.lanes)}; }
SP_OP M operator|(M a, M b) { return {vorrq_u32(a.lanes, b.lanes)}; }

SP_OP F load_f(const void* p) { return vreinterpretq_f32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
SP_OP void store_f(void* p, F a) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_f32(a)); }
SP_OP F set_f(float a) { return vdupq_n_f32(a); }
SP_OP F add(F a, F b) { return vaddq_f32(a, b); }
SP_OP F sub(F a, F b) { return vsubq_f32(a, b); }
SP_OP F mul(F a, F b) { return vmulq_f32(a, b); }
SP_OP F div(F a, F b) { return vdivq_f32(a, b); }
SP_OP M less(F a, F b) { return {vcltq_f32(a, b)}; }
SP_OP F select(M m, F yes, F no) { return vbslq_f32(m.lanes, yes, no); }
SP_OP U as_u(F a) { return vreinterpretq_u32_f32(a); }

SP_OP U load_u(const void* p) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
SP_OP void store_u(void* p, U a) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_u32(a)); }
SP_OP U set_u(uint32_t a) { return vdupq_n_u32(a); }
SP_OP U and_u(U a, U b) { return vandq_u32(a, b); }
SP_OP U sub_u(U a, U b) { return vsubq_u32(a, b); }
SP_OP U shift_right(U a, uint32_t by) { return vshlq_u32(a, vdupq_n_s32(-static_cast<int32_t>(by))); }
SP_OP int32x4_t as_s(U a) { return vreinterpretq_s32_u32(a); }
SP_OP U max_u(U a, U b) { return vreinterpretq_u32_s32(vmaxq_s32(as_s(a), as_s(b))); }
SP_OP U min_u(U a, U b) { return vreinterpretq_u32_s32(vminq_s32(as_s(a), as_s(b))); }
SP_OP M less(U a, U b) { return {vcltq_s32(as_s(a), as_s(b))}; }
SP_OP M equal(U a, U b) { return {vceqq_u32(a, b)}; }
SP_OP U select(M m, U yes, U no) { return vbslq_u32(m.lanes, yes, no); }
SP_OP U count_up(U counts, M where) { return vsubq_u32(counts, where.lanes); }

SP_OP U lane_bits() { return uint32x4_t{1, 2, 4, 8}; }
SP_OP uint32_t bits(M m) { return vaddvq_u32(vandq_u32(m.lanes, lane_bits())); }
SP_OP M mask(uint32_t b) { return {vtstq_u32(vdupq_n_u32(b), lane_bits())}; }

SP_OP uint32_t compress(void* p, U a, uint32_t marked) {
    uint32_t lanes[4], n = 0;
    store_u(lanes, a);
    // Without a branch, which would be mispredicted; what is not marked is written over by the next.
    for (int i = 0; i < 4; ++i) {
        __builtin_memcpy(static_cast<char*>(p) + 4 * n, lanes + i, 4);
        n += marked >> i & 1;
    }
    return n;
}

SP_OP F load_part(const float* p, int n) {
    float lanes[4] = {};
    __builtin_memcpy(lanes, p, sizeof(float) * static_cast<size_t>(n));
    return load_f(lanes);
}
SP_OP void store_part(float* p, F a, int n) {
    float lanes[4];
    store_f(lanes, a);
    __builtin_memcpy(p, lanes, sizeof(float) * static_cast<size_t>(n));
}

SP_OP uint16x4_t half_of(const void* p) { return vreinterpret_u16_u8(vld1_u8(static_cast<const uint8_t*>(p))); }
SP_OP U load_u16(const void* p) { return vmovl_u16(half_of(p)); }
SP_OP void store_u16(void* p, U a) { vst1_u8(static_cast<uint8_t*>(p), vreinterpret_u8_u16(vmovn_u32(a))); }
// Conversions of the hardware are IEEE's with FPCR at 0, which PlainFloat sets.
SP_OP F from_f16(const void* p) { return vcvt_f32_f16(vreinterpret_f16_u16(half_of(p))); }
SP_OP U to_f16(F a) { return vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32(a))); }
SP_OP F from_bf16(U a) { return vreinterpretq_f32_u32(vshlq_n_u32(a, 16)); }
SP_OP U to_bf16(F a) {
    const U u = as_u(a);
    const U odd = and_u(vshrq_n_u32(u, 16), set_u(1));
    return vshrq_n_u32(vaddq_u32(vaddq_u32(u, set_u(0x7fff)), odd), 16);
}

constexpr int kLanesQ = 2;
SP_OP Q load_q(const void* p) { return vld1q_u64(static_cast<const uint64_t*>(p)); }
SP_OP void store_q(void* p, Q a) { vst1q_u64(static_cast<uint64_t*>(p), a); }
SP_OP Q set_q(uint64_t a) { return vdupq_n_u64(a); }
SP_OP Q add_q(Q a, Q b) { return vaddq_u64(a, b); }
SP_OP Q mul_q(Q a, Q b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
SP_OP Q high(Q a) { return vshrq_n_u64(a, 32); }
SP_OP Q xor_q(Q a, Q b) { return veorq_u64(a, b); }
SP_OP Q xor_q(Q a, Q b, Q c) { return xor_q(xor_q(a, b), c); }
SP_OP Q counters() { return uint64x2_t{0, 1}; }
SP_OP uint64_t below(Q a, Q b, Q c, Q d, uint32_t limit) {
    // Low halves: a0 b0 a1 b1 and c0 d0 c1 d1, then by counter.
    const uint32x4_t ab = vtrn1q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b));
    const uint32x4_t cd = vtrn1q_u32(vreinterpretq_u32_u64(c), vreinterpretq_u32_u64(d));
    const Q low = vzip1q_u64(vreinterpretq_u64_u32(ab), vreinterpretq_u64_u32(cd));
    const Q up = vzip2q_u64(vreinterpretq_u64_u32(ab), vreinterpretq_u64_u32(cd));
    const uint32x4_t top = vdupq_n_u32(limit);
    return bits({vcltq_u32(vreinterpretq_u32_u64(low), top)}) |
           static_cast<uint64_t>(bits({vcltq_u32(vreinterpretq_u32_u64(up), top)})) << 4;
}

SP_OP int count_bits(uint64_t a) { return __builtin_popcountll(a); }
SP_OP int lowest_bit(uint64_t a) { return a != 0 ? __builtin_ctzll(a) : 64; }

#else

using F = float;
using M = bool;
using Q = uint64_t;
struct U {
    uint32_t lane;
};

template <class T>
SP_OP T load_as(const void* p) {
    T a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
}
template <class T>
SP_OP void store_as(void* p, T a) {
    __builtin_memcpy(p, &a, sizeof a);
}

SP_OP F load_f(const void* p) { return load_as<float>(p); }
SP_OP void store_f(void* p, F a) { store_as(p, a); }
SP_OP F set_f(float a) { return a; }
SP_OP F add(F a, F b) { return a + b; }
SP_OP F sub(F a, F b) { return a - b; }
SP_OP F mul(F a, F b) { return a * b; }
SP_OP F div(F a, F b) { return a / b; }
SP_OP M less(F a, F b) { return a < b; }
SP_OP F select(M m, F yes, F no) { return m ? yes : no; }
SP_OP U as_u(F a) { return {load_as<uint32_t>(&a)}; }
SP_OP F as_f(uint32_t a) { return load_as<float>(&a); }

SP_OP U load_u(const void* p) { return {load_as<uint32_t>(p)}; }
SP_OP void store_u(void* p, U a) { store_as(p, a.lane); }
SP_OP U set_u(uint32_t a) { return {a}; }
SP_OP U and_u(U a, U b) { return {a.lane & b.lane}; }
SP_OP U sub_u(U a, U b) { return {a.lane - b.lane}; }
SP_OP U shift_right(U a, uint32_t by) { return {a.lane >> by}; }
SP_OP M less(U a, U b) { return static_cast<int32_t>(a.lane) < static_cast<int32_t>(b.lane); }
SP_OP M equal(U a, U b) { return a.lane == b.lane; }
SP_OP U max_u(U a, U b) { return less(a, b) ? b : a; }
SP_OP U min_u(U a, U b) { return less(a, b) ? a : b; }
SP_OP U select(M m, U yes, U no) { return m ? yes : no; }
SP_OP U count_up(U counts, M where) { return {counts.lane + (where ? 1 : 0)}; }

SP_OP uint32_t bits(M m) { return m; }
SP_OP M mask(uint32_t b) { return (b & 1) != 0; }

SP_OP uint32_t compress(void* p, U a, uint32_t marked) {
    store_u(p, a);
    return marked;
}

SP_OP F load_part(const float* p, int) { return *p; }
SP_OP void store_part(float* p, F a, int) { *p = a; }

SP_OP U load_u16(const void* p) { return {load_as<uint16_t>(p)}; }
SP_OP void store_u16(void* p, U a) { store_as(p, static_cast<uint16_t>(a.lane)); }

SP_OP F from_f16(const void* p) {
    const uint32_t h = load_u16(p).lane;
    const uint32_t sign = (h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (exponent == 31) return as_f(sign | kInfinity | fraction << 13);
    if (exponent != 0) return as_f(sign | (exponent + 112) << 23 | fraction << 13);
    const float tiny = static_cast<float>(fraction) * 0x1p-24F;
    return sign ? -tiny : tiny;
}
SP_OP U to_f16(F a) {
    const uint32_t u = as_u(a).lane, sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude >= 0x47800000) {  // 65536 and up, infinity, NaN
        return {sign | 0x7c00 | (magnitude > kInfinity ? 0x200 | (magnitude >> 13 & 0x3ff) : 0)};
    }
    if (magnitude < 0x38800000) {  // below 2^-14: the sum's last place is 2^-24, so the adder does the rounding
        return {sign | (as_u(as_f(magnitude) + 0.5F).lane - 0x3f000000)};
    }
    const uint32_t odd = magnitude >> 13 & 1;
    return {sign | (magnitude - (112U << 23) + 0xfff + odd) >> 13};
}
SP_OP F from_bf16(U a) { return as_f(a.lane << 16); }
SP_OP U to_bf16(F a) {
    const uint32_t u = as_u(a).lane;
    return {(u + 0x7fff + (u >> 16 & 1)) >> 16};
}

constexpr int kLanesQ = 1;
SP_OP Q load_q(const void* p) { return *static_cast<const uint64_t*>(p); }
SP_OP void store_q(void* p, Q a) { *static_cast<uint64_t*>(p) = a; }
SP_OP Q set_q(uint64_t a) { return a; }
SP_OP Q add_q(Q a, Q b) { return a + b; }
SP_OP Q mul_q(Q a, Q b) { return (a & 0xffffffff) * (b & 0xffffffff); }
SP_OP Q high(Q a) { return a >> 32; }
SP_OP Q xor_q(Q a, Q b) { return a ^ b; }
SP_OP Q xor_q(Q a, Q b, Q c) { return a ^ b ^ c; }
SP_OP Q counters() { return 0; }
SP_OP uint64_t below(Q a, Q b, Q c, Q d, uint32_t limit) {
    const auto is = [limit](Q word) -> uint64_t { return static_cast<uint32_t>(word) < limit; };
    return is(a) | is(b) << 1 | is(c) << 2 | is(d) << 3;
}

SP_OP int count_bits(uint64_t a) { return __builtin_popcountll(a); }
SP_OP int lowest_bit(uint64_t a) { return a != 0 ? __builtin_ctzll(a) : 64; }

#endif
