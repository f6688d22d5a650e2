// gTop-k's inner step: the k largest of the sum of two index-sorted sparse gradients, in time O(k).
//
// The union is cut into stretches by merge path; they are merged, and the largest elements chosen among them as among
// any candidate lists.
#include <algorithm>
#include <vector>

#include "commhooks_cpu.h"
#include "dispatch.h"
#include "indices.h"
#include "lists.h"
#include "pool.h"
#include "scratch.h"
#include "union.h"

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
    int64_t total = 0;
    for (const List &list : lists_) total += list.size;
    const int64_t kept = std::min(k, total);
    const uint32_t key = kept == 0 ? kMagnitudeBits : total <= k ? 0 : kth_largest_key(lists_, k, bins_, tasks_);
    std::vector<int64_t> above(lists_.size());
    std::vector<int64_t> ties(lists_.size());
    for_all([&](size_t p) { kernels().count(lists_[p].values, lists_[p].size, key, &above[p], &ties[p]); });
    int64_t ties_left = kept;
    for (const int64_t n : above) ties_left -= n;
    std::vector<Emitted> out(lists_.size());
    int64_t written = 0;
    for (size_t p = 0; p < lists_.size(); ++p) {
      // Ties go to the lower index: the earlier stretches have them first.
      ties[p] = std::min(ties[p], ties_left);
      ties_left -= ties[p];
      out[p] = {values + written, indices + written, above[p] + ties[p]};
      written += out[p].size;
    }
    for_all([&](size_t p) { kernels().emit_merged(stretches_[p], key, ties[p], out[p], survivors); });
    return written;
  }

  // Runs f(piece) for all pieces.
  template <class F>
  void for_all(F &&f) {
    parallel(tasks_, pieces_, [&](int p) { f(static_cast<size_t>(p)); });
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
