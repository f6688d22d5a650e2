// The ordered output of a selection: ranks of the winners from counts per chunk, and the walk over the
// bitmap.
#pragma once

#include "kernels.cuh"
#include "radix.cuh"

namespace commhooks {

constexpr int kWordsAtOnce = 4 * kThreads;

// Counts packed into one word, so that one scan serves both: winners for certain below, equal ones above.
__device__ inline uint64_t pack(uint64_t greater, uint64_t equal) { return greater | equal << 32; }
__device__ inline uint32_t greater_of(uint64_t packed) { return static_cast<uint32_t>(packed); }
__device__ inline uint32_t equal_of(uint64_t packed) { return static_cast<uint32_t>(packed >> 32); }

__device__ inline uint64_t chunk_count(const Finish &args, int32_t chunk) {
  const ChunkCount *const count = args.scratch.chunks + chunk;
  return pack(__ldcg(&count->greater), __ldcg(&count->equal));
}

// Sum of the counts of chunks [0, end). Every thread must call it.
__device__ inline uint64_t sum_chunks(const Finish &args, int32_t end, uint64_t *shared) {
  uint64_t sum = 0;
  for (int32_t chunk = static_cast<int32_t>(threadIdx.x); chunk < end; chunk += kThreads) sum += chunk_count(args, chunk);
  uint64_t total;
  block_exclusive_sum(sum, shared, &total);
  return total;
}

// Ranks of the winners: where each goes in the output.
struct Ranks {
  uint32_t k;
  uint32_t equal_taken;  // winners among the equal: the first so many by index
  uint32_t winners;
  bool cyclic;           // select_threshold with more than k candidates:
  uint32_t first;        //   rank of the first candidate at or behind start
  uint32_t wrapped;      //   winners that lie before it

  // Place of the candidate with `greater` certain winners and `equal` equal elements before it, or kNoKey.
  __device__ uint32_t place(uint32_t greater, uint32_t equal, bool is_equal) const {
    if (cyclic) {
      if (greater < wrapped) return greater;
      return greater >= first && greater - first < k - wrapped ? wrapped + (greater - first) : kNoKey;
    }
    if (is_equal && equal >= equal_taken) return kNoKey;
    return greater + (equal < equal_taken ? equal : equal_taken);
  }
};

__device__ inline Ranks ranks_of(const Finish &args, uint64_t total, const Resolved &known, uint64_t *shared) {
  Ranks ranks;
  ranks.k = static_cast<uint32_t>(args.k);
  ranks.equal_taken = known.remaining;
  ranks.first = 0;
  ranks.wrapped = 0;
  ranks.cyclic = false;
  const uint32_t greater = greater_of(total);
  if (args.start >= 0) {
    ranks.equal_taken = 0;
    ranks.winners = greater < ranks.k ? greater : ranks.k;
    ranks.cyclic = greater > ranks.k;
    const int32_t start_chunk = static_cast<int32_t>(args.start >> args.scratch.chunk_shift);
    ranks.first = greater_of(sum_chunks(args, start_chunk, shared)) + __ldcg(&args.scratch.control->before);
    if (ranks.cyclic && ranks.first + ranks.k > greater) ranks.wrapped = ranks.first + ranks.k - greater;
    return ranks;
  }
  ranks.winners = greater + (equal_of(total) < ranks.equal_taken ? equal_of(total) : ranks.equal_taken);
  return ranks;
}

constexpr int kAtOnce = 4;  // candidates whose values a thread has in flight

// Some of the 128 elements that a thread has of the bitmap, four words.
struct Bits {
  uint64_t low;
  uint64_t high;

  __device__ bool any() const { return (low | high) != 0; }
  __device__ bool has(int place) const { return ((place < 64 ? low >> place : high >> (place - 64)) & 1u) != 0; }
  __device__ void add(int place) {
    if (place < 64) {
      low |= uint64_t{1} << place;
    } else {
      high |= uint64_t{1} << (place - 64);
    }
  }
  // The lowest place, which is removed.
  __device__ int next() {
    if (low != 0) {
      const int place = __ffsll(static_cast<long long>(low)) - 1;
      low &= low - 1;
      return place;
    }
    const int place = __ffsll(static_cast<long long>(high)) - 1;
    high &= high - 1;
    return 64 + place;
  }
  __device__ uint32_t count() const {
    return static_cast<uint32_t>(__popc(static_cast<uint32_t>(low)) + __popc(static_cast<uint32_t>(low >> 32)) +
                                 __popc(static_cast<uint32_t>(high)) + __popc(static_cast<uint32_t>(high >> 32)));
  }
};

// Calls f(place, value) for all of `bits`, in order. Several values are loaded before the first is used: a
// store after each load would make every load wait for the one before.
template <typename F>
__device__ inline void for_values(const float *values, Bits bits, F &&f) {
  while (bits.any()) {
    int place[kAtOnce];
    float value[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      place[i] = bits.any() ? bits.next() : -1;
      if (place[i] >= 0) value[i] = values[place[i]];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (place[i] >= 0) f(place[i], value[i]);
    }
  }
}

// Splits candidates into certain winners and equal ones. `values` are those of the 128 elements.
__device__ inline void classify(const float *values, const Resolved &known, const Bits &candidates, Bits *greater,
                                Bits *equal) {
  *greater = Bits{0, 0};
  *equal = Bits{0, 0};
  if (known.remaining == 0) {
    *greater = candidates;
    return;
  }
  for_values(values, candidates, [&](int place, float value) {
    const uint32_t key = key_of(value);
    if (key > known.prefix) greater->add(place);
    if (key == known.prefix) equal->add(place);
  });
}

__device__ inline void emit_chunk(const Finish &args, int32_t chunk, const Resolved &known, const Ranks &ranks,
                                  uint64_t before, uint64_t *shared) {
  const int64_t words = bitmap_words(args.op.numel);  // whole tiles, so a multiple of four
  const int64_t each = int64_t{1} << (args.scratch.chunk_shift - 5);
  for (int64_t begin = chunk * each; begin < (chunk + 1) * each && begin < words; begin += kWordsAtOnce) {
    const int64_t first = begin + 4 * static_cast<int64_t>(threadIdx.x);
    float *const values = args.op.residual_out + 32 * first;
    Bits candidates{0, 0};
    if (first < words) {
      const uint4 four = __ldcg(reinterpret_cast<const uint4 *>(args.scratch.bitmap + first));
      candidates.low = four.x | static_cast<uint64_t>(four.y) << 32;
      candidates.high = four.z | static_cast<uint64_t>(four.w) << 32;
    }
    Bits greater;
    Bits equal;
    classify(values, known, candidates, &greater, &equal);
    uint64_t total;
    const uint64_t count = pack(greater.count(), equal.count());
    const uint64_t rank = before + block_exclusive_sum(count, shared, &total);
    uint32_t g = greater_of(rank);
    uint32_t e = equal_of(rank);
    const Bits either{greater.low | equal.low, greater.high | equal.high};
    for_values(values, either, [&](int place, float value) {
      const bool is_equal = equal.has(place);
      const uint32_t to = ranks.place(g, e, is_equal);
      g += is_equal ? 0u : 1u;
      e += is_equal ? 1u : 0u;
      if (to == kNoKey) return;
      args.values[to] = value;
      args.indices[to] = static_cast<int32_t>(32 * first + place);
      values[place] = 0.0f;
    });
    before += total;
  }
}

}  // namespace commhooks
