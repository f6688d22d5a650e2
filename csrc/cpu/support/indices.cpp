#include "support/indices.h"

#include <algorithm>

#include "commhooks_cpu.h"
#include "simd/dispatch.h"

namespace commhooks {

bool valid_indices(const int32_t *indices, int64_t k, int64_t numel) {
  if (k < 0 || (k > 0 && indices == nullptr)) return false;
  if (!kernels().ascending(indices, k)) return false;
  const int64_t used = used_indices(indices, k);
  return used == 0 || indices[used - 1] < numel;
}

int64_t used_indices(const int32_t *indices, int64_t k) {
  return std::lower_bound(indices, indices + k, COMMHOOKS_PAD) - indices;
}

}  // namespace commhooks

extern "C" int64_t commhooks_cpu_check_indices(const int32_t *indices, int64_t k, int64_t numel) {
  if (commhooks::valid_indices(indices, k, numel)) return -1;
  for (int64_t j = 0; j < k; ++j) {
    const bool padding = indices[j] == COMMHOOKS_PAD;
    if (indices[j] < 0 || (!padding && indices[j] >= numel)) return j;
    if (j > 0 && !padding && indices[j] <= indices[j - 1]) return j;
  }
  return 0;
}
