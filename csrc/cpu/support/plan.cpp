#include "support/plan.h"

#include <algorithm>

#include "simd/dispatch.h"

namespace commhooks {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;

}  // namespace

bool valid(const commhooks_fused *fused, int32_t threads) {
  if (fused == nullptr || threads < 1 || fused->numel < 0 || fused->numel >= COMMHOOKS_PAD) return false;
  if (fused->grad_dtype < COMMHOOKS_F32 || fused->grad_dtype > COMMHOOKS_F16) return false;
  if (fused->numel > 0 && (fused->grad == nullptr || fused->residual == nullptr)) return false;
  if (fused->segment_offsets == nullptr) return true;
  const int64_t *offsets = fused->segment_offsets;
  if (fused->num_segments < 1 || offsets[0] != 0 || offsets[fused->num_segments] != fused->numel) return false;
  return std::is_sorted(offsets, offsets + fused->num_segments + 1);
}

FuseArgs fuse_args(const commhooks_fused &fused) {
  const float factor = fused.scale_ptr != nullptr ? fused.scale * *fused.scale_ptr : fused.scale;
  return FuseArgs{fused.grad, fused.residual, fused.velocity, factor, fused.momentum, fused.grad_dtype};
}

Plan::Plan(const commhooks_fused &fused, int32_t wanted) : args(fuse_args(fused)) {
  find_active(fused);
  for (const Range &range : active) numel += range.end - range.begin;
  threads = static_cast<int>(std::clamp<int64_t>(numel / kElementsPerThread, 1, wanted));
  share_out();
}

void Plan::find_active(const commhooks_fused &fused) {
  if (fused.segment_offsets == nullptr) {
    if (fused.numel > 0) active.push_back({0, fused.numel});
    return;
  }
  for (int32_t s = 0; s < fused.num_segments; ++s) {
    const int64_t begin = fused.segment_offsets[s];
    const int64_t end = fused.segment_offsets[s + 1];
    // Stops at the first nonzero: a live gradient costs one cache line here.
    if (begin == end || kernels().all_zero(fused.grad, fused.grad_dtype, begin, end)) continue;
    if (!active.empty() && active.back().end == begin) {
      active.back().end = end;
    } else {
      active.push_back({begin, end});
    }
  }
}

void Plan::share_out() {
  const int64_t count = share_count(numel, threads);
  shares.resize(static_cast<size_t>(count));
  size_t range = 0;
  int64_t from = active.empty() ? 0 : active[0].begin;
  int64_t done = 0;
  for (int64_t s = 0; s < count; ++s) {
    // Shares end at multiples of 64 elements, whole cache lines of every array.
    int64_t left = (s + 1 == count ? numel : (numel * (s + 1) / count) & ~int64_t{63}) - done;
    done += left;
    while (left > 0) {
      const int64_t taken = std::min(left, active[range].end - from);
      shares[static_cast<size_t>(s)].push_back({from, from + taken});
      left -= taken;
      from += taken;
      if (from == active[range].end && ++range < active.size()) from = active[range].begin;
    }
  }
}

}  // namespace commhooks
