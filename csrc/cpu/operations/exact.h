// Exact selection without a guess: histograms of the keys. The way out when guesses fail, and for large
// densities.
#ifndef COMMHOOKS_CPU_EXACT_H
#define COMMHOOKS_CPU_EXACT_H

#include "support/plan.h"

namespace commhooks {

struct Threshold {
  uint32_t key;                // the k-th largest key, or 0 when there are fewer nonzero elements than k
  std::vector<int64_t> above;  // per share: elements with a larger key
  std::vector<int64_t> equal;  // per share: elements with this key that are taken (the lowest indices)
  int64_t total = 0;           // all that are taken
};

// Finds the threshold over corrected values in three histogram passes. `bins`: kBins counters per thread.
Threshold find_threshold(const Plan &plan, const float *corrected, int64_t k, uint32_t *bins);

// Takes out what `threshold` says: writes threshold.total pairs and zeroes them in `residual`.
void take_out(const Plan &plan, const Threshold &threshold, float *residual, float *values, int32_t *indices);

}  // namespace commhooks
#endif
