// Candidate lists and the exact selection among them.
#ifndef COMMHOOKS_CPU_LISTS_H
#define COMMHOOKS_CPU_LISTS_H

#include <vector>

#include "simd/kernels.h"

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

// The k largest among some lists: which they are, and where those of each list go in an output ordered by
// list.
struct Winners {
  uint32_t key = 0;           // a candidate wins when its key is larger,
  std::vector<int64_t> ties;  // or equal, for the first ties[i] such candidates of list i
  std::vector<Emitted> out;   // room for the winners of list i
  int64_t total = 0;          // all winners: k, or fewer when there are fewer candidates
};

// Finds the k largest. The winners of `lists`, which come in index order, go to values and indices. `whole`
// holds the same candidates in any order, one list for each thread.
Winners find_winners(const std::vector<List> &whole, const std::vector<List> &lists, int64_t k, uint32_t *room,
                     int threads, float *values, int32_t *indices);

// Writes the k largest to values and indices (k places, the rest padded), puts the others back into
// residual[index] and returns how many were written. `whole` and `lists`: see find_winners.
int64_t emit_largest(const std::vector<List> &whole, const std::vector<List> &lists, int64_t k, uint32_t *room,
                     float *values, int32_t *indices, float *residual);

// Pads places [from, k).
void pad(float *values, int32_t *indices, int64_t from, int64_t k);

}  // namespace commhooks
#endif
