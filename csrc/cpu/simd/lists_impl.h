// The inner loops over lists of candidates and of indices. Part of kernels_impl.h.
#ifndef COMMHOOKS_CPU_LISTS_IMPL_H
#define COMMHOOKS_CPU_LISTS_IMPL_H

#include "commhooks.h"
#include "simd/kernels.h"
#include "simd/vector_scalar.h"

namespace commhooks {
namespace {

inline void key_range(const float *values, int64_t size, uint32_t *lowest, uint32_t *highest) {
  int32_t low = INT32_MAX;
  int32_t high = 0;
  for (int64_t j = 0; j < size; ++j) {
    const int32_t key = static_cast<int32_t>(bits_of(values[j]) & kMagnitudeBits);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  *lowest = static_cast<uint32_t>(low);
  *highest = static_cast<uint32_t>(high);
}

template <class V>
inline int64_t between_one(const float *values, uint32_t low, uint32_t high, float *out, int64_t &larger) {
  const typename V::Float x = V::load(values);
  const uint32_t from_low = low == 0 ? ~0u >> (32 - V::kLanes) : V::above(x, low - 1);
  const uint32_t over = V::above(x, high);
  const uint32_t lanes = from_low & ~over;
  larger += popcount(over);
  if (lanes == 0) return 0;
  V::compress(out, x, lanes);
  return popcount(lanes);
}

template <class V>
int64_t between(const float *values, int64_t size, uint32_t low, uint32_t high, float *out, int64_t *above) {
  int64_t found = 0;
  int64_t larger = 0;
  int64_t j = 0;
  for (; j + V::kLanes <= size; j += V::kLanes) found += between_one<V>(values + j, low, high, out + found, larger);
  for (; j < size; ++j) found += between_one<ScalarVector>(values + j, low, high, out + found, larger);
  *above = larger;
  return found;
}

inline void count(const float *values, int64_t size, uint32_t key, int64_t *above, int64_t *equal) {
  int64_t larger = 0;
  int64_t same = 0;
  for (int64_t j = 0; j < size; ++j) {
    const uint32_t own = bits_of(values[j]) & kMagnitudeBits;
    larger += own > key ? 1 : 0;
    same += own == key ? 1 : 0;
  }
  *above = larger;
  *equal = same;
}

struct EmitState {
  uint32_t key;
  int64_t ties;
  Emitted out;
  int64_t written;
  float *residual;
};

// Writes what is kept of one vector and returns its lanes.
template <class V>
inline uint32_t emit_one(const float *values, const int32_t *indices, EmitState &state) {
  const typename V::Float x = V::load(values);
  uint32_t lanes = V::above(x, state.key);
  uint32_t same = (state.key == 0 ? ~0u >> (32 - V::kLanes) : V::above(x, state.key - 1)) & ~lanes;
  for (; same != 0 && state.ties > 0; same &= same - 1, --state.ties) lanes |= same & (0u - same);
  uint32_t rest = (~0u >> (32 - V::kLanes)) & ~lanes;
  if (state.residual != nullptr) {
    for (; rest != 0; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      state.residual[indices[lane]] = values[lane];
    }
  }
  if (state.written + V::kLanes <= state.out.size) {
    V::compress(state.out.values + state.written, x, lanes);
    V::compress_loaded(state.out.indices + state.written, indices, lanes);
    state.written += popcount(lanes);
  } else {
    // Near the end of this thread's share a whole vector would run into the next thread's.
    for (uint32_t left = lanes; left != 0; left &= left - 1, ++state.written) {
      const int lane = __builtin_ctz(left);
      state.out.values[state.written] = values[lane];
      state.out.indices[state.written] = indices[lane];
    }
  }
  return lanes;
}

template <class V>
void emit(const float *values, const int32_t *indices, int64_t size, uint32_t key, int64_t ties, Emitted out,
          float *residual) {
  constexpr int64_t kAhead = 64;
  EmitState state{key, ties, out, 0, residual};
  int64_t j = 0;
  for (; j + V::kLanes <= size; j += V::kLanes) {
    if (residual != nullptr && j + kAhead + V::kLanes <= size) {
      // What will go back is far apart in memory: its cache lines are asked for early.
      uint32_t rest = (~0u >> (32 - V::kLanes)) & ~V::above(V::load(values + j + kAhead), key);
      for (; rest != 0; rest &= rest - 1) {
        __builtin_prefetch(residual + indices[j + kAhead + __builtin_ctz(rest)], 1);
      }
    }
    emit_one<V>(values + j, indices + j, state);
  }
  for (; j < size; ++j) emit_one<ScalarVector>(values + j, indices + j, state);
}

// Without branches in the loop, so that the compiler vectorizes it.
inline bool ascending(const int32_t *indices, int64_t size) {
  int32_t wrong = size > 0 && indices[0] < 0 ? 1 : 0;
  for (int64_t j = 1; j < size; ++j) {
    wrong |= (indices[j] <= indices[j - 1]) & (indices[j] != COMMHOOKS_PAD);
  }
  return wrong == 0;
}

inline void feistel(uint32_t *indices, int64_t size, const uint32_t *round_keys, int32_t half_bits) {
  const uint32_t mask = (1u << half_bits) - 1u;
  for (int64_t j = 0; j < size; ++j) {
    uint32_t left = indices[j] >> half_bits;
    uint32_t right = indices[j] & mask;
    for (int round = 0; round < 6; ++round) {
      uint32_t x = right ^ round_keys[round];
      x *= 0x85EBCA6Bu;
      x ^= x >> 13;
      x *= 0xC2B2AE35u;
      x ^= x >> 16;
      const uint32_t next = left ^ (x & mask);
      left = right;
      right = next;
    }
    indices[j] = (left << half_bits) | right;
  }
}

}  // namespace
}  // namespace commhooks
#endif
