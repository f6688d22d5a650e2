// Random-k's selection: the fused pass, and a gather under a given mask while the block is in cache.
#include <algorithm>
#include <vector>

#include "commhooks_cpu.h"
#include "simd/dispatch.h"
#include "support/indices.h"
#include "support/plan.h"

namespace commhooks {
namespace {

constexpr int64_t kBlock = 8192;

void select_range(const FuseArgs &args, const Range &range, const int32_t *indices, int64_t used, float *values,
                  Appender &out) {
  int64_t j = std::lower_bound(indices, indices + used, range.begin) - indices;
  for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
    const int64_t end = std::min(range.end, begin + kBlock);
    kernels().fuse(args, begin, end, false, out);
    for (; j < used && indices[j] < end; ++j) {
      values[j] = args.residual_out[indices[j]];
      args.residual_out[indices[j]] = 0.0f;
    }
  }
}

}  // namespace
}  // namespace commhooks

extern "C" int32_t commhooks_cpu_select_indices(const commhooks_fused *fused, const int32_t *indices, int64_t k,
                                                int32_t threads, float *values, commhooks_report *report) {
  using namespace commhooks;
  if (!valid(fused, threads) || report == nullptr || !valid_indices(indices, k, fused->numel)) return COMMHOOKS_INVALID;
  if (k > 0 && values == nullptr) return COMMHOOKS_INVALID;
  try {
    const Plan plan(*fused, threads);
    const int64_t used = used_indices(indices, k);
    std::vector<Appender> counts(plan.shares.size());
    *report = commhooks_report{};
    std::fill(values, values + k, 0.0f);
    plan.carry_inactive();
    plan.for_shares([&](const Ranges &share, size_t at, size_t) {
      Appender out{};
      for (const Range &range : share) select_range(plan.args_of(range), range, indices, used, values, out);
      counts[at] = out;
    });
    report->count = used;
    report->inactive = plan.inactive();
    for (const Appender &out : counts) report->nonfinite += out.nonfinite;
  } catch (...) {
    return COMMHOOKS_NO_MEMORY;
  }
  return COMMHOOKS_OK;
}
