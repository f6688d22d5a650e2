// Candidate lists and the exact selection among them.
#ifndef COMMHOOKS_CPU_LISTS_H
#define COMMHOOKS_CPU_LISTS_H

#include <vector>

#include "kernels.h"

namespace commhooks {

struct List {
  const float *values;
  const int32_t *indices;  // may be nullptr where only keys matter
  int64_t size;
  float *spare;  // room for size + kAppendSlack values, where keys are looked for
};

// The `rank`-th largest key over all lists together (rank from 1 to the total size), exact.
// `room` needs kBins counters per list. `threads`: how many may work on long lists.
constexpr int64_t kBins = 2048;
uint32_t kth_largest_key(const std::vector<List> &lists, int64_t rank, uint32_t *room, int threads);

// Writes the k largest to values/indices (k places, the rest padded), puts the others back into residual[index] and
// returns how many were written. `lists` in index order; `whole`: the same candidates in any order, one list per thread.
int64_t emit_largest(const std::vector<List> &whole, const std::vector<List> &lists, int64_t k, uint32_t *room,
                     float *values, int32_t *indices, float *residual);

// Pads places [from, k).
void pad(float *values, int32_t *indices, int64_t from, int64_t k);

}  // namespace commhooks
#endif
