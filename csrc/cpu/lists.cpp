#include "lists.h"

#include <algorithm>

#include "commhooks.h"
#include "dispatch.h"
#include "half.h"
#include "pool.h"

namespace commhooks {
namespace {

// Fewer candidates than this are finished by one thread: waking others takes longer.
constexpr int64_t kSerial = 32768;

int64_t total_size(const std::vector<List> &lists) {
  int64_t total = 0;
  for (const List &list : lists) total += list.size;
  return total;
}

// Runs f(list number) for all lists, in parallel when they are long together.
template <class F>
void for_each(size_t lists, int64_t total, F &&f) {
  if (total < kSerial) {
    for (size_t i = 0; i < lists; ++i) f(static_cast<int>(i));
  } else {
    parallel(static_cast<int>(lists), f);
  }
}

void histogram(const List &list, uint32_t low, int shift, uint32_t *bins) {
  std::fill(bins, bins + kBins, 0u);
  for (int64_t j = 0; j < list.size; ++j) {
    ++bins[((bits_of(list.values[j]) & kMagnitudeBits) - low) >> shift];
  }
}

// The bin that holds the rank-th largest key; `rank` becomes the rank within it.
int64_t find_bin(size_t lists, const uint32_t *room, int64_t &rank) {
  for (int64_t bin = kBins - 1; bin > 0; --bin) {
    int64_t here = 0;
    for (size_t i = 0; i < lists; ++i) here += room[static_cast<int64_t>(i) * kBins + bin];
    if (rank <= here) return bin;
    rank -= here;
  }
  return 0;
}

}  // namespace

uint32_t kth_largest_key(const std::vector<List> &lists, int64_t rank, uint32_t *room, bool threads) {
  const Kernels &kernel = kernels();
  std::vector<List> left = lists;
  std::vector<uint32_t> lows(lists.size());
  std::vector<uint32_t> highs(lists.size());
  for (;;) {
    const int64_t total = threads ? total_size(left) : 0;
    for_each(left.size(), total, [&](int i) {
      const size_t at = static_cast<size_t>(i);
      kernel.key_range(left[at].values, left[at].size, &lows[at], &highs[at]);
    });
    const uint32_t low = *std::min_element(lows.begin(), lows.end());
    const uint32_t high = *std::max_element(highs.begin(), highs.end());
    if (low >= high) return high;
    int shift = 0;
    while ((high - low) >> shift >= kBins) ++shift;
    for_each(left.size(), total, [&](int i) { histogram(left[static_cast<size_t>(i)], low, shift, room + i * kBins); });
    const int64_t bin = find_bin(left.size(), room, rank);
    const uint32_t from = low + (static_cast<uint32_t>(bin) << shift);
    if (shift == 0) return from;
    const uint32_t to = from + ((1u << shift) - 1u);
    // Each round keeps one bin in 2048 of the key range, so three rounds at most.
    for_each(left.size(), total, [&](int i) {
      List &list = left[static_cast<size_t>(i)];
      list.size = kernel.between(list.values, list.size, from, to, list.spare);
      list.values = list.spare;
    });
  }
}

void pad(float *values, int32_t *indices, int64_t from, int64_t k) {
  std::fill(values + from, values + k, 0.0f);
  std::fill(indices + from, indices + k, COMMHOOKS_PAD);
}

int64_t emit_largest(const std::vector<List> &lists, int64_t k, uint32_t *room, float *values, int32_t *indices,
                     float *residual) {
  const Kernels &kernel = kernels();
  const int64_t total = total_size(lists);
  const int64_t kept = std::min(k, total);
  // Key 0 with every tie kept takes all.
  const uint32_t key = kept == 0 ? kMagnitudeBits : total <= k ? 0 : kth_largest_key(lists, k, room, true);
  std::vector<int64_t> above(lists.size());
  std::vector<int64_t> equal(lists.size());
  for_each(lists.size(), total, [&](int i) {
    const size_t at = static_cast<size_t>(i);
    kernel.count(lists[at].values, lists[at].size, key, &above[at], &equal[at]);
  });
  int64_t ties = kept;
  for (const int64_t n : above) ties -= n;
  std::vector<int64_t> offsets(lists.size());
  int64_t written = 0;
  for (size_t i = 0; i < lists.size(); ++i) {
    // Ties go to the lower index: the earlier lists have them first.
    equal[i] = std::min(equal[i], ties);
    ties -= equal[i];
    offsets[i] = written;
    written += above[i] + equal[i];
  }
  for_each(lists.size(), total, [&](int i) {
    const size_t at = static_cast<size_t>(i);
    const Emitted out{values + offsets[at], indices + offsets[at], above[at] + equal[at]};
    kernel.emit(lists[at].values, lists[at].indices, lists[at].size, key, equal[at], out, residual);
  });
  pad(values, indices, written, k);
  return written;
}

}  // namespace commhooks
