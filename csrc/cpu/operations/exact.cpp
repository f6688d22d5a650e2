#include "operations/exact.h"

#include <algorithm>

#include "simd/dispatch.h"
#include "simd/half.h"
#include "support/lists.h"

namespace commhooks {
namespace {

// Counts the digits (key >> shift) & mask of keys that begin with `prefix` above them, beside what `bins`
// holds.
void histogram(const Ranges &share, const float *corrected, int shift, int width, uint32_t prefix,
               uint32_t *bins) {
  const uint32_t mask = (1u << width) - 1u;
  for (const Range &range : share) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const uint32_t digits = (bits_of(corrected[i]) & kMagnitudeBits) >> shift;
      if (digits >> width == prefix) ++bins[digits & mask];
    }
  }
}

}  // namespace

Threshold find_threshold(const Plan &plan, const float *corrected, int64_t k, uint32_t *bins) {
  int64_t rank = k;
  uint32_t prefix = 0;
  // 31 bits of magnitude: 11 + 11 + 9.
  const int shifts[3] = {20, 9, 0};
  const int widths[3] = {11, 11, 9};
  for (int level = 0; level < 3; ++level) {
    std::fill(bins, bins + plan.threads * kBins, 0u);
    plan.for_shares([&](const Ranges &share, size_t, size_t thread) {
      histogram(share, corrected, shifts[level], widths[level], prefix, bins + static_cast<int64_t>(thread) * kBins);
    });
    uint32_t digit = (1u << widths[level]) - 1u;
    for (; digit > 0; --digit) {
      int64_t here = 0;
      for (int t = 0; t < plan.threads; ++t) here += bins[t * kBins + digit];
      if (rank <= here) break;
      rank -= here;
    }
    prefix = prefix << widths[level] | digit;
  }
  Threshold found;
  found.key = prefix;
  found.above.resize(plan.shares.size());
  found.equal.resize(plan.shares.size());
  plan.for_shares([&](const Ranges &share, size_t at, size_t) {
    for (const Range &range : share) {
      int64_t above = 0;
      int64_t equal = 0;
      kernels().count(corrected + range.begin, range.end - range.begin, found.key, &above, &equal);
      found.above[at] += above;
      found.equal[at] += equal;
    }
  });
  int64_t ties = found.key == 0 ? 0 : k;
  for (const int64_t n : found.above) {
    if (found.key != 0) ties -= n;
    found.total += n;
  }
  for (int64_t &n : found.equal) {
    n = std::min(n, ties);
    ties -= n;
    found.total += n;
  }
  return found;
}

void take_out(const Plan &plan, const Threshold &threshold, float *residual, float *values, int32_t *indices) {
  std::vector<int64_t> offsets(plan.shares.size());
  for (size_t t = 1; t < offsets.size(); ++t) {
    offsets[t] = offsets[t - 1] + threshold.above[t - 1] + threshold.equal[t - 1];
  }
  plan.for_shares([&](const Ranges &share, size_t at, size_t) {
    int64_t place = offsets[at];
    int64_t ties = threshold.equal[at];
    for (const Range &range : share) {
      for (int64_t i = range.begin; i < range.end; ++i) {
        const uint32_t key = bits_of(residual[i]) & kMagnitudeBits;
        if (key < threshold.key || (key == threshold.key && ties-- <= 0)) continue;
        values[place] = residual[i];
        indices[place++] = static_cast<int32_t>(i);
        residual[i] = 0.0f;
      }
    }
  });
}

}  // namespace commhooks
