// What a call works on: checked operands, active ranges, and each task's share of them.
#ifndef COMMHOOKS_CPU_PLAN_H
#define COMMHOOKS_CPU_PLAN_H

#include <vector>

#include "commhooks.h"
#include "kernels.h"

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
  // Finds the active segments. May throw std::bad_alloc.
  Plan(const commhooks_fused &fused, int32_t threads);

  FuseArgs args;
  std::vector<Range> active;                // ascending, not touching
  std::vector<std::vector<Range>> shares;   // one per task, in order; together they are `active`
  int64_t numel = 0;                        // active elements
  int tasks() const { return static_cast<int>(shares.size()); }
  bool all_active(int64_t total) const { return numel == total; }

 private:
  void find_active(const commhooks_fused &fused);
  void share_out(int32_t threads);
};

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerTask = 32768;

}  // namespace commhooks
#endif
