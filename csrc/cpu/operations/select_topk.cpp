// Exact top-k in one pass over memory, by guess and verify.
//
// A sample gives a key that more than k elements reach, with a wide margin. One pass corrects and takes
// out every element that reaches it. When at least k did, the k largest are among them, and selecting those
// is cheap. A guess fails when there are too few elements, or more than there is room for. It costs a second
// sample and a pass over the new residual. A second failure costs three histogram passes. The result is exact
// every time.
#include <algorithm>
#include <vector>

#include "commhooks_cpu.h"
#include "operations/exact.h"
#include "operations/sample.h"
#include "simd/dispatch.h"
#include "support/lists.h"
#include "support/plan.h"
#include "support/scratch.h"

namespace commhooks {
namespace {

// With fewer elements than this all nonzero ones are candidates.
constexpr int64_t kSmall = 4096;

class TopK {
 public:
  TopK(const commhooks_fused &fused, int64_t k, uint64_t seed, int32_t threads)
      : plan_(fused, threads), k_(std::min(k, plan_.numel)), seed_(seed), lists_(plan_.shares.size()) {
    if (plan_.numel <= kSmall) {
      guess_ = {0, 0, plan_.numel};
    } else if (k_ <= plan_.numel / 8) {
      guess_ = plan_guess(plan_.numel, k_ == 0 ? 1 : k_, 1);
      second_ = plan_guess(plan_.numel, k_ == 0 ? 1 : k_, 4);
    }
  }

  // Lays out scratch memory; false when there is none.
  bool reserve() {
    const int64_t samples = samples_per_task(std::max(guess_.samples, second_.samples), plan_.threads) + kAppendSlack;
    // Any thread may get to all candidates. What it does not write to costs no memory.
    const int64_t capacity = std::max(guess_.capacity, second_.capacity);
    const int64_t room = capacity + 2 * kAppendSlack;
    const size_t bytes = Scratch::bytes_for<uint32_t>(kBins) + 2 * Scratch::bytes_for<float>(room) +
                         Scratch::bytes_for<int32_t>(room) + Scratch::bytes_for<float>(2 * samples);
    Scratch &scratch = Scratch::of_this_thread();
    if (!scratch.reserve(static_cast<size_t>(plan_.threads) * bytes)) return false;
    bins_ = scratch.take<uint32_t>(plan_.threads * kBins);
    for (int t = 0; t < plan_.threads; ++t) {
      Appender out{};
      out.values = scratch.take<float>(room);
      out.indices = scratch.take<int32_t>(room);
      out.capacity = capacity;
      candidates_.push_back(out);
      spares_.push_back(scratch.take<float>(room));
      samples_.push_back(scratch.take<float>(2 * samples));
    }
    return true;
  }

  void run(float *values, int32_t *indices, int64_t places, commhooks_report *report) {
    int64_t written = 0;
    int64_t misses = 0;
    plan_.carry_inactive();
    if (k_ == 0 || guess_.capacity == 0) {
      fuse(false, kMagnitudeBits);
      if (k_ > 0) written = exact(values, indices);
    } else {
      const uint32_t key = guess_.samples > 0 ? guess_key(plan_, false, guess_, seed_, samples_, bins_) : 1;
      fuse(true, std::max(key, 1u) - 1);
      if (!verified() && ++misses != 0) collect_again();
      if (!verified() && ++misses != 0) {
        put_back();
        written = exact(values, indices);
      } else {
        written = emit_largest(candidates(), lists_, k_, bins_, values, indices, plan_.args.residual_out);
      }
    }
    pad(values, indices, written, places);
    report->count = written;
    report->misses = misses;
    report->inactive = plan_.inactive();
    for (const Appender &out : candidates_) report->nonfinite += out.nonfinite;
  }

 private:
  // Takes the candidates of all shares by `pass(range, appender)`; lists_ then has those of each share.
  template <class Pass>
  void take(uint32_t floor, Pass pass) {
    floor_ = floor;
    plan_.for_shares([&](const Ranges &share, size_t number, size_t thread) {
      Appender out = candidates_[thread];
      out.floor = floor;
      out.dense = plan_.dense(k_);
      const int64_t before = out.count;
      for (const Range &range : share) pass(range, out);
      lists_[number] = {out.values + before, out.indices + before, out.count - before, nullptr};
      candidates_[thread] = out;
    });
  }

  void fuse(bool append, uint32_t floor) {
    take(floor, [&](const Range &range, Appender &out) {
      kernels().fuse(plan_.args_of(range), range.begin, range.end, append, out);
    });
  }

  bool verified() const {
    int64_t total = 0;
    for (const Appender &out : candidates_) {
      if (out.overflow != 0) return false;
      total += out.count;
    }
    return total >= k_ || floor_ == 0;
  }

  // Undoes the taking out: the residual holds the whole corrected gradient again.
  void put_back() {
    parallel(plan_.threads, plan_.threads, [&](int t) {
      Appender &out = candidates_[static_cast<size_t>(t)];
      for (int64_t j = 0; j < out.count; ++j) plan_.args.residual_out[out.indices[j]] = out.values[j];
      out.count = 0;
      out.overflow = 0;
    });
  }

  // The second guess, from a larger sample of the new residual, which holds the corrected gradient by now.
  void collect_again() {
    put_back();
    const uint32_t key = guess_key(plan_, true, second_, ~seed_, samples_, bins_);
    take(std::max(key, 1u) - 1, [&](const Range &range, Appender &out) {
      kernels().collect(plan_.args.residual_out, range.begin, range.end, out);
    });
  }

  int64_t exact(float *values, int32_t *indices) {
    const Threshold threshold = find_threshold(plan_, plan_.args.residual_out, k_, bins_);
    take_out(plan_, threshold, plan_.args.residual_out, values, indices);
    return threshold.total;
  }

  // All candidates, those of a thread together.
  std::vector<List> candidates() const {
    std::vector<List> result;
    for (size_t t = 0; t < candidates_.size(); ++t) {
      result.push_back({candidates_[t].values, candidates_[t].indices, candidates_[t].count, spares_[t]});
    }
    return result;
  }

  Plan plan_;
  int64_t k_;
  uint64_t seed_;
  Guess guess_{0, 0, 0};
  Guess second_{0, 0, 0};
  uint32_t floor_ = 0;
  uint32_t *bins_ = nullptr;
  std::vector<Appender> candidates_;  // one per thread
  std::vector<float *> spares_;
  std::vector<float *> samples_;
  std::vector<List> lists_;  // one per share: views of candidates_
};

}  // namespace
}  // namespace commhooks

extern "C" int32_t commhooks_cpu_select_topk(const commhooks_fused *fused, int64_t k, uint64_t seed, int32_t threads,
                                             float *values, int32_t *indices, commhooks_report *report) {
  using namespace commhooks;
  if (!valid(fused, threads) || k < 0 || k > fused->numel || report == nullptr) return COMMHOOKS_INVALID;
  if (k > 0 && (values == nullptr || indices == nullptr)) return COMMHOOKS_INVALID;
  try {
    TopK call(*fused, k, seed, threads);
    if (!call.reserve()) return COMMHOOKS_NO_MEMORY;
    *report = commhooks_report{};
    call.run(values, indices, k, report);
  } catch (...) {
    return COMMHOOKS_NO_MEMORY;
  }
  return COMMHOOKS_OK;
}
