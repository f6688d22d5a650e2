// gTop-k's inner step: the k largest of the sum of two index-sorted sparse gradients, in time O(k).
//
// The union is cut into stretches by merge path; they are merged, and the largest elements chosen among them
// as among any candidate lists.
#include <algorithm>
#include <vector>

#include "commhooks_cpu.h"
#include "simd/dispatch.h"
#include "support/indices.h"
#include "support/lists.h"
#include "support/pool.h"
#include "support/scratch.h"
#include "support/union.h"

namespace commhooks {
namespace {

// With fewer pairs than this a second thread costs more than it saves.
constexpr int64_t kPairsPerTask = 16384;

class Merge {
 public:
  Merge(const MergeInput &in, int64_t size_a, int64_t size_b, int32_t threads)
      : in_(in), size_a_(size_a), size_b_(size_b) {
    const int64_t total = size_a + size_b;
    tasks_ = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, total / kPairsPerTask)));
    pieces_ = pieces_of_union(total, tasks_);
  }

  bool reserve() {
    const int64_t room = size_a_ + size_b_ + pieces_ * kAppendSlack;
    Scratch &scratch = Scratch::of_this_thread();
    if (!scratch.reserve(Scratch::bytes_for<uint8_t>(room) + 3 * Scratch::bytes_for<float>(room) +
                         Scratch::bytes_for<uint32_t>(pieces_ * kBins))) {
      return false;
    }
    tags_ = scratch.take<uint8_t>(room);
    values_ = scratch.take<float>(room);
    indices_ = scratch.take<int32_t>(room);
    spare_ = scratch.take<float>(room);
    bins_ = scratch.take<uint32_t>(pieces_ * kBins);
    return true;
  }

  int64_t run(int64_t k, float *values, int32_t *indices, Survivors survivors) {
    unite();
    return emit(k, values, indices, survivors);
  }

 private:
  void unite() {
    stretches_ = cut_union(in_, size_a_, size_b_, pieces_, values_, indices_, tags_);
    parallel(tasks_, tasks_, [&](int t) {
      kernels().unite(in_, stretches_.data() + t * kSideBySide, std::min(pieces_, kSideBySide));
    });
    for (const Stretch &s : stretches_) {
      lists_.push_back({s.values, s.indices, s.size, spare_ + (s.values - values_)});
    }
  }

  int64_t emit(int64_t k, float *values, int32_t *indices, Survivors survivors) {
    const Winners winners = find_winners(lists_, lists_, k, bins_, tasks_, values, indices);
    parallel(tasks_, pieces_, [&](int p) {
      const size_t at = static_cast<size_t>(p);
      kernels().emit_merged(stretches_[at], winners.key, winners.ties[at], winners.out[at], survivors);
    });
    return winners.total;
  }

  MergeInput in_;
  int tasks_ = 1;
  int pieces_ = 1;
  int64_t size_a_;
  int64_t size_b_;
  uint8_t *tags_ = nullptr;
  float *values_ = nullptr;
  int32_t *indices_ = nullptr;
  float *spare_ = nullptr;
  uint32_t *bins_ = nullptr;
  std::vector<Stretch> stretches_;
  std::vector<List> lists_;
};

}  // namespace
}  // namespace commhooks

extern "C" int32_t commhooks_cpu_merge_topk(const float *values_a, const int32_t *indices_a, int64_t size_a,
                                            const float *values_b, const int32_t *indices_b, int64_t size_b, int64_t k,
                                            int32_t threads, float *values, int32_t *indices, uint8_t *survives_a,
                                            uint8_t *survives_b) {
  using namespace commhooks;
  if (!valid_indices(indices_a, size_a, COMMHOOKS_PAD) || !valid_indices(indices_b, size_b, COMMHOOKS_PAD)) {
    return COMMHOOKS_INVALID;
  }
  if (threads < 1 || k < 0 || (k > 0 && (values == nullptr || indices == nullptr))) return COMMHOOKS_INVALID;
  if ((size_a > 0 && (values_a == nullptr || survives_a == nullptr)) ||
      (size_b > 0 && (values_b == nullptr || survives_b == nullptr))) {
    return COMMHOOKS_INVALID;
  }
  try {
    const int64_t used_a = used_indices(indices_a, size_a);
    const int64_t used_b = used_indices(indices_b, size_b);
    Merge call({values_a, indices_a, values_b, indices_b}, used_a, used_b, threads);
    if (!call.reserve()) return COMMHOOKS_NO_MEMORY;
    const int64_t written = call.run(k, values, indices, {survives_a, survives_b});
    pad(values, indices, written, k);
    std::fill(survives_a + used_a, survives_a + size_a, uint8_t{0});
    std::fill(survives_b + used_b, survives_b + size_b, uint8_t{0});
  } catch (...) {
    return COMMHOOKS_NO_MEMORY;
  }
  return COMMHOOKS_OK;
}
