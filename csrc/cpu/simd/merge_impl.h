// The inner loops of gTop-k's merge. Part of kernels_impl.h.
//
// The merge itself only finds which input each element of the union comes from: one byte each, without a
// branch that could be mispredicted. One merge is a chain of dependent loads, so up to four stretches of the
// union are merged side by side. Values and indices then follow from these bytes, a vector at a time.
// merge_avx512.h does both at once.
#ifndef COMMHOOKS_CPU_MERGE_IMPL_H
#define COMMHOOKS_CPU_MERGE_IMPL_H

#include "simd/lists_impl.h"

namespace commhooks {
namespace {

// Tags that are sorted out at a time, in the first-level cache.
constexpr int64_t kMixed = 8192;

// One merge under way.
struct Cursor {
  const int32_t *a;
  const int32_t *b;
  const int32_t *end_a;
  const int32_t *end_b;
  uint8_t *tags;
};

// How many elements of the union all four can find before one of them may run out of an input.
inline int64_t safe_steps(const Cursor *cursors) {
  int64_t steps = kMixed / kSideBySide;
  for (int c = 0; c < kSideBySide; ++c) {
    const int64_t left_a = cursors[c].end_a - cursors[c].a;
    const int64_t left_b = cursors[c].end_b - cursors[c].b;
    steps = left_a < steps ? left_a : steps;
    steps = left_b < steps ? left_b : steps;
  }
  return steps;
}

// `steps` elements of the union for each of the four; none may run out of input. The tags of step s of cursor
// c go to mixed[4 * s + c]: one pointer instead of four keeps everything in registers.
inline void merge_side_by_side(Cursor *cursors, int64_t steps, uint8_t *mixed) {
  const int32_t *a[kSideBySide];
  const int32_t *b[kSideBySide];
  for (int c = 0; c < kSideBySide; ++c) {
    a[c] = cursors[c].a;
    b[c] = cursors[c].b;
  }
  for (int64_t s = 0; s < steps; ++s) {
    for (int c = 0; c < kSideBySide; ++c) {
      // x <= y as a sign bit: from comparisons GCC makes branches, mispredicted half of the time.
      const int64_t x = *a[c];
      const int64_t y = *b[c];
      const uint64_t in_a = static_cast<uint64_t>(x - y - 1) >> 63;
      const uint64_t in_b = static_cast<uint64_t>(y - x - 1) >> 63;
      mixed[s * kSideBySide + c] = static_cast<uint8_t>(in_a + 2 * in_b);
      a[c] += in_a;
      b[c] += in_b;
    }
  }
  for (int c = 0; c < kSideBySide; ++c) {
    for (int64_t s = 0; s < steps; ++s) cursors[c].tags[s] = mixed[s * kSideBySide + c];
    cursors[c].a = a[c];
    cursors[c].b = b[c];
    cursors[c].tags += steps;
  }
}

inline void merge_rest(Cursor &c) {
  while (c.a < c.end_a && c.b < c.end_b) {
    const int in_a = *c.a <= *c.b ? 1 : 0;
    const int in_b = *c.b <= *c.a ? 1 : 0;
    *c.tags++ = static_cast<uint8_t>(in_a | in_b << 1);
    c.a += in_a;
    c.b += in_b;
  }
  for (; c.a < c.end_a; ++c.a) *c.tags++ = 1;
  for (; c.b < c.end_b; ++c.b) *c.tags++ = 2;
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
void combine(const MergeInput &in, const Stretch &stretch) {
  float *values = stretch.values;
  int32_t *indices = stretch.indices;
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
void unite(const MergeInput &in, Stretch *stretches, int count) {
  Cursor cursors[kSideBySide];
  uint8_t mixed[kMixed];
  for (int c = 0; c < count; ++c) {
    const Stretch &s = stretches[c];
    cursors[c] = {in.indices_a + s.begin_a, in.indices_b + s.begin_b, in.indices_a + s.end_a, in.indices_b + s.end_b,
                  s.tags};
  }
  if (count == kSideBySide) {
    for (int64_t steps = safe_steps(cursors); steps > 0; steps = safe_steps(cursors)) {
      merge_side_by_side(cursors, steps, mixed);
    }
  }
  for (int c = 0; c < count; ++c) {
    merge_rest(cursors[c]);
    stretches[c].size = cursors[c].tags - stretches[c].tags;
    combine<V>(in, stretches[c]);
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
void emit_merged(const Stretch &stretch, uint32_t key, int64_t ties, Emitted out, Survivors survivors) {
  EmitState state{key, ties, out, 0, nullptr};
  int64_t a = stretch.begin_a;
  int64_t b = stretch.begin_b;
  int64_t u = 0;
  constexpr int64_t w = V::kLanes;
  // A whole vector of survivors may be written.
  for (; u + w <= stretch.size && a + w <= stretch.end_a && b + w <= stretch.end_b; u += w) {
    const uint32_t kept = emit_one<V>(stretch.values + u, stretch.indices + u, state);
    survive_one<V>(stretch.tags + u, kept, a, b, survivors);
  }
  for (; u < stretch.size; ++u) {
    const uint32_t kept = emit_one<ScalarVector>(stretch.values + u, stretch.indices + u, state);
    survive_one<ScalarVector>(stretch.tags + u, kept, a, b, survivors);
  }
}

template <class V>
void mark_common(const Stretch &stretch, uint8_t *found) {
  int64_t a = stretch.begin_a;
  int64_t u = 0;
  for (; u + V::kLanes <= stretch.size && a + V::kLanes <= stretch.end_a; u += V::kLanes) {
    const uint32_t in_a = V::tagged(stretch.tags + u, 0);
    V::bytes(found + a, V::tagged(stretch.tags + u, 1), in_a);
    a += popcount(in_a);
  }
  for (; u < stretch.size; ++u) {
    if ((stretch.tags[u] & 1) != 0) found[a++] = stretch.tags[u] >> 1;
  }
}

}  // namespace
}  // namespace commhooks
#endif
