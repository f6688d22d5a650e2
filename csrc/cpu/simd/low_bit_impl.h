// The inner loops over low-bit messages (docs/kernels.md has the format). Part of kernels_impl.h.
#ifndef COMMHOOKS_CPU_LOW_BIT_IMPL_H
#define COMMHOOKS_CPU_LOW_BIT_IMPL_H

#include <string.h>

#include "simd/bytes.h"
#include "simd/kernels.h"
#include "simd/vector_scalar.h"

namespace commhooks {
namespace {

// A code is a small number c; its value is (c - kCenter) * step. Each product is exact.
template <int kBits>
struct Levels {
  static constexpr float kCenter = kBits == 1 ? 0.5f : kBits == 2 ? 1.5f : kBits == 4 ? 8.0f : 128.0f;
  static constexpr float kLargest = kBits == 4 ? 7.0f : 127.0f;  // with 4 and 8 bits
  static float step(float scale) { return kBits <= 2 ? 2.0f * scale : scale; }
};

// Adding it rounds a float below 2^22 to an integer, half to even, which is then in the lowest bits.
constexpr float kToInteger = 0x1.8p23f;
constexpr float kLeastScale = 0x1p-100f;
constexpr float kLargestScale = 0x1p100f;
constexpr uint16_t kNanScale = 0x7fc0u;
// So many blocks get their scales before the first of them is encoded: 8 kB, which stay in the first-level cache.
constexpr int kGroup = 8;

inline bool all_finite(const float *x) {
  uint32_t bad = 0;
  for (int i = 0; i < kLowBitBlock; ++i) bad |= (bits_of(x[i]) & kMagnitudeBits) > kLargestFiniteKey ? 1u : 0u;
  return bad == 0;
}

// The scale as bits of bfloat16. `exact`: before it is rounded, not NaN.
inline uint16_t rounded_scale(float exact) {
  if (exact > kLargestScale) exact = kLargestScale;
  const float scale = bf16_to_float(float_to_bf16(exact));
  return static_cast<uint16_t>(bits_of(scale < kLeastScale ? 0.0f : scale) >> 16);
}

// Combines the magnitudes of a block lane by lane, 16 lanes, row after row.
template <class V, class Combine>
inline void combine_magnitudes(const float *x, float *sixteen, Combine combine) {
  constexpr int kVectors = 16 / V::kLanes;
  typename V::Float lanes[kVectors];
  for (int v = 0; v < kVectors; ++v) lanes[v] = V::magnitude(V::load(x + v * V::kLanes));
  for (int row = 16; row < kLowBitBlock; row += 16) {
    for (int v = 0; v < kVectors; ++v) lanes[v] = combine(lanes[v], V::magnitude(V::load(x + row + v * V::kLanes)));
  }
  for (int v = 0; v < kVectors; ++v) V::store(sixteen + v * V::kLanes, lanes[v]);
}

// The sum of the magnitudes of a block, in the format's order.
template <class V>
inline float sum_of_magnitudes(const float *x) {
  using Float = typename V::Float;
  float sums[16];
  combine_magnitudes<V>(x, sums, [](Float a, Float b) { return V::add(a, b); });
  for (int half = 8; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sums[j] = sums[j] + sums[j + half];
  }
  return sums[0];
}

// The largest magnitude of a block; NaN and infinity are above every number.
template <class V>
inline uint32_t largest_key(const float *x) {
  using Float = typename V::Float;
  float largest[16];
  combine_magnitudes<V>(x, largest, [](Float a, Float b) { return V::larger_key(a, b); });
  uint32_t key = 0;
  for (int j = 0; j < 16; ++j) key = bits_of(largest[j]) > key ? bits_of(largest[j]) : key;
  return key;
}

// The scale of a block of `count` elements that is padded with zeros.
template <class V, int kBits>
inline uint16_t block_scale(const float *x, int64_t count) {
  if constexpr (kBits <= 2) {
    const float sum = sum_of_magnitudes<V>(x);
    // A sum of finite magnitudes may overflow.
    if (bits_of(sum) > kLargestFiniteKey && !all_finite(x)) return kNanScale;
    const float mean = sum / static_cast<float>(count);
    return rounded_scale(kBits == 2 ? 0.625f * mean : mean);
  } else {
    const uint32_t key = largest_key<V>(x);
    if (key > kLargestFiniteKey) return kNanScale;
    return rounded_scale(float_of(key) / Levels<kBits>::kLargest);
  }
}

// What encodes the elements of one block.
template <class V, int kBits>
struct Encoder {
  using Float = typename V::Float;
  using L = Levels<kBits>;
  static constexpr int kVectors = 16 / V::kLanes;
  Float step;     // with 2 bits also the threshold of the outer levels
  Float inverse;  // of the scale, with 4 and 8 bits

  explicit Encoder(float scale)
      : step(V::broadcast(L::step(scale))), inverse(V::broadcast(kBits >= 4 ? 1.0f / scale : 0.0f)) {}

  // The code as a float whose lowest bits are its bits.
  Float code(Float x) const {
    const Float zero = V::broadcast(0.0f);
    if constexpr (kBits == 1) {
      return V::choose(V::at_least(x, zero), V::broadcast(kToInteger + 1), V::broadcast(kToInteger));
    } else if constexpr (kBits == 2) {
      const typename V::Mask outer = V::at_least(V::magnitude(x), step);
      const Float upper = V::choose(outer, V::broadcast(kToInteger + 3), V::broadcast(kToInteger + 2));
      const Float lower = V::choose(outer, V::broadcast(kToInteger), V::broadcast(kToInteger + 1));
      return V::choose(V::at_least(x, zero), upper, lower);
    } else {
      const Float level = V::clamp(V::mul(x, inverse), V::broadcast(-L::kLargest), V::broadcast(L::kLargest));
      return V::add(level, V::broadcast(kToInteger + L::kCenter));
    }
  }

  // Encodes 16 elements and puts what is left of them where `rest` points (nullptr: nowhere).
  template <bool kStream>
  void sixteen(const float *x, float *rest, uint8_t *codes) const {
    Float coded[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const Float element = V::load(x + v * V::kLanes);
      coded[v] = code(element);
      if (rest == nullptr) continue;
      const Float level = V::sub(V::sub(coded[v], V::broadcast(kToInteger)), V::broadcast(L::kCenter));
      const Float left = V::sub(element, V::mul(level, step));
      if (kStream) {
        V::stream(rest + v * V::kLanes, left);
      } else {
        V::store(rest + v * V::kLanes, left);
      }
    }
    put_codes<kBits>(codes, V::low_bytes(coded));
  }
};

// A block of 4 or 8 bits whose scale is 0 or NaN: level 0 everywhere.
template <int kBits>
inline void encode_nothing(const float *x, float scale, float *rest, uint8_t *codes) {
  memset(codes, kBits == 4 ? 0x88 : 0x80, static_cast<size_t>(kLowBitBlock / 8 * kBits));
  if (rest == nullptr) return;
  for (int i = 0; i < kLowBitBlock; ++i) rest[i] = x[i] - scale;
}

// Encodes a block that has its scale.
template <class V, int kBits, bool kStream>
inline void encode_block(const float *x, uint16_t bits, float *rest, uint8_t *codes) {
  const float scale = bf16_to_float(bits);
  if (kBits >= 4 && !(scale > 0.0f)) return encode_nothing<kBits>(x, scale, rest, codes);
  const Encoder<V, kBits> encoder(scale);
  for (int i = 0; i < kLowBitBlock; i += 16) {
    __builtin_prefetch(x + i + kGroup * kLowBitBlock);
    encoder.template sixteen<kStream>(x + i, rest != nullptr ? rest + i : nullptr, codes + i / 8 * kBits);
  }
}

// Encodes the last block, of fewer elements.
template <class V, int kBits>
void encode_rest(const float *x, int64_t count, float *rest, uint8_t *scale, uint8_t *codes) {
  float padded[kLowBitBlock] = {};
  float left[kLowBitBlock];
  uint8_t whole[kLowBitBlock / 8 * kBits];
  memcpy(padded, x, static_cast<size_t>(count) * sizeof(float));
  const uint16_t bits = block_scale<V, kBits>(padded, count);
  encode_block<V, kBits, false>(padded, bits, left, whole);
  const int64_t bytes = (count * kBits + 7) / 8;
  if (count * kBits % 8 != 0) whole[bytes - 1] &= static_cast<uint8_t>((1 << (count * kBits % 8)) - 1);
  memcpy(scale, &bits, 2);
  memcpy(codes, whole, static_cast<size_t>(bytes));
  if (rest != nullptr) memcpy(rest, left, static_cast<size_t>(count) * sizeof(float));
}

template <class V, int kBits, bool kStream>
void encode_range(const LowBitEncode &args, int64_t begin, int64_t end) {
  constexpr int64_t kCodeBytes = kLowBitBlock / 8 * kBits;
  const int64_t whole = args.numel / kLowBitBlock < end ? args.numel / kLowBitBlock : end;
  uint16_t scales[kGroup];
  for (int64_t block = begin; block < whole;) {
    const int64_t stop = block + kGroup < whole ? block + kGroup : whole;
    // The sums of several blocks do not wait for each other.
    for (int64_t b = block; b < stop; ++b) {
      scales[b - block] = block_scale<V, kBits>(args.x + b * kLowBitBlock, kLowBitBlock);
    }
    memcpy(args.scales + 2 * block, scales, static_cast<size_t>(2 * (stop - block)));
    for (int64_t b = block; b < stop; ++b) {
      float *rest = args.remainder != nullptr ? args.remainder + b * kLowBitBlock : nullptr;
      encode_block<V, kBits, kStream>(args.x + b * kLowBitBlock, scales[b - block], rest, args.codes + b * kCodeBytes);
    }
    block = stop;
  }
  if (whole == end) return;
  const int64_t first = whole * kLowBitBlock;
  float *rest = args.remainder != nullptr ? args.remainder + first : nullptr;
  encode_rest<V, kBits>(args.x + first, args.numel - first, rest, args.scales + 2 * whole,
                        args.codes + whole * kCodeBytes);
}

template <class V, int kBits>
void encode_bits(const LowBitEncode &args, int64_t begin, int64_t end) {
  args.stream != 0 ? encode_range<V, kBits, true>(args, begin, end) : encode_range<V, kBits, false>(args, begin, end);
}

template <class V>
void low_bit_encode(const LowBitEncode &args, int64_t begin, int64_t end) {
  if (args.bits == 1) return encode_bits<V, 1>(args, begin, end);
  if (args.bits == 2) return encode_bits<V, 2>(args, begin, end);
  if (args.bits == 4) return encode_bits<V, 4>(args, begin, end);
  encode_bits<V, 8>(args, begin, end);
}

// What becomes of the values of a block.
enum class Into { kStore, kStream, kAdd };

template <class V, int kBits, Into kInto>
inline void decode_block(const uint8_t *codes, float scale, float *out) {
  using Float = typename V::Float;
  constexpr int kVectors = 16 / V::kLanes;
  const Float step = V::broadcast(Levels<kBits>::step(scale));
  const Float center = V::broadcast(Levels<kBits>::kCenter);
  for (int i = 0; i < kLowBitBlock; i += 16) {
    Float code[kVectors];
    V::from_bytes(get_codes<kBits>(codes + i / 8 * kBits), code);
    for (int v = 0; v < kVectors; ++v) {
      float *to = out + i + v * V::kLanes;
      const Float value = V::mul(V::sub(code[v], center), step);
      if constexpr (kInto == Into::kAdd) {
        V::store(to, V::add(V::load(to), value));
      } else if constexpr (kInto == Into::kStream) {
        V::stream(to, value);
      } else {
        V::store(to, value);
      }
    }
  }
}

template <class V, int kBits, Into kInto>
void decode_range(const LowBitDecode &args, int64_t begin, int64_t end) {
  constexpr int64_t kCodeBytes = kLowBitBlock / 8 * kBits;
  const int64_t blocks = (args.numel + kLowBitBlock - 1) / kLowBitBlock;
  for (int64_t block = begin; block < end; ++block) {
    float *out = args.out + block * kLowBitBlock;
    const int64_t left = args.numel - block * kLowBitBlock;
    for (int64_t row = 0; row < args.rows; ++row) {
      const uint8_t *message = args.messages + row * args.stride;
      uint16_t bits;
      memcpy(&bits, message + 2 * block, 2);
      const float scale = bf16_to_float(bits);
      const uint8_t *codes = message + 2 * blocks + block * kCodeBytes;
      if (left >= kLowBitBlock) {
        decode_block<V, kBits, kInto>(codes, scale, out);
        continue;
      }
      float values[kLowBitBlock] = {};
      uint8_t whole[kCodeBytes] = {};
      memcpy(whole, codes, static_cast<size_t>((left * kBits + 7) / 8));
      if (kInto == Into::kAdd) memcpy(values, out, static_cast<size_t>(left) * sizeof(float));
      decode_block<V, kBits, kInto == Into::kAdd ? Into::kAdd : Into::kStore>(whole, scale, values);
      memcpy(out, values, static_cast<size_t>(left) * sizeof(float));
    }
  }
}

template <class V, int kBits>
void decode_bits(const LowBitDecode &args, int64_t begin, int64_t end) {
  if (args.add != 0) return decode_range<V, kBits, Into::kAdd>(args, begin, end);
  args.stream != 0 ? decode_range<V, kBits, Into::kStream>(args, begin, end)
                   : decode_range<V, kBits, Into::kStore>(args, begin, end);
}

template <class V>
void low_bit_decode(const LowBitDecode &args, int64_t begin, int64_t end) {
  if (args.bits == 1) return decode_bits<V, 1>(args, begin, end);
  if (args.bits == 2) return decode_bits<V, 2>(args, begin, end);
  if (args.bits == 4) return decode_bits<V, 4>(args, begin, end);
  decode_bits<V, 8>(args, begin, end);
}

}  // namespace
}  // namespace commhooks
#endif
