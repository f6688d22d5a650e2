// Takes out what is above a given threshold, at most k of it, in index order beginning cyclically at `start`.
#include <algorithm>
#include <vector>

#include "commhooks_cpu.h"
#include "simd/dispatch.h"
#include "simd/half.h"
#include "support/lists.h"
#include "support/plan.h"
#include "support/scratch.h"

namespace commhooks {
namespace {

class AboveThreshold {
 public:
  AboveThreshold(const commhooks_fused &fused, float threshold, int64_t k, int64_t start, int32_t threads)
      : plan_(fused, threads), k_(k), start_(start), found_(2 * plan_.shares.size()) {
    for (Appender &out : found_) {
      out = Appender{};
      out.floor = bits_of(threshold) & kMagnitudeBits;
      out.dense = plan_.dense(k);
    }
  }

  bool reserve() {
    // Appender 2t: the part of share t from `start` on, which is taken first; 2t + 1: the part before it. No
    // part can give more than k, whatever the others hold.
    size_t bytes = 0;
    for (size_t p = 0; p < found_.size(); ++p) {
      found_[p].capacity = std::min(k_, part_length(p));
      bytes += Scratch::bytes_for<float>(found_[p].capacity + kAppendSlack) * 2;
    }
    Scratch &scratch = Scratch::of_this_thread();
    if (!scratch.reserve(bytes)) return false;
    for (Appender &out : found_) {
      out.values = scratch.take<float>(out.capacity + kAppendSlack);
      out.indices = scratch.take<int32_t>(out.capacity + kAppendSlack);
    }
    return true;
  }

  void run(float *values, int32_t *indices, commhooks_report *report) {
    plan_.carry_inactive();
    plan_.for_shares([&](const Ranges &share, size_t at, size_t) {
      for (const Range &range : share) {
        for (size_t part = 0; part < 2; ++part) {
          const Range piece = cut(range, part);
          if (piece.begin >= piece.end) continue;
          kernels().fuse(plan_.args_of(range), piece.begin, piece.end, true, found_[2 * at + part]);
        }
      }
    });
    std::vector<int64_t> taken(found_.size());
    int64_t left = k_;
    for (size_t part = 0; part < 2; ++part) {
      for (size_t p = part; p < found_.size(); p += 2) {
        taken[p] = std::min(left, found_[p].count);
        left -= taken[p];
      }
    }
    int64_t written = 0;
    // Sorted by index: the parts before `start` come first.
    for (size_t part = 2; part-- > 0;) {
      for (size_t p = part; p < found_.size(); p += 2) {
        const Appender &out = found_[p];
        std::copy_n(out.values, taken[p], values + written);
        std::copy_n(out.indices, taken[p], indices + written);
        written += taken[p];
        for (int64_t j = taken[p]; j < out.count; ++j) plan_.args.residual_out[out.indices[j]] = out.values[j];
      }
    }
    pad(values, indices, written, k_);
    report->count = written;
    report->inactive = plan_.inactive();
    for (const Appender &out : found_) report->nonfinite += out.nonfinite;
  }

 private:
  Range cut(const Range &range, size_t part) const {
    if (part == 0) return {std::max(range.begin, start_), range.end};
    return {range.begin, std::min(range.end, start_)};
  }

  int64_t part_length(size_t p) const {
    int64_t length = 0;
    for (const Range &range : plan_.shares[p / 2]) {
      const Range piece = cut(range, p % 2);
      length += std::max<int64_t>(piece.end - piece.begin, 0);
    }
    return length;
  }

  Plan plan_;
  int64_t k_;
  int64_t start_;
  std::vector<Appender> found_;
};

}  // namespace
}  // namespace commhooks

extern "C" int32_t commhooks_cpu_select_threshold(const commhooks_fused *fused, float threshold, int64_t k,
                                                  int64_t start, int32_t threads, float *values, int32_t *indices,
                                                  commhooks_report *report) {
  using namespace commhooks;
  if (!valid(fused, threads) || k < 0 || k > fused->numel || report == nullptr) return COMMHOOKS_INVALID;
  if (k > 0 && (values == nullptr || indices == nullptr)) return COMMHOOKS_INVALID;
  if (!(threshold >= 0.0f) || start < 0 || start >= std::max<int64_t>(fused->numel, 1)) return COMMHOOKS_INVALID;
  try {
    AboveThreshold call(*fused, threshold, k, start, threads);
    if (!call.reserve()) return COMMHOOKS_NO_MEMORY;
    *report = commhooks_report{};
    call.run(values, indices, report);
  } catch (...) {
    return COMMHOOKS_NO_MEMORY;
  }
  return COMMHOOKS_OK;
}
