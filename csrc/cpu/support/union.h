// The union of two index-sorted lists, cut into stretches that are merged side by side.
#ifndef COMMHOOKS_CPU_UNION_H
#define COMMHOOKS_CPU_UNION_H

#include <vector>

#include "simd/kernels.h"

namespace commhooks {

// How many stretches `total` pairs are cut into: one when they are few, else enough for `tasks` threads.
int pieces_of_union(int64_t total, int tasks);

// Cuts by merge path into stretches of about equal input. The elements go to values, indices and tags, which
// have room for size_a + size_b + pieces * kAppendSlack each; Kernels::unite puts them there.
std::vector<Stretch> cut_union(const MergeInput &in, int64_t size_a, int64_t size_b, int pieces, float *values,
                               int32_t *indices, uint8_t *tags);

}  // namespace commhooks
#endif
