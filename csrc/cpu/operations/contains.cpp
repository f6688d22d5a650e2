// Which indices of one ascending list are in another: what is left of a gTop-k contribution after later
// rounds.
#include <algorithm>

#include "commhooks_cpu.h"
#include "simd/dispatch.h"
#include "support/indices.h"
#include "support/scratch.h"
#include "support/union.h"

extern "C" int32_t commhooks_cpu_contains(const int32_t *wanted, int64_t size, const int32_t *among,
                                          int64_t among_size, uint8_t *found) {
  using namespace commhooks;
  if (!valid_indices(wanted, size, COMMHOOKS_PAD) || !valid_indices(among, among_size, COMMHOOKS_PAD)) {
    return COMMHOOKS_INVALID;
  }
  if (size > 0 && found == nullptr) return COMMHOOKS_INVALID;
  try {
    const int64_t used = used_indices(wanted, size);
    const int64_t used_among = used_indices(among, among_size);
    const int pieces = pieces_of_union(used + used_among, 1);
    const int64_t room = used + used_among + pieces * kAppendSlack;
    Scratch &scratch = Scratch::of_this_thread();
    if (!scratch.reserve(Scratch::bytes_for<uint8_t>(room) + 3 * Scratch::bytes_for<float>(room))) {
      return COMMHOOKS_NO_MEMORY;
    }
    float *values = scratch.take<float>(room);
    int32_t *indices = scratch.take<int32_t>(room);
    uint8_t *tags = scratch.take<uint8_t>(room);
    // The union is made for its tags; any values will do.
    float *nothing = scratch.take<float>(std::max(used, used_among));
    std::fill(nothing, nothing + std::max(used, used_among), 0.0f);
    const MergeInput in{nothing, wanted, nothing, among};
    std::vector<Stretch> stretches = cut_union(in, used, used_among, pieces, values, indices, tags);
    kernels().unite(in, stretches.data(), pieces);
    for (const Stretch &s : stretches) kernels().mark_common(s, found);
    std::fill(found + used, found + size, uint8_t{0});
  } catch (...) {
    return COMMHOOKS_NO_MEMORY;
  }
  return COMMHOOKS_OK;
}
