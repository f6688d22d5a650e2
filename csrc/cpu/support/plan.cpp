#include "support/plan.h"

#include <algorithm>
#include <string.h>

#include "simd/dispatch.h"

namespace commhooks {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;

// The gradient's factor is rounded once.
FuseArgs fuse_args(const commhooks_fused &fused) {
  FuseArgs args{};
  args.grad = fused.grad;
  args.residual = fused.residual;
  args.velocity = fused.velocity;
  args.residual_out = fused.residual_out != nullptr ? fused.residual_out : fused.residual;
  args.velocity_out = fused.velocity_out != nullptr ? fused.velocity_out : fused.velocity;
  args.factor = fused.scale_ptr != nullptr ? fused.scale * *fused.scale_ptr : fused.scale;
  args.momentum = fused.momentum;
  args.rescale = 1.0f;
  args.dtype = fused.grad_dtype;
  args.stream = fused.numel * static_cast<int64_t>(sizeof(float)) >= kStreamBytes ? 1 : 0;
  return args;
}

bool same_bits(float a, float b) { return memcmp(&a, &b, sizeof a) == 0; }

void append(Ranges &ranges, const Range &next) {
  if (!ranges.empty() && ranges.back().end == next.begin && same_bits(ranges.back().rescale, next.rescale)) {
    ranges.back().end = next.end;
  } else {
    ranges.push_back(next);
  }
}

int64_t length(const Ranges &ranges) {
  int64_t total = 0;
  for (const Range &range : ranges) total += range.end - range.begin;
  return total;
}

// Cuts `ranges` into `count` shares of about equal length, in order.
std::vector<Ranges> share_out(const Ranges &ranges, int64_t count) {
  const int64_t numel = length(ranges);
  std::vector<Ranges> shares(static_cast<size_t>(count));
  size_t range = 0;
  int64_t from = ranges.empty() ? 0 : ranges[0].begin;
  int64_t done = 0;
  for (int64_t s = 0; s < count; ++s) {
    // Shares end at multiples of 64 elements, whole cache lines of every array.
    int64_t left = (s + 1 == count ? numel : (numel * (s + 1) / count) & ~int64_t{63}) - done;
    done += left;
    while (left > 0) {
      const int64_t taken = std::min(left, ranges[range].end - from);
      shares[static_cast<size_t>(s)].push_back({from, from + taken, ranges[range].rescale});
      left -= taken;
      from += taken;
      if (from == ranges[range].end && ++range < ranges.size()) from = ranges[range].begin;
    }
  }
  return shares;
}

int threads_for(int64_t numel, int32_t wanted) {
  return static_cast<int>(std::clamp<int64_t>(numel / kElementsPerThread, 1, wanted));
}

}  // namespace

bool valid(const commhooks_fused *fused, int32_t threads) {
  if (fused == nullptr || threads < 1 || fused->numel < 0 || fused->numel >= COMMHOOKS_PAD) return false;
  if (fused->grad_dtype < COMMHOOKS_F32 || fused->grad_dtype > COMMHOOKS_F16) return false;
  if (fused->numel > 0 && (fused->grad == nullptr || fused->residual == nullptr)) return false;
  if (fused->velocity_out != nullptr && fused->velocity == nullptr) return false;
  if (fused->segment_offsets == nullptr) return true;
  const int64_t *offsets = fused->segment_offsets;
  if (fused->num_segments < 1 || offsets[0] != 0 || offsets[fused->num_segments] != fused->numel) return false;
  return std::is_sorted(offsets, offsets + fused->num_segments + 1);
}

Plan::Plan(const commhooks_fused &fused, int32_t wanted, bool all_active) : args(fuse_args(fused)) {
  find_active(fused, all_active);
  numel = length(active);
  inactive_numel_ = length(inactive_);
  threads = threads_for(numel, wanted);
  shares = share_out(active, share_count(numel, threads));
}

void Plan::find_active(const commhooks_fused &fused, bool all_active) {
  if (fused.segment_offsets == nullptr) {
    if (fused.numel > 0) active.push_back({0, fused.numel, fused.rescale != nullptr ? fused.rescale[0] : 1.0f});
    return;
  }
  for (int32_t s = 0; s < fused.num_segments; ++s) {
    const int64_t begin = fused.segment_offsets[s];
    const int64_t end = fused.segment_offsets[s + 1];
    // The look stops at the first nonzero: a gradient that is not zero costs one cache line here.
    const bool is_active =
        begin != end && (all_active || !kernels().all_zero(fused.grad, fused.grad_dtype, begin, end));
    if (fused.active != nullptr) fused.active[s] = is_active ? 1 : 0;
    if (begin == end) continue;
    append(is_active ? active : inactive_, {begin, end, fused.rescale != nullptr ? fused.rescale[s] : 1.0f});
  }
}

void Plan::carry_inactive() const {
  const bool in_place = args.residual_out == args.residual && args.velocity_out == args.velocity;
  Ranges left;
  for (const Range &range : inactive_) {
    if (!in_place || !same_bits(range.rescale, 1.0f)) left.push_back(range);
  }
  if (left.empty()) return;
  const int used = threads_for(length(left), threads);
  const std::vector<Ranges> parts = share_out(left, share_count(length(left), used));
  parallel(used, static_cast<int>(parts.size()), [&](int i) {
    for (const Range &range : parts[static_cast<size_t>(i)]) {
      kernels().carry(args_of(range), range.begin, range.end);
    }
  });
}

}  // namespace commhooks
