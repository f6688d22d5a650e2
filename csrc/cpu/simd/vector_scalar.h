// One lane: the vector type of the scalar kernels and of the ends of every range. No library templates
// (kernels.h).
#ifndef COMMHOOKS_CPU_VECTOR_SCALAR_H
#define COMMHOOKS_CPU_VECTOR_SCALAR_H

#include "simd/bytes.h"
#include "simd/half.h"

namespace commhooks {
namespace {

inline int64_t popcount(uint32_t lanes) { return __builtin_popcount(lanes); }

struct ScalarVector {
  static constexpr int kLanes = 1;
  using Float = float;

  static Float load(const float *p) { return *p; }
  static Float load_bf16(const uint16_t *p) { return bf16_to_float(*p); }
  static Float load_f16(const uint16_t *p) { return f16_to_float(*p); }
  static void store(float *p, Float x) { *p = x; }
  // A streaming store where the instruction set has one; `p` is aligned to a vector.
  static void stream(float *p, Float x) { *p = x; }
  static Float broadcast(float x) { return x; }
  static Float add(Float a, Float b) { return a + b; }
  static Float mul(Float a, Float b) { return a * b; }
  // For low-bit messages. Which lanes: a type of the vector's own.
  using Mask = uint32_t;  // all bits or none: a branch on data costs more
  static Float sub(Float a, Float b) { return a - b; }
  static Float magnitude(Float x) { return float_of(bits_of(x) & 0x7fffffffu); }
  // No NaN comes here.
  static Float clamp(Float x, Float low, Float high) {
    const Float least = x > low ? x : low;
    return least < high ? least : high;
  }
  // The larger of two magnitudes as integers: NaN is above infinity.
  static Float larger_key(Float a, Float b) {
    const int32_t key_a = static_cast<int32_t>(bits_of(a));
    const int32_t key_b = static_cast<int32_t>(bits_of(b));
    return float_of(static_cast<uint32_t>(key_a > key_b ? key_a : key_b));
  }
  static Mask at_least(Float a, Float b) { return a >= b ? ~0u : 0u; }
  static Float choose(Mask mask, Float a, Float b) { return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask)); }
  // The lowest byte of the bits of each of 16 elements, which 16 / kLanes vectors hold.
  static Bytes16 low_bytes(const Float *x) {
    Bytes16 bytes{0, 0};
    for (int j = 0; j < 8; ++j) {
      bytes.low |= static_cast<uint64_t>(bits_of(x[j]) & 0xffu) << (8 * j);
      bytes.high |= static_cast<uint64_t>(bits_of(x[8 + j]) & 0xffu) << (8 * j);
    }
    return bytes;
  }
  // 16 elements: the bytes as numbers.
  static void from_bytes(Bytes16 bytes, Float *x) {
    for (int j = 0; j < 8; ++j) {
      x[j] = static_cast<float>(static_cast<int32_t>(bytes.low >> (8 * j) & 0xffu));
      x[8 + j] = static_cast<float>(static_cast<int32_t>(bytes.high >> (8 * j) & 0xffu));
    }
  }
  // Bit per lane: whether the key (magnitude bits) is above `key`.
  static uint32_t above(Float x, uint32_t key) { return (bits_of(x) & 0x7fffffffu) > key ? 1u : 0u; }
  static Float clear(Float x, uint32_t lanes) { return lanes != 0 ? 0.0f : x; }
  // Stores the chosen lanes densely; whole vectors may be written.
  static void compress(float *p, Float x, uint32_t lanes) {
    if (lanes != 0) *p = x;
  }
  static void compress_indices(int32_t *p, int32_t first, uint32_t lanes) {
    if (lanes != 0) *p = first;
  }
  static void compress_loaded(int32_t *p, const int32_t *source, uint32_t lanes) {
    if (lanes != 0) *p = *source;
  }
  // For merge: bit per lane from the lanes' tag bytes.
  static uint32_t tagged(const uint8_t *tags, int bit) { return static_cast<uint32_t>(tags[0] >> bit) & 1u; }
  // Puts the first elements of a vector at the chosen lanes, 0 at the others.
  static Float expand(const float *p, uint32_t lanes) { return lanes != 0 ? *p : 0.0f; }
  static int32_t expand(const int32_t *p, uint32_t lanes) { return lanes != 0 ? *p : 0; }
  // a where only `in_a`, b where only `in_b`, a + b where both.
  static Float join(Float a, Float b, uint32_t in_a, uint32_t in_b) {
    return in_b == 0 ? a : in_a == 0 ? b : a + b;
  }
  static int32_t join(int32_t a, int32_t b, uint32_t in_a, uint32_t) { return in_a != 0 ? a : b; }
  static void store(int32_t *p, int32_t x) { *p = x; }
  // The bits of `kept` at the chosen lanes, densely, as bytes 0 or 1.
  static void bytes(uint8_t *p, uint32_t kept, uint32_t lanes) {
    if (lanes != 0) *p = static_cast<uint8_t>(kept & 1u);
  }
};

}  // namespace
}  // namespace commhooks
#endif
