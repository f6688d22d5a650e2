// What a call works on: checked operands, active ranges, and their shares among threads.
#ifndef COMMHOOKS_CPU_PLAN_H
#define COMMHOOKS_CPU_PLAN_H

#include <stddef.h>

#include <vector>

#include "commhooks.h"
#include "simd/kernels.h"
#include "support/fence.h"
#include "support/pool.h"

namespace commhooks {

struct Range {
  int64_t begin;
  int64_t end;
  float rescale = 1.0f;  // factor of the residual
};

using Ranges = std::vector<Range>;

// Outputs of at least this size are written with streaming stores. Smaller ones stay in the cache, where the
// next reader wants them.
constexpr int64_t kStreamBytes = 4 << 20;

// Whether `fused` and `threads` are acceptable; segment offsets are looked at.
bool valid(const commhooks_fused *fused, int32_t threads);

class Plan {
 public:
  // Finds the active segments, writes their flags where these are wanted, and shares the segments out among
  // at most `wanted` threads. With `all_active` no gradient is looked at. May throw std::bad_alloc.
  Plan(const commhooks_fused &fused, int32_t wanted, bool all_active = false);

  FuseArgs args;               // rescale is 1: ranges hold the factor
  Ranges active;               // ascending; neighbours with one factor are one range
  std::vector<Ranges> shares;  // in order; together they are `active`
  int64_t numel = 0;           // active elements
  int threads = 1;             // as many as are worth it

  // Operands of a range.
  FuseArgs args_of(const Range &range) const {
    FuseArgs result = args;
    result.rescale = range.rescale;
    return result;
  }

  // Appender::dense for a selection of k.
  int32_t dense(int64_t k) const { return k > numel / 250 ? 1 : 0; }

  // Runs f(share, its number, thread) for all shares; those of one thread ascend. Streaming stores are
  // visible afterwards.
  template <class F>
  void for_shares(F &&f) const {
    parallel(threads, static_cast<int>(shares.size()), [&](int number, int thread) {
      f(shares[static_cast<size_t>(number)], static_cast<size_t>(number), static_cast<size_t>(thread));
      finish_streams();
    });
  }

  // Carries the inactive segments over to the outputs. The pass calls it once.
  void carry_inactive() const;

  // Elements of the inactive segments.
  int64_t inactive() const { return inactive_numel_; }

 private:
  void find_active(const commhooks_fused &fused, bool all_active);

  Ranges inactive_;
  int64_t inactive_numel_ = 0;
};

}  // namespace commhooks
#endif
