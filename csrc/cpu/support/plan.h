// What a call works on: checked operands, active ranges, and their shares among threads.
#ifndef COMMHOOKS_CPU_PLAN_H
#define COMMHOOKS_CPU_PLAN_H

#include <stddef.h>

#include <vector>

#include "commhooks.h"
#include "simd/kernels.h"
#include "support/pool.h"

namespace commhooks {

struct Range {
  int64_t begin;
  int64_t end;
};

// Whether `fused` and `threads` are acceptable; segment offsets are looked at.
bool valid(const commhooks_fused *fused, int32_t threads);

// The gradient's factor: scale and *scale_ptr, rounded once.
FuseArgs fuse_args(const commhooks_fused &fused);

class Plan {
 public:
  // Finds the active segments and shares them out among at most `wanted` threads. May throw std::bad_alloc.
  Plan(const commhooks_fused &fused, int32_t wanted);

  FuseArgs args;
  std::vector<Range> active;                // ascending, not touching
  std::vector<std::vector<Range>> shares;   // in order; together they are `active`
  int64_t numel = 0;                        // active elements
  int threads = 1;                          // as many as are worth it

  // Appender::dense for a selection of k.
  int32_t dense(int64_t k) const { return k > numel / 250 ? 1 : 0; }

  // Runs f(share, its number, thread) for all shares; those of one thread ascend.
  template <class F>
  void for_shares(F &&f) const {
    parallel(threads, static_cast<int>(shares.size()), [&](int number, int thread) {
      f(shares[static_cast<size_t>(number)], static_cast<size_t>(number), static_cast<size_t>(thread));
    });
  }

 private:
  void find_active(const commhooks_fused &fused);
  void share_out();
};

}  // namespace commhooks
#endif
