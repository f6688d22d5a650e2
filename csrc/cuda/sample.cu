// Before the pass: which segments are active, and a guess of the k-th largest magnitude from a sample.
//
// Two phases of one kernel. Phase 0 goes over the gradient in pieces and leaves a segment as soon as it is
// known to be active, so only gradients that are zero are read to their end. Phase 1 histograms the sample;
// the block that finishes last turns it into the floor that the pass compares with.
#include "kernels.cuh"
#include "phases.cuh"
#include "radix.cuh"

#include "feistel.cuh"

namespace commhooks {
namespace {

constexpr int kEach = 8;                        // elements a thread has in flight
constexpr int kSampleItem = kThreads * kEach;   // elements of one item of phase 1
constexpr int64_t kMinFlagItem = 16384;         // elements of one item of phase 0

template <typename G>
__device__ bool is_nonzero(const void *grad, int64_t index);
template <>
__device__ bool is_nonzero<F32>(const void *grad, int64_t index) {
  return (__float_as_uint(static_cast<const float *>(grad)[index]) & kMagnitudeBits) != 0;
}
template <>
__device__ bool is_nonzero<Bf16>(const void *grad, int64_t index) {
  return (static_cast<const uint16_t *>(grad)[index] & 0x7fffu) != 0;
}
template <>
__device__ bool is_nonzero<F16>(const void *grad, int64_t index) {
  return (static_cast<const uint16_t *>(grad)[index] & 0x7fffu) != 0;
}

// One warp, elements [begin, end) of one segment: whether another warp has found it active, or this one does.
template <typename G>
__device__ void flag_part(const Operands &op, Control *control, uint32_t *active, int32_t segment, int64_t begin,
                          int64_t end) {
  uint32_t *const flag = active + segment;
  for (int64_t at = begin; at < end; at += 32 * kEach) {
    uint32_t known = 0;
    if (lane_id() == 0) known = load_now(flag);
    if (__shfl_sync(kFullWarp, known, 0) != 0) return;
    bool nonzero = false;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t index = at + 32 * j + lane_id();
      if (index < end) nonzero |= is_nonzero<G>(op.grad, index);
    }
    if (__ballot_sync(kFullWarp, nonzero) != 0) {
      // Whoever is first counts the segment's elements: when they are all there, nobody needs the flags.
      if (lane_id() == 0 && atomicOr(flag, 1u) == 0) {
        atomicAdd(&control->active_numel, static_cast<unsigned long long>(op.offsets[segment + 1] - op.offsets[segment]));
      }
      return;
    }
  }
}

template <typename G>
__device__ void flag_item(const Operands &op, Control *control, uint32_t *active, int64_t item, int64_t item_size) {
  const int64_t part = item_size / kWarps;
  const int64_t begin = item * item_size + part * warp_id();
  const int64_t end = begin + part < op.numel ? begin + part : op.numel;
  if (begin >= end) return;
  int64_t at = begin;
  for (int32_t segment = segment_of(op.offsets, op.num_segments, at); at < end && segment < op.num_segments;
       ++segment) {
    const int64_t boundary = op.offsets[segment + 1];
    const int64_t stop = boundary < end ? boundary : end;
    if (stop <= at) continue;
    flag_part<G>(op, control, active, segment, at, stop);
    at = stop;
  }
}

template <typename G>
__device__ void sample_item(const Operands &op, const Sample &sample, int64_t item, float factor,
                            uint32_t *histogram) {
  SegmentCursor cursor;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t element = item * kSampleItem + kThreads * j + threadIdx.x;
    const int64_t piece = element / kPiece;
    if (piece >= sample.pieces) continue;
    int64_t index;
    if (sample.pieces * kPiece >= op.numel) {
      index = element;  // everything, once
    } else {
      const int64_t begin = piece * op.numel / sample.pieces;
      const int64_t length = (piece + 1) * op.numel / sample.pieces - begin;
      const uint64_t random = mix64(sample.seed + static_cast<uint64_t>(piece + 1) * kGolden);
      index = begin + static_cast<int64_t>(random % static_cast<uint64_t>(length - (kPiece - 1))) + element % kPiece;
    }
    if (index >= op.numel || !cursor.at(op, index)) continue;
    const float grad = decode<G>(static_cast<const typename G::storage *>(op.grad)[index]);
    const bool has_velocity = op.velocity != nullptr;
    const float velocity = has_velocity ? op.velocity[index] : 0.0f;
    float residual = op.residual[index];
    if (op.rescale != nullptr) residual = __fmul_rn(cursor.rescale, residual);
    const uint32_t key = key_of(correct(grad, residual, velocity, factor, op.momentum, has_velocity).c);
    if (key == 0 || (sample.estimate != nullptr && key >= kInfinityKey)) continue;
    atomicAdd(histogram + (key >> kSampleShift), 1u);
  }
}

// The whole block, when the histogram is complete.
__device__ void guess(const Sample &sample, Control *control, uint32_t *shared) {
  const Found found = find_from_top<kSampleBins>(control->sample, sample.rank, shared);
  if (threadIdx.x != 0) return;
  uint32_t floor = found.bin << kSampleShift;
  if (sample.interpolate && found.count != 0) {
    const float below = static_cast<float>(found.above + found.count - sample.rank) / static_cast<float>(found.count);
    floor += static_cast<uint32_t>(below * static_cast<float>(1u << kSampleShift));
  }
  if (found.count == 0) floor = 0;
  if (sample.estimate != nullptr) *sample.estimate = __uint_as_float(floor);
  if (floor == 0) floor = 1;  // zeros are never candidates
  control->floor = sample.rank == 0 ? kNoKey : floor;
}

template <typename G>
__global__ void __launch_bounds__(kThreads) sample_kernel(Operands op, Sample sample, Control *control,
                                                          uint32_t *active, Plan plan, int64_t flag_item_size) {
  __shared__ uint32_t histogram[kSampleBins];
  __shared__ uint32_t shared[kWarps + 4];
  for (int bin = static_cast<int>(threadIdx.x); bin < kSampleBins; bin += kThreads) histogram[bin] = 0;
  const float factor = gradient_factor(op);
  while (true) {
    const Item item = next_item(&control->first, plan, shared);
    if (item.phase == plan.num_phases) return;
    if (item.phase == 0) {
      flag_item<G>(op, control, active, item.index, flag_item_size);
      finish_item(&control->first, item);
      continue;
    }
    forget_if_all_active(&op, control);
    sample_item<G>(op, sample, item.index, factor, histogram);
    flush_histogram(histogram, control->sample, kSampleBins);
    if (finish_item_as_last(&control->first, item, plan, shared)) guess(sample, control, shared);
  }
}

}  // namespace

commhooks_status run_sample(const Operands &op, int32_t dtype, const Sample &sample, const Scratch &scratch,
                            void *stream) {
  const int most = resident_blocks(2);
  int64_t flag_item_size = round_up((op.numel + 4 * most - 1) / (4 * most), 32 * kEach * kWarps);
  if (flag_item_size < kMinFlagItem) flag_item_size = kMinFlagItem;
  Plan plan{};
  plan.num_phases = 2;
  if (op.active != nullptr) plan.items[0] = static_cast<uint32_t>((op.numel + flag_item_size - 1) / flag_item_size);
  plan.items[1] = static_cast<uint32_t>((sample.pieces * kPiece + kSampleItem - 1) / kSampleItem);
  const int blocks = blocks_for(static_cast<int64_t>(plan.items[0]) + plan.items[1], most);
  if (plan.items[0] + plan.items[1] == 0) return COMMHOOKS_OK;
  const auto kernel = dtype == COMMHOOKS_F32    ? sample_kernel<F32>
                      : dtype == COMMHOOKS_BF16 ? sample_kernel<Bf16>
                                                : sample_kernel<F16>;
  return launch("sample", kernel, blocks, stream, op, sample, scratch.control, scratch.active, plan, flag_item_size);
}

}  // namespace commhooks
