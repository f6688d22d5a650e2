// The inner loops, written once over a vector type. Included by one file per instruction set, each compiled with that
// set's flags; everything is in an anonymous namespace and free of library templates (kernels.h says why).
#ifndef COMMHOOKS_CPU_KERNELS_IMPL_H
#define COMMHOOKS_CPU_KERNELS_IMPL_H

#include <string.h>

#include "commhooks.h"
#include "kernels.h"
#include "vector_scalar.h"

namespace commhooks {
namespace {

struct LoadF32 {
  using Element = float;
  template <class V>
  static typename V::Float load(const Element *p) { return V::load(p); }
};
struct LoadBF16 {
  using Element = uint16_t;
  template <class V>
  static typename V::Float load(const Element *p) { return V::load_bf16(p); }
};
struct LoadF16 {
  using Element = uint16_t;
  template <class V>
  static typename V::Float load(const Element *p) { return V::load_f16(p); }
};

inline int64_t popcount(uint32_t lanes) { return __builtin_popcount(lanes); }

// Appends the chosen lanes and says which were taken; near the capacity all of them stay.
template <class V>
inline uint32_t append_lanes(typename V::Float x, int64_t index, uint32_t lanes, Appender &out) {
  if (out.count >= out.capacity) {
    out.overflow = 1;
    return 0;
  }
  V::compress(out.values + out.count, x, lanes);
  V::compress_indices(out.indices + out.count, static_cast<int32_t>(index), lanes);
  out.count += popcount(lanes);
  return lanes;
}

template <class V, class Load, bool kVelocity>
struct Fuse {
  using Float = typename V::Float;
  const typename Load::Element *grad;
  float *residual;
  float *velocity;
  Float factor;
  Float momentum;

  explicit Fuse(const FuseArgs &args)
      : grad(static_cast<const typename Load::Element *>(args.grad)),
        residual(args.residual),
        velocity(args.velocity),
        factor(V::broadcast(args.factor)),
        momentum(V::broadcast(args.momentum)) {}

  Float gradient(int64_t i) const { return V::mul(Load::template load<V>(grad + i), factor); }
  Float decayed(int64_t i) const { return V::mul(momentum, V::load(velocity + i)); }
  Float new_velocity(Float g, int64_t i) const { return kVelocity ? V::add(decayed(i), g) : g; }

  // One vector with everything that happens rarely: non-finite elements and candidates.
  void careful(int64_t i, bool append, Appender &out) const {
    Float g = gradient(i);
    const Float r = V::load(residual + i);
    Float v = new_velocity(g, i);
    Float c = V::add(r, v);
    const uint32_t bad = V::above(c, kLargestFiniteKey);
    if (__builtin_expect(bad != 0, 0)) {
      g = V::clear(g, bad);
      v = new_velocity(g, i);
      c = V::add(r, v);
      out.nonfinite += popcount(bad);
    }
    const uint32_t chosen = append ? V::above(c, out.floor) : 0;
    if (chosen != 0) c = V::clear(c, append_lanes<V>(c, i, chosen, out));
    V::store(residual + i, c);
    if (kVelocity) V::store(velocity + i, v);
  }

  // Groups of four vectors. kDense: candidates are so frequent that whether a group has one cannot be predicted, so
  // every group goes through the appending.
  template <bool kAppend, bool kDense>
  int64_t groups(int64_t i, int64_t end, Appender &out) const {
    constexpr int64_t w = V::kLanes;
    const uint32_t floor = kAppend && out.floor < kLargestFiniteKey ? out.floor : kLargestFiniteKey;
    for (; i + 4 * w <= end; i += 4 * w) {
      Float v[4];
      Float c[4];
      uint32_t lanes[4];
      for (int u = 0; u < 4; ++u) {
        v[u] = new_velocity(gradient(i + u * w), i + u * w);
        c[u] = V::add(V::load(residual + i + u * w), v[u]);
        lanes[u] = V::above(c[u], floor);
      }
      // Non-finite keys are above every floor used here, so one comparison finds both kinds.
      if (kDense || (lanes[0] | lanes[1] | lanes[2] | lanes[3]) != 0) {
        uint32_t bad = 0;
        for (int u = 0; u < 4; ++u) bad |= V::above(c[u], kLargestFiniteKey);
        if (__builtin_expect(bad != 0 || !kAppend || out.count >= out.capacity || out.floor > floor, 0)) {
          for (int u = 0; u < 4; ++u) careful(i + u * w, kAppend, out);
          continue;
        }
        for (int u = 0; u < 4; ++u) {
          if (!kDense && lanes[u] == 0) continue;
          V::compress(out.values + out.count, c[u], lanes[u]);
          V::compress_indices(out.indices + out.count, static_cast<int32_t>(i + u * w), lanes[u]);
          out.count += popcount(lanes[u]);
          c[u] = V::clear(c[u], lanes[u]);
        }
      }
      for (int u = 0; u < 4; ++u) {
        V::store(residual + i + u * w, c[u]);
        if (kVelocity) V::store(velocity + i + u * w, v[u]);
      }
    }
    return i;
  }
};

template <class V, class Load, bool kVelocity>
void fuse_range(const FuseArgs &args, int64_t begin, int64_t end, bool append, Appender &out) {
  const Fuse<V, Load, kVelocity> wide(args);
  const Fuse<ScalarVector, Load, kVelocity> single(args);
  int64_t i = begin;
  // Up to a cache line of the residual, which is both read and written.
  while (i < end && (reinterpret_cast<uintptr_t>(args.residual + i) & 63u) != 0) single.careful(i++, append, out);
  if (!append) {
    i = wide.template groups<false, false>(i, end, out);
  } else if (out.dense != 0) {
    i = wide.template groups<true, true>(i, end, out);
  } else {
    i = wide.template groups<true, false>(i, end, out);
  }
  for (; i + V::kLanes <= end; i += V::kLanes) wide.careful(i, append, out);
  for (; i < end; ++i) single.careful(i, append, out);
}

template <class V>
void fuse(const FuseArgs &args, int64_t begin, int64_t end, bool append, Appender &out) {
  const bool velocity = args.velocity != nullptr;
  if (args.dtype == COMMHOOKS_BF16) {
    velocity ? fuse_range<V, LoadBF16, true>(args, begin, end, append, out)
             : fuse_range<V, LoadBF16, false>(args, begin, end, append, out);
  } else if (args.dtype == COMMHOOKS_F16) {
    velocity ? fuse_range<V, LoadF16, true>(args, begin, end, append, out)
             : fuse_range<V, LoadF16, false>(args, begin, end, append, out);
  } else {
    velocity ? fuse_range<V, LoadF32, true>(args, begin, end, append, out)
             : fuse_range<V, LoadF32, false>(args, begin, end, append, out);
  }
}

template <class V>
inline void collect_one(float *residual, int64_t i, Appender &out) {
  const typename V::Float c = V::load(residual + i);
  const uint32_t chosen = V::above(c, out.floor);
  if (__builtin_expect(chosen != 0, 0)) V::store(residual + i, V::clear(c, append_lanes<V>(c, i, chosen, out)));
}

template <class V>
void collect(float *residual, int64_t begin, int64_t end, Appender &out) {
  int64_t i = begin;
  for (; i + V::kLanes <= end; i += V::kLanes) collect_one<V>(residual, i, out);
  for (; i < end; ++i) collect_one<ScalarVector>(residual, i, out);
}

template <class Load>
bool all_zero_range(const typename Load::Element *grad, int64_t begin, int64_t end) {
  // NaN is not zero, minus zero is. The first line decides for nearly every gradient.
  constexpr int64_t kStep = 1024;
  for (int64_t i = begin; i < end;) {
    const int64_t stop = i == begin ? (end - i < 16 ? end : i + 16) : (end - i < kStep ? end : i + kStep);
    uint32_t seen = 0;
    for (; i < stop; ++i) {
      uint32_t bits = 0;
      memcpy(&bits, grad + i, sizeof(typename Load::Element));
      seen |= bits << (sizeof(typename Load::Element) == 4 ? 1 : 17);
    }
    if (seen != 0) return false;
  }
  return true;
}

inline bool all_zero(const void *grad, int32_t dtype, int64_t begin, int64_t end) {
  if (dtype == COMMHOOKS_F32) return all_zero_range<LoadF32>(static_cast<const float *>(grad), begin, end);
  return all_zero_range<LoadF16>(static_cast<const uint16_t *>(grad), begin, end);
}

template <class Load>
void sample_range(const FuseArgs &args, int64_t begin, int64_t count, float *out) {
  const Fuse<ScalarVector, Load, true> with(args);
  const Fuse<ScalarVector, Load, false> without(args);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t i = begin + j;
    const float g = with.gradient(i);
    const float v = args.velocity != nullptr ? with.new_velocity(g, i) : without.new_velocity(g, i);
    const float c = args.residual[i] + v;
    out[j] = ScalarVector::above(c, kLargestFiniteKey) != 0 ? 0.0f : c;
  }
}

inline void sample(const FuseArgs &args, int64_t begin, int64_t count, float *out) {
  if (args.dtype == COMMHOOKS_BF16) return sample_range<LoadBF16>(args, begin, count, out);
  if (args.dtype == COMMHOOKS_F16) return sample_range<LoadF16>(args, begin, count, out);
  sample_range<LoadF32>(args, begin, count, out);
}

inline void key_range(const float *values, int64_t size, uint32_t *lowest, uint32_t *highest) {
  int32_t low = INT32_MAX;
  int32_t high = 0;
  for (int64_t j = 0; j < size; ++j) {
    const int32_t key = static_cast<int32_t>(bits_of(values[j]) & kMagnitudeBits);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  *lowest = static_cast<uint32_t>(low);
  *highest = static_cast<uint32_t>(high);
}

template <class V>
inline int64_t between_one(const float *values, uint32_t low, uint32_t high, float *out) {
  const typename V::Float x = V::load(values);
  const uint32_t from_low = low == 0 ? ~0u >> (32 - V::kLanes) : V::above(x, low - 1);
  const uint32_t lanes = from_low & ~V::above(x, high);
  if (lanes == 0) return 0;
  V::compress(out, x, lanes);
  return popcount(lanes);
}

template <class V>
int64_t between(const float *values, int64_t size, uint32_t low, uint32_t high, float *out) {
  int64_t found = 0;
  int64_t j = 0;
  for (; j + V::kLanes <= size; j += V::kLanes) found += between_one<V>(values + j, low, high, out + found);
  for (; j < size; ++j) found += between_one<ScalarVector>(values + j, low, high, out + found);
  return found;
}

inline void count(const float *values, int64_t size, uint32_t key, int64_t *above, int64_t *equal) {
  int64_t larger = 0;
  int64_t same = 0;
  for (int64_t j = 0; j < size; ++j) {
    const uint32_t own = bits_of(values[j]) & kMagnitudeBits;
    larger += own > key ? 1 : 0;
    same += own == key ? 1 : 0;
  }
  *above = larger;
  *equal = same;
}

struct EmitState {
  uint32_t key;
  int64_t ties;
  Emitted out;
  int64_t written;
  float *residual;
};

// Writes what is kept of one vector and returns its lanes.
template <class V>
inline uint32_t emit_one(const float *values, const int32_t *indices, EmitState &state) {
  const typename V::Float x = V::load(values);
  uint32_t lanes = V::above(x, state.key);
  uint32_t same = (state.key == 0 ? ~0u >> (32 - V::kLanes) : V::above(x, state.key - 1)) & ~lanes;
  for (; same != 0 && state.ties > 0; same &= same - 1, --state.ties) lanes |= same & (0u - same);
  uint32_t rest = (~0u >> (32 - V::kLanes)) & ~lanes;
  if (state.residual != nullptr) {
    for (; rest != 0; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      state.residual[indices[lane]] = values[lane];
    }
  }
  if (state.written + V::kLanes <= state.out.size) {
    V::compress(state.out.values + state.written, x, lanes);
    V::compress_loaded(state.out.indices + state.written, indices, lanes);
    state.written += popcount(lanes);
  } else {
    // Near the end of this thread's share a whole vector would run into the next thread's.
    for (uint32_t left = lanes; left != 0; left &= left - 1, ++state.written) {
      const int lane = __builtin_ctz(left);
      state.out.values[state.written] = values[lane];
      state.out.indices[state.written] = indices[lane];
    }
  }
  return lanes;
}

template <class V>
void emit(const float *values, const int32_t *indices, int64_t size, uint32_t key, int64_t ties, Emitted out,
          float *residual) {
  constexpr int64_t kAhead = 64;
  EmitState state{key, ties, out, 0, residual};
  int64_t j = 0;
  for (; j + V::kLanes <= size; j += V::kLanes) {
    if (residual != nullptr && j + kAhead + V::kLanes <= size) {
      // What will go back is far apart in memory: its cache lines are asked for early.
      uint32_t rest = (~0u >> (32 - V::kLanes)) & ~V::above(V::load(values + j + kAhead), key);
      for (; rest != 0; rest &= rest - 1) {
        __builtin_prefetch(residual + indices[j + kAhead + __builtin_ctz(rest)], 1);
      }
    }
    emit_one<V>(values + j, indices + j, state);
  }
  for (; j < size; ++j) emit_one<ScalarVector>(values + j, indices + j, state);
}

template <class V>
inline void combine_one(const MergeInput &in, const uint8_t *tags, int64_t &a, int64_t &b, float *values,
                        int32_t *indices) {
  const uint32_t in_a = V::tagged(tags, 0);
  const uint32_t in_b = V::tagged(tags, 1);
  V::store(values, V::join(V::expand(in.values_a + a, in_a), V::expand(in.values_b + b, in_b), in_a, in_b));
  V::store(indices, V::join(V::expand(in.indices_a + a, in_a), V::expand(in.indices_b + b, in_b), in_a, in_b));
  a += popcount(in_a);
  b += popcount(in_b);
}

template <class V>
void combine(const MergeInput &in, const Stretch &stretch, float *values, int32_t *indices) {
  int64_t a = stretch.begin_a;
  int64_t b = stretch.begin_b;
  int64_t u = 0;
  constexpr int64_t w = V::kLanes;
  // Whole vectors of the inputs are read.
  while (u + w <= stretch.size && a + w <= stretch.end_a && b + w <= stretch.end_b) {
    combine_one<V>(in, stretch.tags + u, a, b, values + u, indices + u);
    u += w;
  }
  for (; u < stretch.size; ++u) {
    // One lane, read only when it is there.
    const bool in_a = (stretch.tags[u] & 1) != 0;
    const bool in_b = (stretch.tags[u] & 2) != 0;
    indices[u] = in_a ? in.indices_a[a] : in.indices_b[b];
    values[u] = !in_b ? in.values_a[a] : !in_a ? in.values_b[b] : in.values_a[a] + in.values_b[b];
    a += in_a ? 1 : 0;
    b += in_b ? 1 : 0;
  }
}

template <class V>
inline void survive_one(const uint8_t *tags, uint32_t kept, int64_t &a, int64_t &b, Survivors survivors) {
  const uint32_t in_a = V::tagged(tags, 0);
  const uint32_t in_b = V::tagged(tags, 1);
  V::bytes(survivors.a + a, kept, in_a);
  V::bytes(survivors.b + b, kept, in_b);
  a += popcount(in_a);
  b += popcount(in_b);
}

template <class V>
void emit_merged(const Stretch &stretch, const float *values, const int32_t *indices, uint32_t key, int64_t ties,
                 Emitted out, Survivors survivors) {
  EmitState state{key, ties, out, 0, nullptr};
  int64_t a = stretch.begin_a;
  int64_t b = stretch.begin_b;
  int64_t u = 0;
  constexpr int64_t w = V::kLanes;
  // A whole vector of survivors may be written.
  for (; u + w <= stretch.size && a + w <= stretch.end_a && b + w <= stretch.end_b; u += w) {
    survive_one<V>(stretch.tags + u, emit_one<V>(values + u, indices + u, state), a, b, survivors);
  }
  for (; u < stretch.size; ++u) {
    survive_one<ScalarVector>(stretch.tags + u, emit_one<ScalarVector>(values + u, indices + u, state), a, b, survivors);
  }
}

inline void feistel(uint32_t *indices, int64_t size, const uint32_t *round_keys, int32_t half_bits) {
  const uint32_t mask = (1u << half_bits) - 1u;
  for (int64_t j = 0; j < size; ++j) {
    uint32_t left = indices[j] >> half_bits;
    uint32_t right = indices[j] & mask;
    for (int round = 0; round < 6; ++round) {
      uint32_t x = right ^ round_keys[round];
      x *= 0x85EBCA6Bu;
      x ^= x >> 13;
      x *= 0xC2B2AE35u;
      x ^= x >> 16;
      const uint32_t next = left ^ (x & mask);
      left = right;
      right = next;
    }
    indices[j] = (left << half_bits) | right;
  }
}

template <class V>
constexpr Kernels make_kernels(const char *name, void (*stream)(void *, const void *, int64_t)) {
  return Kernels{name,  fuse<V>, collect<V>, all_zero,       sample, key_range, between<V>,
                 count, emit<V>, combine<V>, emit_merged<V>, stream, feistel};
}

}  // namespace
}  // namespace commhooks
#endif
