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

// Whether an output may be another array than its input, and whether the residual is rescaled.
enum class Form { kInPlace, kGeneral };

template <class V, class Load, bool kVelocity, Form kForm>
struct Fuse {
  using Float = typename V::Float;
  static constexpr bool kGeneral = kForm == Form::kGeneral;
  const typename Load::Element *grad;
  const float *residual;
  const float *velocity;
  float *residual_out;
  float *velocity_out;
  Float factor;
  Float momentum;
  Float rescale;
  bool stream_residual = false;
  bool stream_velocity = false;

  explicit Fuse(const FuseArgs &args)
      : grad(static_cast<const typename Load::Element *>(args.grad)),
        residual(args.residual),
        velocity(args.velocity),
        residual_out(args.residual_out),
        velocity_out(args.velocity_out),
        factor(V::broadcast(args.factor)),
        momentum(V::broadcast(args.momentum)),
        rescale(V::broadcast(args.rescale)) {}

  // In place there is one pointer to an array, not two.
  const float *old_residual() const { return kGeneral ? residual : residual_out; }
  const float *old_velocity() const { return kGeneral ? velocity : velocity_out; }

  Float gradient(int64_t i) const { return V::mul(Load::template load<V>(grad + i), factor); }
  Float kept(int64_t i) const {
    const Float r = V::load(old_residual() + i);
    return kGeneral ? V::mul(rescale, r) : r;
  }
  Float decayed(int64_t i) const { return V::mul(momentum, V::load(old_velocity() + i)); }
  Float new_velocity(Float g, int64_t i) const { return kVelocity ? V::add(decayed(i), g) : g; }

  // One vector with everything that happens rarely: non-finite elements and candidates.
  void careful(int64_t i, bool append, Appender &out) const {
    Float g = gradient(i);
    const Float u = kept(i);
    Float v = new_velocity(g, i);
    Float c = V::add(u, v);
    const uint32_t bad = V::above(c, kLargestFiniteKey);
    if (__builtin_expect(bad != 0, 0)) {
      g = V::clear(g, bad);
      v = new_velocity(g, i);
      c = V::add(u, v);
      out.nonfinite += popcount(bad);
    }
    const uint32_t chosen = append ? V::above(c, out.floor) : 0;
    if (chosen != 0) c = V::clear(c, append_lanes<V>(c, i, chosen, out));
    V::store(residual_out + i, c);
    if (kVelocity) V::store(velocity_out + i, v);
  }

  // The results of a vector inside a group.
  void put(int64_t i, Float c, Float v) const {
    if (kGeneral && stream_residual) {
      V::stream(residual_out + i, c);
    } else {
      V::store(residual_out + i, c);
    }
    if (!kVelocity) return;
    if (kGeneral && stream_velocity) {
      V::stream(velocity_out + i, v);
    } else {
      V::store(velocity_out + i, v);
    }
  }

  // Groups of four vectors. kDense: candidates are so frequent that whether a group has one cannot be
  // predicted, so every group goes through the appending.
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
        c[u] = V::add(kept(i + u * w), v[u]);
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
      for (int u = 0; u < 4; ++u) put(i + u * w, c[u], v[u]);
    }
    return i;
  }
};

inline bool on_a_line(const void *p) { return (reinterpret_cast<uintptr_t>(p) & 63u) == 0; }

template <class V, class Load, bool kVelocity, Form kForm>
void fuse_range(const FuseArgs &args, int64_t begin, int64_t end, bool append, Appender &out) {
  Fuse<V, Load, kVelocity, kForm> wide(args);
  const Fuse<ScalarVector, Load, kVelocity, kForm> single(args);
  int64_t i = begin;
  // Up to a cache line of the new residual.
  while (i < end && !on_a_line(args.residual_out + i)) single.careful(i++, append, out);
  if (kForm == Form::kGeneral && args.stream != 0) {
    wide.stream_residual = args.residual_out != args.residual;
    wide.stream_velocity = kVelocity && args.velocity_out != args.velocity && on_a_line(args.velocity_out + i);
  }
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

template <class V, class Load>
void fuse_as(const FuseArgs &args, int64_t begin, int64_t end, bool append, Appender &out) {
  const bool velocity = args.velocity != nullptr;
  const bool in_place = args.residual_out == args.residual && args.velocity_out == args.velocity;
  if (in_place && args.rescale == 1.0f) {
    velocity ? fuse_range<V, Load, true, Form::kInPlace>(args, begin, end, append, out)
             : fuse_range<V, Load, false, Form::kInPlace>(args, begin, end, append, out);
  } else {
    velocity ? fuse_range<V, Load, true, Form::kGeneral>(args, begin, end, append, out)
             : fuse_range<V, Load, false, Form::kGeneral>(args, begin, end, append, out);
  }
}

template <class V>
void fuse(const FuseArgs &args, int64_t begin, int64_t end, bool append, Appender &out) {
  if (args.dtype == COMMHOOKS_BF16) return fuse_as<V, LoadBF16>(args, begin, end, append, out);
  if (args.dtype == COMMHOOKS_F16) return fuse_as<V, LoadF16>(args, begin, end, append, out);
  fuse_as<V, LoadF32>(args, begin, end, append, out);
}

// What an inactive segment leaves: the residual times its factor, and the velocity as it is.
inline void carry(const FuseArgs &args, int64_t begin, int64_t end) {
  if (args.rescale != 1.0f) {
    for (int64_t i = begin; i < end; ++i) args.residual_out[i] = args.rescale * args.residual[i];
  } else if (args.residual_out != args.residual) {
    memcpy(args.residual_out + begin, args.residual + begin, static_cast<size_t>(end - begin) * sizeof(float));
  }
  if (args.velocity_out != args.velocity) {
    memcpy(args.velocity_out + begin, args.velocity + begin, static_cast<size_t>(end - begin) * sizeof(float));
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
  const Fuse<ScalarVector, Load, true, Form::kGeneral> with(args);
  const Fuse<ScalarVector, Load, false, Form::kGeneral> without(args);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t i = begin + j;
    const float g = with.gradient(i);
    const float v = args.velocity != nullptr ? with.new_velocity(g, i) : without.new_velocity(g, i);
    const float c = with.kept(i) + v;
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
