// The integer permutation behind random-k: the same bits on every machine, CPU and GPU.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define COMMHOOKS_BOTH __host__ __device__
#else
#define COMMHOOKS_BOTH
#endif

namespace commhooks {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
constexpr int kRounds = 6;

// The splitmix64 finaliser.
COMMHOOKS_BOTH inline uint64_t mix64(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// A permutation of [0, numel), six Feistel rounds over an even number of bits with cycle-walking.
struct Feistel {
  uint32_t keys[kRounds];
  uint32_t numel;
  int half_bits;

  COMMHOOKS_BOTH uint64_t once(uint64_t index) const {
    const uint64_t mask = (uint64_t{1} << half_bits) - 1;
    uint64_t left = index >> half_bits;
    uint64_t right = index & mask;
    for (int round = 0; round < kRounds; ++round) {
      uint32_t x = static_cast<uint32_t>(right) ^ keys[round];
      x *= 0x85EBCA6Bu;
      x ^= x >> 13;
      x *= 0xC2B2AE35u;
      x ^= x >> 16;
      const uint64_t next = left ^ (x & mask);
      left = right;
      right = next;
    }
    return (left << half_bits) | right;
  }

  COMMHOOKS_BOTH uint32_t at(uint64_t index) const {
    do {
      index = once(index);
    } while (index >= numel);
    return static_cast<uint32_t>(index);
  }
};

inline Feistel make_feistel(uint64_t seed, uint64_t step, uint64_t stream_key, int64_t numel) {
  uint64_t key = mix64(seed + kGolden);
  key = mix64((key ^ step) + kGolden);
  key = mix64((key ^ stream_key) + kGolden);
  Feistel result{};
  for (int round = 0; round < kRounds; ++round) {
    result.keys[round] = static_cast<uint32_t>(mix64(key + static_cast<uint64_t>(round + 1) * kGolden));
  }
  result.numel = static_cast<uint32_t>(numel);
  result.half_bits = 1;
  while ((int64_t{1} << (2 * result.half_bits)) < numel) ++result.half_bits;
  return result;
}

}  // namespace commhooks
