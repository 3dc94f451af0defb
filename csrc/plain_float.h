// The contract is plain IEEE arithmetic, whatever flush or rounding mode the host program has set.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace safepatch {

#if defined(__x86_64__)
inline unsigned float_mode() { return _mm_getcsr(); }
inline void set_float_mode(unsigned mode) { _mm_setcsr(mode); }
inline constexpr unsigned kPlainMode = 0x1f80;
#elif defined(__aarch64__)
inline uint64_t float_mode() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
inline void set_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode)); }
inline constexpr uint64_t kPlainMode = 0;
#else
inline int float_mode() { return 0; }
inline void set_float_mode(int) {}
inline constexpr int kPlainMode = 0;
#endif

// Plain arithmetic on this thread until the end of the scope.
class PlainFloat {
  public:
    PlainFloat() : saved_(float_mode()) { set_float_mode(kPlainMode); }
    ~PlainFloat() { set_float_mode(saved_); }
    PlainFloat(const PlainFloat&) = delete;
    PlainFloat& operator=(const PlainFloat&) = delete;

  private:
    decltype(float_mode()) saved_;
};

}  // namespace safepatch
