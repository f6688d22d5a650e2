// Exact selection by radix: three digits of the 31-bit key, from the top.
#pragma once

#include "control.cuh"

namespace commhooks {

__host__ __device__ inline int digit_shift(int digit) { return digit == 0 ? 20 : digit == 1 ? 9 : 0; }

__host__ __device__ inline uint32_t digit_of(uint32_t key, int digit) {
  return digit == 0 ? key >> 20 : digit == 1 ? (key >> 9) & 0x7ffu : key & 0x1ffu;
}

// Whether the digits above `digit` are those of `prefix`.
__host__ __device__ inline bool has_prefix(uint32_t key, uint32_t prefix, int digit) {
  return digit == 0 || ((key ^ prefix) >> digit_shift(digit - 1)) == 0;
}

// Where, counting from the highest bin down, the `rank`-th entry (1 is the largest) lies.
struct Found {
  uint32_t bin;
  uint32_t above;  // entries in higher bins
  uint32_t count;  // entries in the bin; 0: there are fewer than `rank` entries, `above` is their number
};

// Searches a histogram of kBins bins in global memory that other blocks of this grid may have written (before
// the last wait). Every thread must call it; `shared` holds kWarps + 4 words.
template <int kBins>
__device__ inline Found find_from_top(const uint32_t *histogram, uint32_t rank, uint32_t *shared) {
  constexpr int kEach = kBins / kThreads;
  uint32_t counts[kEach];
  uint32_t sum = 0;
  const int first = kBins - kEach * (static_cast<int>(threadIdx.x) + 1);  // thread 0 has the highest bins
  for (int i = 0; i < kEach; ++i) {
    counts[i] = __ldcg(histogram + first + i);
    sum += counts[i];
  }
  uint32_t total;
  uint32_t above = block_exclusive_sum(sum, shared, &total);
  uint32_t *const result = shared + kWarps;
  if (threadIdx.x == 0) {
    result[0] = 0;
    result[1] = total;
    result[2] = 0;
  }
  __syncthreads();
  if (rank >= 1 && above < rank && rank <= above + sum) {  // true in at most one thread
    bool open = true;
    for (int i = kEach - 1; i >= 0; --i) {
      if (open && rank <= above + counts[i]) {
        result[0] = static_cast<uint32_t>(first + i);
        result[1] = above;
        result[2] = counts[i];
        open = false;
      }
      above += counts[i];
    }
  }
  __syncthreads();
  const Found found{result[0], result[1], result[2]};
  __syncthreads();
  return found;
}

// The k-th largest key as far as its digits are known.
struct Resolved {
  uint32_t prefix = 0;     // its known digits
  uint32_t remaining = 0;  // how many of the keys with this prefix are winners
  int digits = 0;          // how many digits are known
  bool all = false;        // fewer than k keys in all: every one is a winner
};

// Takes the histogram of digit `resolved->digits` into account.
__device__ inline void resolve_digit(const uint32_t *histogram, Resolved *resolved, uint32_t *shared) {
  if (!resolved->all) {
    const Found found = find_from_top<kDigitBins>(histogram, resolved->remaining, shared);
    if (found.count == 0) {
      resolved->all = true;
      resolved->prefix = 0;
      resolved->remaining = 0;
    } else {
      resolved->prefix |= found.bin << digit_shift(resolved->digits);
      resolved->remaining -= found.above;
    }
  }
  ++resolved->digits;
}

// Adds the block's histogram to the one in global memory and clears it. Begins and ends with a barrier.
__device__ inline void flush_histogram(uint32_t *block_histogram, uint32_t *histogram, int bins) {
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += kThreads) {
    const uint32_t count = block_histogram[bin];
    if (count != 0) {
      atomicAdd(histogram + bin, count);
      block_histogram[bin] = 0;
    }
  }
  __syncthreads();
}

}  // namespace commhooks
