// The inner loops, written once over a vector type. Included by one file per instruction set, each compiled
// with that set's flags; everything is in an anonymous namespace and free of library templates (kernels.h
// says why).
#ifndef COMMHOOKS_CPU_KERNELS_IMPL_H
#define COMMHOOKS_CPU_KERNELS_IMPL_H

#include "simd/dense_impl.h"
#include "simd/lists_impl.h"
#include "simd/low_bit_impl.h"
#include "simd/merge_impl.h"

namespace commhooks {
namespace {

template <class V>
constexpr Kernels make_kernels(const char *name, void (*stream)(void *, const void *, int64_t),
                               void (*unite_all)(const MergeInput &, Stretch *, int) = unite<V>) {
  return Kernels{name,  fuse<V>, carry,     collect<V>,     all_zero,       sample, key_range, between<V>,
                 count, emit<V>, unite_all, emit_merged<V>, mark_common<V>, stream, ascending, feistel,
                 low_bit_encode<V>, low_bit_decode<V>};
}

}  // namespace
}  // namespace commhooks
#endif
