// Asks the processor itself. __builtin_cpu_supports asks the compiler's runtime library, and not every runtime knows:
// the one of `zig c++`, which links wheels for old C libraries, says no to everything.
#include <cpuid.h>
#include <stdint.h>

#include "simd/processor.h"

namespace commhooks {
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;  // all zero when the processor does not know the leaf
};

Registers leaf(unsigned number) {
  Registers r;
  __get_cpuid_count(number, 0, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// True when the operating system saves all register sets of the mask, in bits of XCR0 (Intel's manual, volume 1, 13.1).
bool saved(uint64_t mask) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((uint64_t{high} << 32 | low) & mask) == mask;
}

constexpr bool all(unsigned value, unsigned bits) { return (value & bits) == bits; }

constexpr uint64_t kSavedYmm = 0x6;                // xmm and the upper halves of ymm
constexpr uint64_t kSavedZmm = kSavedYmm | 0xe0;   // masks, the upper halves of zmm0 to 15, zmm16 to 31

}  // namespace

bool processor_has_avx2() {
  return all(leaf(1).c, bit_OSXSAVE | bit_AVX | bit_F16C | bit_POPCNT) && saved(kSavedYmm) &&
         all(leaf(7).b, bit_AVX2 | bit_BMI | bit_BMI2);
}

bool processor_has_avx512() {
  return processor_has_avx2() && saved(kSavedZmm) &&
         all(leaf(7).b, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL);
}

}  // namespace commhooks
