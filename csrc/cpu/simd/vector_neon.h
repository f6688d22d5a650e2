// Four lanes of AArch64 NEON. No library templates (kernels.h).
#ifndef COMMHOOKS_CPU_VECTOR_NEON_H
#define COMMHOOKS_CPU_VECTOR_NEON_H

#include <arm_neon.h>
#include <stdint.h>

#include "simd/bytes.h"

namespace commhooks {
namespace {

// For each of the 16 lane sets: byte numbers that move the chosen lanes to the front, and the lanes' numbers.
struct CompressTable {
  alignas(16) uint8_t byte[16][16];
  alignas(16) int32_t lane[16][4];
  constexpr CompressTable() : byte{}, lane{} {
    for (int set = 0; set < 16; ++set) {
      int count = 0;
      for (int bit = 0; bit < 4; ++bit) {
        if (((set >> bit) & 1) == 0) continue;
        for (int i = 0; i < 4; ++i) byte[set][4 * count + i] = static_cast<uint8_t>(4 * bit + i);
        lane[set][count++] = bit;
      }
    }
  }
};
constexpr CompressTable kCompress{};
alignas(16) constexpr uint32_t kLaneBits[4] = {1, 2, 4, 8};

struct NeonVector {
  static constexpr int kLanes = 4;
  using Float = float32x4_t;

  static Float load(const float *p) { return vld1q_f32(p); }
  static Float load_bf16(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
  }
  static Float load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void store(float *p, Float x) { vst1q_f32(p, x); }
  static void stream(float *p, Float x) { vst1q_f32(p, x); }
  static Float broadcast(float x) { return vdupq_n_f32(x); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  // For low-bit messages.
  using Mask = uint32x4_t;
  static Float sub(Float a, Float b) { return vsubq_f32(a, b); }
  static Float magnitude(Float x) { return vabsq_f32(x); }
  static Float clamp(Float x, Float low, Float high) { return vminq_f32(vmaxq_f32(x, low), high); }
  static Float larger_key(Float a, Float b) {
    return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
  }
  static Mask at_least(Float a, Float b) { return vcgeq_f32(a, b); }
  static Float choose(Mask mask, Float a, Float b) { return vbslq_f32(mask, a, b); }
  static uint64_t low_bytes_of_two(Float a, Float b) {
    const uint16x4_t first = vmovn_u32(vreinterpretq_u32_f32(a));
    const uint16x4_t second = vmovn_u32(vreinterpretq_u32_f32(b));
    return vget_lane_u64(vreinterpret_u64_u8(vmovn_u16(vcombine_u16(first, second))), 0);
  }
  static Bytes16 low_bytes(const Float *x) { return {low_bytes_of_two(x[0], x[1]), low_bytes_of_two(x[2], x[3])}; }
  static void from_bytes(Bytes16 bytes, Float *x) {
    const uint16x8_t low = vmovl_u8(vcreate_u8(bytes.low));
    const uint16x8_t high = vmovl_u8(vcreate_u8(bytes.high));
    x[0] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(low)));
    x[1] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(low)));
    x[2] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(high)));
    x[3] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)));
  }
  static uint32_t above(Float x, uint32_t key) {
    const uint32x4_t magnitude = vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7fffffffu));
    return vaddvq_u32(vandq_u32(vcgtq_u32(magnitude, vdupq_n_u32(key)), vld1q_u32(kLaneBits)));
  }
  static Float clear(Float x, uint32_t lanes) {
    const uint32x4_t bit = vld1q_u32(kLaneBits);
    const uint32x4_t set = vtstq_u32(vdupq_n_u32(lanes), bit);
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), set));
  }
  static void compress(float *p, Float x, uint32_t lanes) {
    vst1q_f32(p, vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x), vld1q_u8(kCompress.byte[lanes]))));
  }
  static void compress_indices(int32_t *p, int32_t first, uint32_t lanes) {
    vst1q_s32(p, vaddq_s32(vld1q_s32(kCompress.lane[lanes]), vdupq_n_s32(first)));
  }
  static void compress_loaded(int32_t *p, const int32_t *source, uint32_t lanes) {
    const uint8x16_t loaded = vreinterpretq_u8_s32(vld1q_s32(source));
    vst1q_s32(p, vreinterpretq_s32_u8(vqtbl1q_u8(loaded, vld1q_u8(kCompress.byte[lanes]))));
  }
  static uint32_t tagged(const uint8_t *tags, int bit) {
    uint32_t lanes = 0;
    for (int lane = 0; lane < 4; ++lane) lanes |= ((static_cast<uint32_t>(tags[lane]) >> bit) & 1u) << lane;
    return lanes;
  }
  static uint32x4_t lane_mask(uint32_t lanes) { return vtstq_u32(vdupq_n_u32(lanes), vld1q_u32(kLaneBits)); }
  static Float expand(const float *p, uint32_t lanes) {
    alignas(16) float x[4] = {};
    for (int lane = 0; lane < 4; ++lane) {
      if (((lanes >> lane) & 1u) != 0) x[lane] = *p++;
    }
    return vld1q_f32(x);
  }
  static int32x4_t expand(const int32_t *p, uint32_t lanes) {
    alignas(16) int32_t x[4] = {};
    for (int lane = 0; lane < 4; ++lane) {
      if (((lanes >> lane) & 1u) != 0) x[lane] = *p++;
    }
    return vld1q_s32(x);
  }
  static Float join(Float a, Float b, uint32_t in_a, uint32_t in_b) {
    const Float one = vbslq_f32(lane_mask(in_a), a, b);
    return vbslq_f32(lane_mask(in_a & in_b), vaddq_f32(a, b), one);
  }
  static int32x4_t join(int32x4_t a, int32x4_t b, uint32_t in_a, uint32_t) {
    return vbslq_s32(lane_mask(in_a), a, b);
  }
  static void store(int32_t *p, int32x4_t x) { vst1q_s32(p, x); }
  static void bytes(uint8_t *p, uint32_t kept, uint32_t lanes) {
    for (; lanes != 0; lanes &= lanes - 1) *p++ = static_cast<uint8_t>((kept >> __builtin_ctz(lanes)) & 1u);
  }
};

}  // namespace
}  // namespace commhooks
#endif
