// gTop-k's inner step: the k largest of the sum of two index-sorted sparse gradients, in time O(k).
//
// The merge itself only finds out which input each element of the union comes from: a byte each, without a branch that
// could be mispredicted. One merge is a chain of dependent loads, so four stretches of the union (cut by merge path) are
// merged side by side. Values and indices then follow from the tags, a vector at a time.
#include <string.h>

#include <algorithm>
#include <vector>

#include "commhooks_cpu.h"
#include "dispatch.h"
#include "indices.h"
#include "lists.h"
#include "scratch.h"

namespace commhooks {
namespace {

constexpr int kSideBySide = 4;
// A union shorter than this is one stretch.
constexpr int64_t kShort = 256;
// Tags that are sorted out at a time, in the first-level cache.
constexpr int64_t kMixed = 8192;

// One merge under way.
struct Cursor {
  const int32_t *a;
  const int32_t *b;
  uint8_t *tags;
  const int32_t *end_a;
  const int32_t *end_b;

  int64_t safe_steps() const { return std::min(end_a - a, end_b - b); }
};

// `steps` elements of the union for each of the four; none may run out of input. The tags of step s of cursor c go to
// mixed[4 * s + c]: one pointer instead of four keeps everything in registers.
void merge_side_by_side(Cursor *cursors, int64_t steps, uint8_t *mixed) {
  const int32_t *a[kSideBySide];
  const int32_t *b[kSideBySide];
  for (int c = 0; c < kSideBySide; ++c) {
    a[c] = cursors[c].a;
    b[c] = cursors[c].b;
  }
  for (int64_t s = 0; s < steps; ++s) {
    for (int c = 0; c < kSideBySide; ++c) {
      // x <= y as a sign bit: from comparisons GCC makes branches, mispredicted half of the time.
      const int64_t x = *a[c];
      const int64_t y = *b[c];
      const uint64_t in_a = static_cast<uint64_t>(x - y - 1) >> 63;
      const uint64_t in_b = static_cast<uint64_t>(y - x - 1) >> 63;
      mixed[s * kSideBySide + c] = static_cast<uint8_t>(in_a + 2 * in_b);
      a[c] += in_a;
      b[c] += in_b;
    }
  }
  for (int c = 0; c < kSideBySide; ++c) {
    for (int64_t s = 0; s < steps; ++s) cursors[c].tags[s] = mixed[s * kSideBySide + c];
    cursors[c].a = a[c];
    cursors[c].b = b[c];
    cursors[c].tags += steps;
  }
}

void merge_rest(Cursor &c) {
  while (c.a < c.end_a && c.b < c.end_b) {
    const int in_a = *c.a <= *c.b ? 1 : 0;
    const int in_b = *c.b <= *c.a ? 1 : 0;
    *c.tags++ = static_cast<uint8_t>(in_a | in_b << 1);
    c.a += in_a;
    c.b += in_b;
  }
  memset(c.tags, 1, static_cast<size_t>(c.end_a - c.a));
  c.tags += c.end_a - c.a;
  memset(c.tags, 2, static_cast<size_t>(c.end_b - c.b));
  c.tags += c.end_b - c.b;
}

class Merge {
 public:
  Merge(const MergeInput &in, int64_t size_a, int64_t size_b) : in_(in), size_a_(size_a), size_b_(size_b) {}

  bool reserve() {
    const int64_t room = size_a_ + size_b_ + kSideBySide * kAppendSlack;
    Scratch &scratch = Scratch::of_this_thread();
    if (!scratch.reserve(Scratch::bytes_for<uint8_t>(room) + 3 * Scratch::bytes_for<float>(room) +
                         Scratch::bytes_for<uint32_t>(kSideBySide * kBins))) {
      return false;
    }
    tags_ = scratch.take<uint8_t>(room);
    values_ = scratch.take<float>(room);
    indices_ = scratch.take<int32_t>(room);
    spare_ = scratch.take<float>(room);
    bins_ = scratch.take<uint32_t>(kSideBySide * kBins);
    return true;
  }

  int64_t run(int64_t k, float *values, int32_t *indices, Survivors survivors) {
    merge();
    combine();
    return emit(k, values, indices, survivors);
  }

 private:
  // Cuts the union into stretches of about equal input and tags them.
  void merge() {
    const int pieces = size_a_ + size_b_ < kShort ? 1 : kSideBySide;
    Cursor cursors[kSideBySide];
    int64_t from_a = 0;
    int64_t from_b = 0;
    for (int p = 0; p < pieces; ++p) {
      int64_t to_a = size_a_;
      int64_t to_b = size_b_;
      if (p + 1 < pieces) cut((size_a_ + size_b_) * (p + 1) / pieces, &to_a, &to_b);
      uint8_t *tags = tags_ + from_a + from_b + p * kAppendSlack;
      cursors[p] = {in_.indices_a + from_a, in_.indices_b + from_b, tags, in_.indices_a + to_a, in_.indices_b + to_b};
      stretches_.push_back({tags, 0, from_a, to_a, from_b, to_b});
      from_a = to_a;
      from_b = to_b;
    }
    for (;;) {
      int64_t steps = pieces == kSideBySide ? cursors[0].safe_steps() : 0;
      for (int p = 0; p < pieces; ++p) steps = std::min(steps, cursors[p].safe_steps());
      if (steps == 0) break;
      steps = std::min(steps, kMixed / kSideBySide);
      merge_side_by_side(cursors, steps, mixed_);
    }
    for (int p = 0; p < pieces; ++p) {
      merge_rest(cursors[p]);
      stretches_[static_cast<size_t>(p)].size = cursors[p].tags - stretches_[static_cast<size_t>(p)].tags;
    }
  }

  // Merge path: how many elements of a and of b are among the first `diagonal` of both. An index that both have is
  // never cut in two.
  void cut(int64_t diagonal, int64_t *to_a, int64_t *to_b) const {
    int64_t low = std::max<int64_t>(0, diagonal - size_b_);
    int64_t high = std::min(diagonal, size_a_);
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (in_.indices_a[middle] <= in_.indices_b[diagonal - 1 - middle]) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    int64_t other = diagonal - low;
    if (low > 0 && other < size_b_ && in_.indices_a[low - 1] == in_.indices_b[other]) ++other;
    *to_a = low;
    *to_b = other;
  }

  void combine() {
    for (const Stretch &stretch : stretches_) {
      const int64_t at = stretch.tags - tags_;
      kernels().combine(in_, stretch, values_ + at, indices_ + at);
      lists_.push_back({values_ + at, indices_ + at, stretch.size, spare_ + at});
    }
  }

  int64_t emit(int64_t k, float *values, int32_t *indices, Survivors survivors) {
    int64_t total = 0;
    for (const List &list : lists_) total += list.size;
    const int64_t kept = std::min(k, total);
    const uint32_t key = kept == 0 ? kMagnitudeBits : total <= k ? 0 : kth_largest_key(lists_, k, bins_, false);
    int64_t above[kSideBySide];
    int64_t equal[kSideBySide];
    int64_t ties = kept;
    for (size_t p = 0; p < lists_.size(); ++p) {
      kernels().count(lists_[p].values, lists_[p].size, key, &above[p], &equal[p]);
      ties -= above[p];
    }
    int64_t written = 0;
    for (size_t p = 0; p < lists_.size(); ++p) {
      const int64_t same = std::min(equal[p], ties);
      ties -= same;
      const Emitted out{values + written, indices + written, above[p] + same};
      kernels().emit_merged(stretches_[p], lists_[p].values, lists_[p].indices, key, same, out, survivors);
      written += out.size;
    }
    return written;
  }

  MergeInput in_;
  int64_t size_a_;
  int64_t size_b_;
  uint8_t *tags_ = nullptr;
  float *values_ = nullptr;
  int32_t *indices_ = nullptr;
  float *spare_ = nullptr;
  uint32_t *bins_ = nullptr;
  uint8_t mixed_[kMixed];
  std::vector<Stretch> stretches_;
  std::vector<List> lists_;
};

}  // namespace
}  // namespace commhooks

extern "C" int32_t commhooks_cpu_merge_topk(const float *values_a, const int32_t *indices_a, int64_t size_a,
                                            const float *values_b, const int32_t *indices_b, int64_t size_b, int64_t k,
                                            float *values, int32_t *indices, uint8_t *survives_a,
                                            uint8_t *survives_b) {
  using namespace commhooks;
  if (!valid_indices(indices_a, size_a, COMMHOOKS_PAD) || !valid_indices(indices_b, size_b, COMMHOOKS_PAD)) {
    return COMMHOOKS_INVALID;
  }
  if (k < 0 || (k > 0 && (values == nullptr || indices == nullptr))) return COMMHOOKS_INVALID;
  if ((size_a > 0 && (values_a == nullptr || survives_a == nullptr)) ||
      (size_b > 0 && (values_b == nullptr || survives_b == nullptr))) {
    return COMMHOOKS_INVALID;
  }
  try {
    const int64_t used_a = used_indices(indices_a, size_a);
    const int64_t used_b = used_indices(indices_b, size_b);
    Merge call({values_a, indices_a, values_b, indices_b}, used_a, used_b);
    if (!call.reserve()) return COMMHOOKS_NO_MEMORY;
    const int64_t written = call.run(k, values, indices, {survives_a, survives_b});
    pad(values, indices, written, k);
    std::fill(survives_a + used_a, survives_a + size_a, uint8_t{0});
    std::fill(survives_b + used_b, survives_b + size_b, uint8_t{0});
  } catch (...) {
    return COMMHOOKS_NO_MEMORY;
  }
  return COMMHOOKS_OK;
}
