// Half-precision conversions on single elements, in integers: the same bits everywhere. No library templates
// (kernels.h).
#ifndef COMMHOOKS_CPU_HALF_H
#define COMMHOOKS_CPU_HALF_H

#include <stdint.h>
#include <string.h>

namespace commhooks {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float bf16_to_float(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

inline float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude << 13));
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: magnitude * 2^-24, exact in float32.
  const float value = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of(sign | bits_of(value));
}

// Round to nearest even; beyond the finite range: the largest finite number. NaN stays NaN.
[[maybe_unused]] inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 31 << 15);
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7fc0u);
  if (magnitude > 0x7f7f0000u) return static_cast<uint16_t>(sign | 0x7f7fu);
  const uint32_t rounded = magnitude + 0x7fffu + ((magnitude >> 16) & 1u);
  return static_cast<uint16_t>(sign | (rounded >> 16));
}

[[maybe_unused]] inline uint16_t float_to_f16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 31 << 15);
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude > 0x477fe000u) return static_cast<uint16_t>(sign | 0x7bffu);  // above 65504
  if (magnitude >= 0x38800000u) {
    const uint32_t rebased = magnitude - 0x38000000u;
    const uint32_t rounded = rebased + 0xfffu + ((rebased >> 13) & 1u);
    return static_cast<uint16_t>(sign | (rounded >> 13));
  }
  // Subnormal result: adding 0.5 aligns the last bit of the sum with 2^-24, and the addition rounds to even.
  const float shifted = float_of(magnitude) + 0.5f;
  return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
}

}  // namespace
}  // namespace commhooks
#endif
