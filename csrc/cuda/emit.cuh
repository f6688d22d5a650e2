// The ordered output of a selection: ranks of the winners from counts per chunk, and the walk over the bitmap.
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

__device__ inline void take(const Finish &args, int64_t index, uint32_t place) {
  if (place == kNoKey) return;
  args.values[place] = args.op.residual[index];
  args.indices[place] = static_cast<int32_t>(index);
  args.op.residual[index] = 0.0f;
}

// Splits the candidates of one word into certain winners and equal ones.
__device__ inline void classify(const Finish &args, const Resolved &known, int64_t word, uint32_t bits, uint32_t *greater,
                         uint32_t *equal) {
  *greater = 0;
  *equal = 0;
  if (known.remaining == 0) {
    *greater = bits;
    return;
  }
  while (bits != 0) {
    const int bit = __ffs(static_cast<int>(bits)) - 1;
    bits &= bits - 1;
    const uint32_t key = key_of(args.op.residual[32 * word + bit]);
    if (key > known.prefix) *greater |= 1u << bit;
    if (key == known.prefix) *equal |= 1u << bit;
  }
}

__device__ inline void emit_chunk(const Finish &args, int32_t chunk, const Resolved &known, const Ranks &ranks, uint64_t before,
                           uint64_t *shared) {
  const int64_t words = bitmap_words(args.op.numel);
  const int64_t each = int64_t{1} << (args.scratch.chunk_shift - 5);
  for (int64_t begin = chunk * each; begin < (chunk + 1) * each && begin < words; begin += kWordsAtOnce) {
    const int64_t first = begin + 4 * static_cast<int64_t>(threadIdx.x);
    uint32_t greater[4];
    uint32_t equal[4];
    uint64_t count = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t bits = first + w < words ? __ldcg(args.scratch.bitmap + first + w) : 0;
      classify(args, known, first + w, bits, &greater[w], &equal[w]);
      count += pack(static_cast<uint64_t>(__popc(greater[w])), static_cast<uint64_t>(__popc(equal[w])));
    }
    uint64_t total;
    const uint64_t rank = before + block_exclusive_sum(count, shared, &total);
    uint32_t g = greater_of(rank);
    uint32_t e = equal_of(rank);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t bits = greater[w] | equal[w];
      while (bits != 0) {
        const uint32_t lowest = bits & (0u - bits);
        const bool is_equal = (equal[w] & lowest) != 0;
        bits ^= lowest;
        take(args, 32 * (first + w) + __ffs(static_cast<int>(lowest)) - 1, ranks.place(g, e, is_equal));
        g += is_equal ? 0u : 1u;
        e += is_equal ? 1u : 0u;
      }
    }
    before += total;
  }
}

}  // namespace commhooks
