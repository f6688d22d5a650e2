// Guessing a threshold from a sample of the corrected gradient.
#ifndef COMMHOOKS_CPU_SAMPLE_H
#define COMMHOOKS_CPU_SAMPLE_H

#include <vector>

#include "support/lists.h"
#include "support/plan.h"

namespace commhooks {

// Elements that are read at neighbouring places: a cache line. Longer pieces would be cheaper per element,
// but gradients are clustered (whole rows of a weight are large together), and then a piece counts for little
// more than one element.
constexpr int64_t kPiece = 16;

struct Guess {
  int64_t samples;   // a multiple of kPiece
  int64_t rank;      // the guess is the rank-th largest of the sample
  int64_t capacity;  // room for candidates that the guess is given
};

// For the k largest of `numel`, 0 < k <= numel / 8; `effort` multiplies the sample.
Guess plan_guess(int64_t numel, int64_t k, int64_t effort);

// Samples the corrected gradient over plan.active and returns a key such that more than k elements have at
// least this key, by a margin of 8 standard deviations. `passed`: whether the pass is over, so that the new
// residual holds the corrected gradient. Each task has a room of 2 * (samples_per_task + kAppendSlack)
// floats.
uint32_t guess_key(const Plan &plan, bool passed, const Guess &guess, uint64_t seed,
                   const std::vector<float *> &rooms, uint32_t *bins);

// The share of `samples` that one of `tasks` tasks draws at most.
int64_t samples_per_task(int64_t samples, int64_t tasks);

}  // namespace commhooks
#endif
