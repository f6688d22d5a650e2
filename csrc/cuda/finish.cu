// After the pass: exactly the k winners, in index order, taken out of the residual.
//
// One kernel in five phases (see phases.cuh). Phases 0 to 2 find the k-th largest key, one digit each: over
// the list of candidates when the guess held, over the whole residual when it did not. Phase 3 counts winners
// per chunk (after a miss it rewrites the bitmap too), phase 4 walks the bitmap in order and writes. As the
// bitmap is ordered, nothing is ever sorted, and ties go to the lower index by counting.
#include "emit.cuh"
#include "phases.cuh"
#include "radix.cuh"

namespace commhooks {
namespace {

constexpr int kCount = kDigits;      // phase: count winners per chunk
constexpr int kEmit = kDigits + 1;   // phase: write them
constexpr int kListItem = 8 * kThreads;

// What all blocks know when they begin.
struct Situation {
  uint32_t listed;
  uint32_t floor;
  bool hit;     // the candidates contain the winners and fit the list
  bool digits;  // there are more candidates than winners
};

__device__ Situation look(const Finish &args) {
  Situation now;
  const Control *const control = args.scratch.control;
  now.listed = control->listed;
  now.floor = args.floor != 0 ? args.floor : control->floor;
  if (args.start >= 0) {
    now.hit = true;
    now.digits = false;
    return now;
  }
  const bool enough = now.listed >= args.k || now.floor <= 1;
  now.hit = enough && now.listed <= args.scratch.capacity;
  now.digits = !now.hit || now.listed > args.k;
  return now;
}

__device__ Plan plan_of(const Finish &args, const Situation &now) {
  const uint32_t chunks = static_cast<uint32_t>(args.scratch.num_chunks);
  const bool by_list = now.hit && args.start < 0;
  const uint32_t source = by_list ? (now.listed + kListItem - 1) / kListItem : chunks;
  Plan plan{};
  plan.num_phases = kEmit + 1;
  for (int phase = 0; phase < kDigits; ++phase) plan.items[phase] = now.digits ? source : 0;
  plan.items[kCount] = source;
  plan.items[kEmit] = chunks < 2 * gridDim.x ? chunks : 2 * gridDim.x;
  return plan;
}

__device__ void histogram_list(const Finish &args, const Situation &now, uint32_t item, const Resolved &known,
                               uint32_t *histogram) {
  const uint32_t begin = item * kListItem;
#pragma unroll
  for (int j = 0; j < kListItem / kThreads; ++j) {
    const uint32_t i = begin + kThreads * j + threadIdx.x;
    if (i >= now.listed) continue;
    const uint32_t key = args.scratch.list[i].x;
    if (has_prefix(key, known.prefix, known.digits)) atomicAdd(histogram + digit_of(key, known.digits), 1u);
  }
}

__device__ void histogram_residual(const Finish &args, uint32_t chunk, const Resolved &known, uint32_t *histogram) {
  if (known.all) return;
  const int64_t begin = static_cast<int64_t>(chunk) << args.scratch.chunk_shift;
  const int64_t size = int64_t{1} << args.scratch.chunk_shift;
  const int64_t end = begin + size < args.op.numel ? begin + size : args.op.numel;
  SegmentCursor cursor;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const uint32_t key = key_of(args.op.residual_out[i]);
    if (key == 0 || !has_prefix(key, known.prefix, known.digits) || !cursor.at(args.op, i)) continue;
    atomicAdd(histogram + digit_of(key, known.digits), 1u);
  }
}

__device__ void count_list(const Finish &args, const Situation &now, uint32_t item, const Resolved &known) {
  const uint32_t begin = item * kListItem;
  for (int j = 0; j < kListItem / kThreads; ++j) {
    const uint32_t i = begin + kThreads * j + threadIdx.x;
    if (i >= now.listed) continue;
    const Candidate candidate = args.scratch.list[i];
    ChunkCount *const count = args.scratch.chunks + (candidate.y >> args.scratch.chunk_shift);
    if (!now.digits || candidate.x > known.prefix) {
      atomicAdd(&count->greater, 1u);
    } else if (candidate.x == known.prefix) {
      atomicAdd(&count->equal, 1u);
    }
  }
}

// After a miss: the bitmap of one chunk anew, from the residual.
__device__ void count_residual(const Finish &args, uint32_t chunk, const Resolved &known) {
  const int64_t begin = static_cast<int64_t>(chunk) << args.scratch.chunk_shift;
  const int64_t size = int64_t{1} << args.scratch.chunk_shift;
  const int64_t end = begin + size < args.op.numel ? begin + size : args.op.numel;
  SegmentCursor cursor;
  uint32_t greater = 0;
  uint32_t equal = 0;
  for (int64_t word = begin + 32 * warp_id(); word < end; word += kThreads) {  // the same in every lane
    const int64_t i = word + lane_id();
    const uint32_t key = i < end && cursor.at(args.op, i) ? key_of(args.op.residual_out[i]) : 0;
    const uint32_t above = __ballot_sync(kFullWarp, key > known.prefix);
    const uint32_t same = __ballot_sync(kFullWarp, key != 0 && key == known.prefix);
    if (lane_id() == 0) args.scratch.bitmap[word / 32] = above | same;
    greater += static_cast<uint32_t>(__popc(above));
    equal += static_cast<uint32_t>(__popc(same));
  }
  if (lane_id() == 0) {
    if (greater != 0) atomicAdd(&args.scratch.chunks[chunk].greater, greater);
    if (equal != 0) atomicAdd(&args.scratch.chunks[chunk].equal, equal);
  }
}

// select_threshold: every candidate counts; those of start's chunk below start are counted apart too.
__device__ void count_bitmap(const Finish &args, uint32_t chunk) {
  const int64_t words = bitmap_words(args.op.numel);
  const int64_t each = int64_t{1} << (args.scratch.chunk_shift - 5);
  const int64_t begin = chunk * each;
  const int64_t end = begin + each < words ? begin + each : words;
  const bool has_start = (args.start >> args.scratch.chunk_shift) == chunk;
  uint32_t count = 0;
  uint32_t before = 0;
  for (int64_t word = begin + threadIdx.x; word < end; word += kThreads) {
    const uint32_t bits = args.scratch.bitmap[word];
    count += static_cast<uint32_t>(__popc(bits));
    const int64_t below = args.start - 32 * word;  // bits of this word below start, when in [0, 32]
    if (!has_start || below <= 0) continue;
    before += static_cast<uint32_t>(__popc(below >= 32 ? bits : bits & ((1u << below) - 1u)));
  }
  count = warp_sum(count);
  before = warp_sum(before);
  if (lane_id() == 0 && count != 0) atomicAdd(&args.scratch.chunks[chunk].greater, count);
  if (lane_id() == 0 && before != 0) atomicAdd(&args.scratch.control->before, before);
}

__device__ void emit_item(const Finish &args, const Situation &now, const Plan &plan, uint32_t item,
                          const Resolved &known, uint64_t *shared) {
  const int32_t chunks = args.scratch.num_chunks;
  const uint32_t items = plan.items[kEmit];
  const int32_t begin = static_cast<int32_t>(static_cast<int64_t>(item) * chunks / items);
  const int32_t end = static_cast<int32_t>(static_cast<int64_t>(item + 1) * chunks / items);
  const uint64_t total = sum_chunks(args, chunks, shared);
  const Ranks ranks = ranks_of(args, total, known, shared);
  uint64_t before = sum_chunks(args, begin, shared);
  for (int32_t chunk = begin; chunk < end; ++chunk) {
    const uint64_t count = chunk_count(args, chunk);
    if (count != 0) emit_chunk(args, chunk, known, ranks, before, shared);
    before += count;
  }
  for (int64_t i = ranks.winners + static_cast<int64_t>(item) * kThreads + threadIdx.x; i < args.k;
       i += static_cast<int64_t>(items) * kThreads) {
    args.values[i] = 0.0f;
    args.indices[i] = COMMHOOKS_PAD;
  }
  if (item != 0) return;
  report_segments(args.op, args.scratch.control, args.scratch.active, args.report);
  if (threadIdx.x != 0) return;
  args.report->count = ranks.winners;
  args.report->misses = now.hit ? 0 : 1;
}

// Resident blocks per multiprocessor: many, because the emit phase is a chain of dependent loads.
constexpr int kFinishBlocks = 4;

__global__ void __launch_bounds__(kThreads, kFinishBlocks) finish_kernel(Finish args) {
  __shared__ uint32_t histogram[kDigitBins];
  __shared__ uint32_t shared[kWarps + 4];
  __shared__ uint64_t shared_wide[kWarps];
  Control *const control = args.scratch.control;
  const Situation now = look(args);
  const Plan plan = plan_of(args, now);
  Resolved known;
  known.remaining = now.digits ? static_cast<uint32_t>(args.k) : 0;
  for (int bin = static_cast<int>(threadIdx.x); bin < kDigitBins; bin += kThreads) histogram[bin] = 0;
  while (true) {
    const Item item = next_item(&control->second, plan, shared);
    if (item.phase == plan.num_phases) return;
    while (now.digits && known.digits < kDigits && known.digits < item.phase) {
      resolve_digit(control->digit[known.digits], &known, shared);
    }
    if (item.phase < kDigits) {
      if (now.hit) {
        histogram_list(args, now, item.index, known, histogram);
      } else {
        histogram_residual(args, item.index, known, histogram);
      }
      flush_histogram(histogram, control->digit[item.phase], kDigitBins);
    } else if (item.phase == kCount) {
      if (args.start >= 0) {
        count_bitmap(args, item.index);
      } else if (now.hit) {
        count_list(args, now, item.index, known);
      } else {
        count_residual(args, item.index, known);
      }
    } else {
      emit_item(args, now, plan, item.index, known, shared_wide);
    }
    finish_item(&control->second, item);
  }
}

__global__ void __launch_bounds__(kThreads) gather_kernel(Operands op, Scratch scratch, const int32_t *indices,
                                                          int64_t k, float *values, commhooks_report *report) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  forget_if_all_active(&op, scratch.control);
  SegmentCursor cursor;
  for (int64_t i = first; i < k; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int32_t index = indices[i];
    const bool used = index != COMMHOOKS_PAD;
    // Nobody has looked at the indices: one that is out of range is left out.
    const bool active = index >= 0 && index < op.numel && cursor.at(op, index);
    values[i] = active ? op.residual_out[index] : 0.0f;
    if (active) op.residual_out[index] = 0.0f;
    if (used && (i + 1 == k || indices[i + 1] == COMMHOOKS_PAD)) report->count = i + 1;
  }
  if (blockIdx.x != 0) return;
  report_segments(op, scratch.control, scratch.active, report);
  if (first != 0) return;
  if (k == 0 || indices[0] == COMMHOOKS_PAD) report->count = 0;
  report->misses = 0;
}

}  // namespace

commhooks_status run_finish(const Finish &finish, void *stream) {
  const int most = resident_blocks(kFinishBlocks);
  const int blocks = blocks_for(kFinishBlocks * static_cast<int64_t>(finish.scratch.num_chunks), most);
  return launch("finish", finish_kernel, blocks, stream, finish);
}

commhooks_status run_gather(const Operands &op, const Scratch &scratch, const int32_t *indices, int64_t k,
                            float *values, commhooks_report *report, void *stream) {
  const int blocks = blocks_for((k + kThreads - 1) / kThreads, resident_blocks(4));
  return launch("gather", gather_kernel, blocks, stream, op, scratch, indices, k, values, report);
}

}  // namespace commhooks
