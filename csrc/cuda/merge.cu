// gTop-k's inner step: the k largest magnitudes of the sum of two index-sorted sparse gradients, O(k).
//
// No merged list is ever made. An entry finds its place in the other input by binary search; winners come
// from the radix select of radix.cuh; and the place of a winner in the output is the number of winners before
// it in its own input plus that in the other one, both read off one prefix sum. One kernel, six phases.
#include "merge.cuh"

#include "elements.cuh"
#include "phases.cuh"
#include "radix.cuh"

namespace commhooks {
namespace {

constexpr int kCount = kDigits;
constexpr int kPrefix = kDigits + 1;
constexpr int kEmit = kDigits + 2;
constexpr int kEach = kMergeTile / kThreads;

struct Merge {
  const float *values_a;
  const int32_t *indices_a;
  const float *values_b;
  const int32_t *indices_b;
  int64_t size_a;
  int64_t size_b;
  int64_t k;
  float *values;
  int32_t *indices;
  uint8_t *survives_a;
  uint8_t *survives_b;
  MergeScratch scratch;
};

__device__ int32_t index_at(const Merge &args, int64_t position) {
  return position < args.size_a ? args.indices_a[position] : args.indices_b[position - args.size_a];
}

// The value that the index of a representative position has in the sum.
__device__ float sum_at(const Merge &args, int64_t position, int64_t partner) {
  if (position >= args.size_a) return args.values_b[position - args.size_a];
  const float value = args.values_a[position];
  return partner < 0 ? __fadd_rn(value, args.values_b[~partner]) : value;
}

// Fills keys and partner of one position; returns the key.
__device__ uint32_t prepare(const Merge &args, int64_t position) {
  const bool in_a = position < args.size_a;
  const int32_t index = index_at(args, position);
  int64_t partner = 0;
  uint32_t key = kNoKey;
  if (index != COMMHOOKS_PAD) {
    const int32_t *const other = in_a ? args.indices_b : args.indices_a;
    const int64_t size = in_a ? args.size_b : args.size_a;
    partner = lower_bound(other, size, index);
    if (partner < size && other[partner] == index) partner = ~partner;
    if (in_a || partner >= 0) key = key_of(sum_at(args, position, partner));
  }
  args.scratch.keys[position] = key;
  args.scratch.partners[position] = partner;
  return key;
}

__device__ bool is_greater(uint32_t key, const Resolved &known) {
  return key != kNoKey && (known.all || key > known.prefix);
}
__device__ bool is_equal(uint32_t key, const Resolved &known) { return !known.all && key == known.prefix; }

__device__ void histogram_chunk(const Merge &args, int64_t begin, int64_t end, const Resolved &known,
                                uint32_t *histogram) {
  for (int64_t position = begin + threadIdx.x; position < end; position += kThreads) {
    const uint32_t key = known.digits == 0 ? prepare(args, position) : __ldcg(args.scratch.keys + position);
    if (key == kNoKey || known.all || !has_prefix(key, known.prefix, known.digits)) continue;
    atomicAdd(histogram + digit_of(key, known.digits), 1u);
  }
}

__device__ void count_chunk(const Merge &args, int64_t begin, int64_t end, const Resolved &known, ChunkCount *count) {
  uint32_t greater = 0;
  uint32_t equal = 0;
  for (int64_t position = begin + threadIdx.x; position < end; position += kThreads) {
    const uint32_t key = __ldcg(args.scratch.keys + position);
    greater += is_greater(key, known) ? 1u : 0u;
    equal += is_equal(key, known) ? 1u : 0u;
  }
  greater = warp_sum(greater);
  equal = warp_sum(equal);
  if (lane_id() != 0) return;
  if (greater != 0) atomicAdd(&count->greater, greater);
  if (equal != 0) atomicAdd(&count->equal, equal);
}

__device__ uint64_t pack(uint64_t greater, uint64_t equal) { return greater | equal << 32; }

// Packed sum of the counts of chunks [0, end). Every thread must call it.
__device__ uint64_t sum_chunks(const Merge &args, int32_t end, uint64_t *shared) {
  uint64_t sum = 0;
  for (int32_t chunk = static_cast<int32_t>(threadIdx.x); chunk < end; chunk += kThreads) {
    const ChunkCount *const count = args.scratch.control->chunks + chunk;
    sum += pack(__ldcg(&count->greater), __ldcg(&count->equal));
  }
  uint64_t total;
  block_exclusive_sum(sum, shared, &total);
  return total;
}

__device__ void prefix_chunk(const Merge &args, int64_t begin, int64_t end, const Resolved &known, uint64_t before,
                             uint64_t *shared) {
  for (int64_t tile = begin; tile < end; tile += kMergeTile) {
    const int64_t first = tile + kEach * static_cast<int64_t>(threadIdx.x);
    uint64_t each[kEach];
    uint64_t count = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t key = first + i < end ? __ldcg(args.scratch.keys + first + i) : kNoKey;
      each[i] = pack(is_greater(key, known) ? 1 : 0, is_equal(key, known) ? 1 : 0);
      count += each[i];
    }
    uint64_t total;
    uint64_t rank = before + block_exclusive_sum(count, shared, &total);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (first + i < end) {
        args.scratch.before[first + i] = make_uint2(static_cast<uint32_t>(rank), static_cast<uint32_t>(rank >> 32));
      }
      rank += each[i];
    }
    before += total;
  }
  if (end == args.size_a + args.size_b && threadIdx.x == 0) {
    args.scratch.before[end] = make_uint2(static_cast<uint32_t>(before), static_cast<uint32_t>(before >> 32));
  }
}

// Place in the output of a representative position, or -1.
__device__ int64_t place_of(const Merge &args, int64_t position, int64_t partner, const Resolved &known) {
  const uint32_t key = __ldcg(args.scratch.keys + position);
  const bool equal = is_equal(key, known);
  if (!equal && !is_greater(key, known)) return -1;
  const int64_t other = partner < 0 ? ~partner : partner;
  const uint2 own = __ldcg(args.scratch.before + position);
  const uint2 beside = __ldcg(args.scratch.before + (position < args.size_a ? args.size_a + other : other));
  const uint2 all_of_a = __ldcg(args.scratch.before + args.size_a);
  const uint32_t g = own.x + beside.x - all_of_a.x;
  const uint32_t e = own.y + beside.y - all_of_a.y;
  if (equal && e >= known.remaining) return -1;
  return static_cast<int64_t>(g) + (e < known.remaining ? e : known.remaining);
}

__device__ void emit_chunk(const Merge &args, int64_t begin, int64_t end, const Resolved &known) {
  for (int64_t position = begin + threadIdx.x; position < end; position += kThreads) {
    const bool in_a = position < args.size_a;
    uint8_t *const survives = in_a ? args.survives_a + position : args.survives_b + (position - args.size_a);
    const int32_t index = index_at(args, position);
    if (index == COMMHOOKS_PAD) {
      *survives = 0;
      continue;
    }
    const int64_t partner = __ldcg(args.scratch.partners + position);
    if (!in_a && partner < 0) {  // the entry of a stands for both
      const int64_t representative = ~partner;
      const int64_t back = __ldcg(args.scratch.partners + representative);
      *survives = place_of(args, representative, back, known) >= 0 ? 1 : 0;
      continue;
    }
    const int64_t place = place_of(args, position, partner, known);
    *survives = place >= 0 ? 1 : 0;
    if (place < 0) continue;
    args.values[place] = sum_at(args, position, partner);
    args.indices[place] = index;
  }
}

__device__ void pad_output(const Merge &args, const Resolved &known, uint32_t item, uint32_t items, uint64_t *shared) {
  const uint64_t total = sum_chunks(args, args.scratch.num_chunks, shared);
  const uint32_t equal = static_cast<uint32_t>(total >> 32);
  const int64_t winners = static_cast<int64_t>(static_cast<uint32_t>(total)) +
                          (equal < known.remaining ? equal : known.remaining);
  for (int64_t i = winners + static_cast<int64_t>(item) * kThreads + threadIdx.x; i < args.k;
       i += static_cast<int64_t>(items) * kThreads) {
    args.values[i] = 0.0f;
    args.indices[i] = COMMHOOKS_PAD;
  }
}

__global__ void __launch_bounds__(kThreads) merge_kernel(Merge args, Plan plan) {
  __shared__ uint32_t histogram[kDigitBins];
  __shared__ uint32_t shared[kWarps + 4];
  __shared__ uint64_t shared_wide[kWarps];
  MergeControl *const control = args.scratch.control;
  const int64_t size = args.size_a + args.size_b;
  Resolved known;
  known.remaining = static_cast<uint32_t>(args.k);
  for (int bin = static_cast<int>(threadIdx.x); bin < kDigitBins; bin += kThreads) histogram[bin] = 0;
  while (true) {
    const Item item = next_item(&control->schedule, plan, shared);
    if (item.phase == plan.num_phases) return;
    while (known.digits < kDigits && known.digits < item.phase) {
      resolve_digit(control->digit[known.digits], &known, shared);
    }
    const int64_t begin = item.index * args.scratch.chunk;
    const int64_t end = begin + args.scratch.chunk < size ? begin + args.scratch.chunk : size;
    if (item.phase < kDigits) {
      histogram_chunk(args, begin, end, known, histogram);
      flush_histogram(histogram, control->digit[item.phase], kDigitBins);
    } else if (item.phase == kCount) {
      count_chunk(args, begin, end, known, control->chunks + item.index);
    } else if (item.phase == kPrefix) {
      const uint64_t before = sum_chunks(args, static_cast<int32_t>(item.index), shared_wide);
      prefix_chunk(args, begin, end, known, before, shared_wide);
    } else {
      emit_chunk(args, begin, end, known);
      pad_output(args, known, item.index, plan.items[kEmit], shared_wide);
    }
    finish_item(&control->schedule, item);
  }
}

bool in_range(int64_t value) { return value >= 0 && value < INT32_MAX; }

commhooks_status check_merge(const Merge &args) {
  if (!in_range(args.size_a) || !in_range(args.size_b) || !in_range(args.k)) {
    return fail(COMMHOOKS_INVALID, "size_a, size_b and k must be in [0, 2^31 - 1)");
  }
  const bool a_given = args.values_a != nullptr && args.indices_a != nullptr && args.survives_a != nullptr;
  const bool b_given = args.values_b != nullptr && args.indices_b != nullptr && args.survives_b != nullptr;
  if ((args.size_a > 0 && !a_given) || (args.size_b > 0 && !b_given)) {
    return fail(COMMHOOKS_INVALID, "values, indices and survives of an input must not be NULL");
  }
  if (args.k > 0 && (args.values == nullptr || args.indices == nullptr)) {
    return fail(COMMHOOKS_INVALID, "values and indices must not be NULL");
  }
  return COMMHOOKS_OK;
}

commhooks_status clear(void *memory, int64_t bytes, void *stream) {
  if (bytes == 0) return COMMHOOKS_OK;
  return check("memset", cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

}  // namespace
}  // namespace commhooks

using namespace commhooks;

extern "C" commhooks_status commhooks_cuda_merge_topk(const float *values_a, const int32_t *indices_a, int64_t size_a,
                                                      const float *values_b, const int32_t *indices_b, int64_t size_b,
                                                      int64_t k, float *values, int32_t *indices,
                                                      uint8_t *survives_a, uint8_t *survives_b, void *scratch,
                                                      int64_t scratch_bytes, void *stream) {
  Merge args{values_a, indices_a, values_b,   indices_b,  size_a, size_b,
             k,        values,    indices,    survives_a, survives_b, MergeScratch{}};
  COMMHOOKS_TRY(check_merge(args));
  if (k == 0) {
    COMMHOOKS_TRY(clear(survives_a, size_a, stream));
    return clear(survives_b, size_b, stream);
  }
  args.scratch = lay_out_merge(scratch, size_a, size_b);
  if (scratch == nullptr || reinterpret_cast<uintptr_t>(scratch) % 16 != 0 || scratch_bytes < args.scratch.bytes) {
    return fail(COMMHOOKS_INVALID, "scratch must be aligned and as long as commhooks_cuda_scratch_bytes() says");
  }
  COMMHOOKS_TRY(clear(scratch, static_cast<int64_t>(sizeof(MergeControl)), stream));
  Plan plan{};
  plan.num_phases = kEmit + 1;
  for (int phase = 0; phase <= kEmit; ++phase) plan.items[phase] = static_cast<uint32_t>(args.scratch.num_chunks);
  if (plan.items[kEmit] == 0) plan.items[kEmit] = 1;  // padding is written even for empty inputs
  const int blocks = blocks_for(2 * static_cast<int64_t>(args.scratch.num_chunks), resident_blocks(2));
  return launch("merge", merge_kernel, blocks, stream, args, plan);
}
