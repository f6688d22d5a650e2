#include "support/union.h"

#include <algorithm>

namespace commhooks {
namespace {

// A union shorter than this is one stretch.
constexpr int64_t kShort = 256;

// Merge path: how many elements of a and of b are among the first `diagonal` of both. An index that both have
// is never cut in two.
void cut(const MergeInput &in, int64_t size_a, int64_t size_b, int64_t diagonal, int64_t *to_a, int64_t *to_b) {
  int64_t low = std::max<int64_t>(0, diagonal - size_b);
  int64_t high = std::min(diagonal, size_a);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (in.indices_a[middle] <= in.indices_b[diagonal - 1 - middle]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  int64_t other = diagonal - low;
  if (low > 0 && other < size_b && in.indices_a[low - 1] == in.indices_b[other]) ++other;
  *to_a = low;
  *to_b = other;
}

}  // namespace

int pieces_of_union(int64_t total, int tasks) { return total < kShort ? 1 : tasks * kSideBySide; }

std::vector<Stretch> cut_union(const MergeInput &in, int64_t size_a, int64_t size_b, int pieces, float *values,
                               int32_t *indices, uint8_t *tags) {
  std::vector<Stretch> stretches;
  int64_t from_a = 0;
  int64_t from_b = 0;
  for (int p = 0; p < pieces; ++p) {
    int64_t to_a = size_a;
    int64_t to_b = size_b;
    if (p + 1 < pieces) cut(in, size_a, size_b, (size_a + size_b) * (p + 1) / pieces, &to_a, &to_b);
    const int64_t at = from_a + from_b + p * kAppendSlack;
    stretches.push_back({values + at, indices + at, tags + at, from_a, to_a, from_b, to_b, 0});
    from_a = to_a;
    from_b = to_b;
  }
  return stretches;
}

}  // namespace commhooks
