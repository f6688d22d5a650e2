// The inner loops over dense arrays: the fused pass, collecting, sampling. Part of kernels_impl.h.
#ifndef COMMHOOKS_CPU_DENSE_IMPL_H
#define COMMHOOKS_CPU_DENSE_IMPL_H

#include <string.h>

#include "commhooks.h"
#include "simd/kernels.h"
#include "simd/vector_scalar.h"

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

}  // namespace
}  // namespace commhooks
#endif
