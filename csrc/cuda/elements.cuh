// One element: decoding, correction, order of magnitudes. Every operation is rounded on its own (no
// contraction to fused multiply-add), so that the bits are those of the CPU library.
#pragma once

#include "device.cuh"

namespace commhooks {

constexpr uint32_t kMagnitudeBits = 0x7fffffffu;
constexpr uint32_t kInfinityKey = 0x7f800000u;
constexpr uint32_t kNoKey = 0xffffffffu;  // above every key: a floor that nothing reaches

struct F32 {
  using storage = float;
  using four = float4;
};
struct Bf16 {
  using storage = uint16_t;
  using four = uint2;
};
struct F16 {
  using storage = uint16_t;
  using four = uint2;
};

template <typename G>
__device__ inline float decode(typename G::storage raw);
template <>
__device__ inline float decode<F32>(float raw) {
  return raw;
}
template <>
__device__ inline float decode<Bf16>(uint16_t raw) {
  return __uint_as_float(static_cast<uint32_t>(raw) << 16);
}
template <>
__device__ inline float decode<F16>(uint16_t raw) {
  return __half2float(__ushort_as_half(raw));
}

// Order of |value| as an integer: NaN above infinity.
__device__ inline uint32_t key_of(float value) { return __float_as_uint(value) & kMagnitudeBits; }

// What the fused pass reads and writes: commhooks_fused, and the flags of the segments in scratch. In place
// the outputs are the inputs.
struct Operands {
  const void *grad;
  const float *residual;
  const float *velocity;         // or nullptr
  float *residual_out;
  float *velocity_out;           // or nullptr
  const float *scale_ptr;        // or nullptr
  const float *rescale;          // one per segment, or nullptr
  const int64_t *offsets;        // or nullptr: there is one segment, and it is active
  const uint32_t *active;        // a flag per segment, valid after the flag phase; nullptr: all active
  uint8_t *active_out;           // where the caller wants the flags, or nullptr
  int64_t numel;
  int32_t num_segments;
  float scale;
  float momentum;
  bool looks_up;                 // whether elements look for their segment
};

__device__ inline float gradient_factor(const Operands &op) {
  return op.scale_ptr == nullptr ? op.scale : __fmul_rn(op.scale, *op.scale_ptr);
}

struct Corrected {
  float c;
  float v;
  bool bad;  // was not finite: c and v are those of a zero gradient
};

__device__ inline Corrected correct(float grad, float residual, float velocity, float factor, float momentum,
                                       bool has_velocity) {
  const float g = __fmul_rn(grad, factor);
  const float decayed = has_velocity ? __fmul_rn(momentum, velocity) : 0.0f;
  Corrected result;
  result.v = has_velocity ? __fadd_rn(decayed, g) : g;
  result.c = __fadd_rn(residual, result.v);
  result.bad = key_of(result.c) >= kInfinityKey;
  if (result.bad) {
    result.v = __fadd_rn(decayed, 0.0f);
    result.c = __fadd_rn(residual, result.v);
  }
  return result;
}

// The segment of an index: the last one that begins at or before it (empty segments hold nothing).
__device__ inline int32_t segment_of(const int64_t *offsets, int32_t num_segments, int64_t index) {
  int32_t low = 0;
  int32_t high = num_segments;  // offsets[low] <= index < offsets[high]
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (offsets[middle] <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The segment of the elements that one thread looks at. Few searches are made when indices are near each
// other.
struct SegmentCursor {
  int64_t begin = 0;
  int64_t end = 0;
  float rescale = 1.0f;  // factor of the residual at the last index
  bool flag = true;

  // Whether an element is in an active segment.
  __device__ bool at(const Operands &op, int64_t index) {
    if (!op.looks_up) return true;
    if (index < begin || index >= end) {
      begin = 0;
      end = op.numel;
      int32_t segment = 0;
      if (op.offsets != nullptr) {
        segment = segment_of(op.offsets, op.num_segments, index);
        begin = op.offsets[segment];
        end = op.offsets[segment + 1];
      }
      if (op.active != nullptr) flag = __ldcg(op.active + segment) != 0;
      if (op.rescale != nullptr) rescale = op.rescale[segment];
    }
    return flag;
  }
};

}  // namespace commhooks
