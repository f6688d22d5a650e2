#include "support/lists.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "commhooks.h"
#include "simd/dispatch.h"
#include "simd/half.h"
#include "support/pool.h"

namespace commhooks {
namespace {

// Fewer candidates than this are finished by one thread: waking others takes longer.
constexpr int64_t kSerial = 32768;

int64_t total_size(const std::vector<List> &lists) {
  int64_t total = 0;
  for (const List &list : lists) total += list.size;
  return total;
}

// Runs f(list number) for all lists, by as many as `threads` threads when the lists are long together.
template <class F>
void for_each(size_t lists, int64_t total, int threads, F &&f) {
  parallel(total < kSerial ? 1 : threads, static_cast<int>(lists), f);
}

// Keys of a sample, to begin with a narrow range: filling a histogram takes ten times as long per element as
// leaving out what is clearly larger or smaller.
constexpr int64_t kSample = 512;
constexpr int64_t kWorthSampling = 16 * kSample;

void histogram(const List &list, uint32_t low, int shift, uint32_t *bins, int64_t used_bins) {
  std::fill(bins, bins + used_bins, 0u);
  for (int64_t j = 0; j < list.size; ++j) {
    ++bins[((bits_of(list.values[j]) & kMagnitudeBits) - low) >> shift];
  }
}

// The bin that holds the rank-th largest key; `rank` becomes the rank within it.
int64_t find_bin(size_t lists, const uint32_t *room, int64_t used_bins, int64_t &rank) {
  for (int64_t bin = used_bins - 1; bin > 0; --bin) {
    int64_t here = 0;
    for (size_t i = 0; i < lists; ++i) here += room[static_cast<int64_t>(i) * kBins + bin];
    if (rank <= here) return bin;
    rank -= here;
  }
  return 0;
}

// A range of keys that holds the rank-th largest of `total` in all likelihood: 5 standard deviations each
// way.
void guess_range(const std::vector<List> &lists, int64_t total, int64_t rank, uint32_t *low, uint32_t *high) {
  uint32_t keys[kSample];
  int64_t drawn = 0;
  int64_t before = 0;  // elements of the lists so far
  for (const List &list : lists) {
    for (; drawn < kSample; ++drawn) {
      const int64_t at = drawn * total / kSample - before;
      if (at >= list.size) break;
      keys[drawn] = bits_of(list.values[at]) & kMagnitudeBits;
    }
    before += list.size;
  }
  const double share = static_cast<double>(rank) / static_cast<double>(total);
  const double margin = 2.0 + 5.0 * std::sqrt(kSample * share * (1.0 - share));
  const int64_t first = static_cast<int64_t>(kSample * share - margin);
  const int64_t last = static_cast<int64_t>(kSample * share + margin);
  *low = 0;
  *high = kMagnitudeBits;
  uint32_t *end = keys + kSample;
  if (last < kSample) {
    std::nth_element(keys, keys + last, end, std::greater<uint32_t>());
    *low = keys[last];
    end = keys + last;
  }
  if (first > 0) {
    std::nth_element(keys, keys + first, end, std::greater<uint32_t>());
    *high = keys[first];
  }
}

// Leaves in `lists` (in their spare room) only a range of keys that has the rank-th largest; `rank` becomes
// the rank there. Changes nothing when the sample misleads.
void narrow(std::vector<List> &lists, int64_t total, int64_t &rank, int threads) {
  uint32_t low;
  uint32_t high;
  guess_range(lists, total, rank, &low, &high);
  std::vector<int64_t> found(lists.size());
  std::vector<int64_t> above(lists.size());
  for_each(lists.size(), total, threads, [&](int i) {
    const size_t at = static_cast<size_t>(i);
    found[at] = kernels().between(lists[at].values, lists[at].size, low, high, lists[at].spare, &above[at]);
  });
  int64_t left = rank;
  int64_t kept = 0;
  for (size_t i = 0; i < lists.size(); ++i) {
    left -= above[i];
    kept += found[i];
  }
  if (left <= 0 || left > kept) return;
  rank = left;
  for (size_t i = 0; i < lists.size(); ++i) {
    lists[i].values = lists[i].spare;
    lists[i].size = found[i];
  }
}

}  // namespace

uint32_t kth_largest_key(const std::vector<List> &lists, int64_t rank, uint32_t *room, int threads) {
  const Kernels &kernel = kernels();
  std::vector<List> left = lists;
  std::vector<uint32_t> lows(lists.size());
  std::vector<uint32_t> highs(lists.size());
  if (const int64_t all = total_size(left); all >= kWorthSampling) narrow(left, all, rank, threads);
  for (;;) {
    const int64_t total = total_size(left);
    const int64_t used_bins = total < kSerial ? kBins / 8 : kBins;
    for_each(left.size(), total, threads, [&](int i) {
      const size_t at = static_cast<size_t>(i);
      kernel.key_range(left[at].values, left[at].size, &lows[at], &highs[at]);
    });
    const uint32_t low = *std::min_element(lows.begin(), lows.end());
    const uint32_t high = *std::max_element(highs.begin(), highs.end());
    if (low >= high) return high;
    int shift = 0;
    while ((high - low) >> shift >= used_bins) ++shift;
    for_each(left.size(), total, threads,
             [&](int i) { histogram(left[static_cast<size_t>(i)], low, shift, room + i * kBins, used_bins); });
    const int64_t bin = find_bin(left.size(), room, used_bins, rank);
    const uint32_t from = low + (static_cast<uint32_t>(bin) << shift);
    if (shift == 0) return from;
    // Keys compare as signed numbers, and a last bin may reach beyond them: NaNs are the largest.
    const uint32_t to = std::min(from + ((1u << shift) - 1u), kMagnitudeBits);
    // Each round keeps one bin in 256 or more of the key range, so four rounds at most.
    for_each(left.size(), total, threads, [&](int i) {
      List &list = left[static_cast<size_t>(i)];
      int64_t above = 0;
      list.size = kernel.between(list.values, list.size, from, to, list.spare, &above);
      list.values = list.spare;
    });
  }
}

void pad(float *values, int32_t *indices, int64_t from, int64_t k) {
  std::fill(values + from, values + k, 0.0f);
  std::fill(indices + from, indices + k, COMMHOOKS_PAD);
}

Winners find_winners(const std::vector<List> &whole, const std::vector<List> &lists, int64_t k, uint32_t *room,
                     int threads, float *values, int32_t *indices) {
  const int64_t candidates = total_size(lists);
  Winners result;
  result.total = std::min(k, candidates);
  if (result.total == 0) {
    result.key = kMagnitudeBits;
  } else if (candidates > k) {
    result.key = kth_largest_key(whole, k, room, threads);
  }  // Otherwise key 0 with every tie takes all.
  std::vector<int64_t> above(lists.size());
  result.ties.resize(lists.size());
  for_each(lists.size(), candidates, threads, [&](int i) {
    const size_t at = static_cast<size_t>(i);
    kernels().count(lists[at].values, lists[at].size, result.key, &above[at], &result.ties[at]);
  });
  int64_t ties_left = result.total;
  for (const int64_t n : above) ties_left -= n;
  int64_t written = 0;
  for (size_t i = 0; i < lists.size(); ++i) {
    // Ties go to the lower index: the earlier lists have them first.
    result.ties[i] = std::min(result.ties[i], ties_left);
    ties_left -= result.ties[i];
    result.out.push_back({values + written, indices + written, above[i] + result.ties[i]});
    written += result.out.back().size;
  }
  return result;
}

int64_t emit_largest(const std::vector<List> &whole, const std::vector<List> &lists, int64_t k, uint32_t *room,
                     float *values, int32_t *indices, float *residual) {
  const int threads = static_cast<int>(whole.size());
  const Winners winners = find_winners(whole, lists, k, room, threads, values, indices);
  for_each(lists.size(), total_size(lists), threads, [&](int i) {
    const size_t at = static_cast<size_t>(i);
    kernels().emit(lists[at].values, lists[at].indices, lists[at].size, winners.key, winners.ties[at],
                   winners.out[at], residual);
  });
  pad(values, indices, winners.total, k);
  return winners.total;
}

}  // namespace commhooks
