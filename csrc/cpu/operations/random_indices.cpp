// Sampling without replacement in O(k): a Feistel permutation of [0, numel) applied to 0 .. k-1. Integers
// only, so every machine and every device gets the same mask. Black and Rogaway, "Ciphers with arbitrary
// finite domains" (2002), for the cycle-walking; the round function is MurmurHash3's finaliser, which is no
// cipher and need not be one.
#include <algorithm>
#include <utility>
#include <vector>

#include "commhooks_cpu.h"
#include "simd/dispatch.h"
#include "support/mix.h"

namespace commhooks {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// Applies the network until every index is below `numel`. What is still outside moves to a shrinking list.
void walk(uint32_t *indices, int64_t k, uint32_t numel, const uint32_t *round_keys, int32_t half_bits) {
  constexpr int64_t kBatch = 1024;
  uint32_t outside[kBatch];
  int64_t places[kBatch];
  for (int64_t first = 0; first < k; first += kBatch) {
    const int64_t size = std::min(kBatch, k - first);
    kernels().feistel(indices + first, size, round_keys, half_bits);
    int64_t left = 0;
    for (int64_t j = 0; j < size; ++j) {
      outside[left] = indices[first + j];
      places[left] = first + j;
      left += outside[left] >= numel ? 1 : 0;
    }
    while (left > 0) {
      kernels().feistel(outside, left, round_keys, half_bits);
      int64_t still = 0;
      for (int64_t j = 0; j < left; ++j) {
        indices[places[j]] = outside[j];
        outside[still] = outside[j];
        places[still] = places[j];
        still += outside[j] >= numel ? 1 : 0;
      }
      left = still;
    }
  }
}

// Ascending order by bytes, least significant first.
void sort_indices(uint32_t *indices, int64_t k, uint32_t numel) {
  if (k < 256) return std::sort(indices, indices + k);
  constexpr int kDigit = 11;
  std::vector<uint32_t> other(static_cast<size_t>(k));
  uint32_t *from = indices;
  uint32_t *to = other.data();
  for (int shift = 0; shift < 32 && (numel - 1) >> shift != 0; shift += kDigit) {
    int64_t starts[(1 << kDigit) + 1] = {};
    const uint32_t mask = (1u << kDigit) - 1u;
    for (int64_t j = 0; j < k; ++j) ++starts[((from[j] >> shift) & mask) + 1];
    for (int digit = 0; digit < 1 << kDigit; ++digit) starts[digit + 1] += starts[digit];
    for (int64_t j = 0; j < k; ++j) to[starts[(from[j] >> shift) & mask]++] = from[j];
    std::swap(from, to);
  }
  if (from != indices) std::copy_n(from, k, indices);
}

}  // namespace
}  // namespace commhooks

extern "C" int32_t commhooks_cpu_random_indices(uint64_t seed, uint64_t step, uint64_t stream, int64_t numel,
                                                int64_t k, int32_t *indices) {
  using namespace commhooks;
  if (numel < 0 || numel >= COMMHOOKS_PAD || k < 0 || k > numel || (k > 0 && indices == nullptr)) {
    return COMMHOOKS_INVALID;
  }
  if (k == 0) return COMMHOOKS_OK;
  uint64_t key = 0;
  for (const uint64_t field : {seed, step, stream}) key = mix((key ^ field) + kGolden);
  uint32_t round_keys[6];
  for (uint64_t r = 0; r < 6; ++r) round_keys[r] = static_cast<uint32_t>(mix(key + (r + 1) * kGolden));
  int32_t half_bits = 1;
  while ((int64_t{1} << (2 * half_bits)) < numel) ++half_bits;
  // int32 and uint32 may alias, and no index reaches the sign bit once it is below numel.
  uint32_t *out = reinterpret_cast<uint32_t *>(indices);
  try {
    for (int64_t j = 0; j < k; ++j) out[j] = static_cast<uint32_t>(j);
    walk(out, k, static_cast<uint32_t>(numel), round_keys, half_bits);
    sort_indices(out, k, static_cast<uint32_t>(numel));
  } catch (...) {
    return COMMHOOKS_NO_MEMORY;
  }
  return COMMHOOKS_OK;
}
