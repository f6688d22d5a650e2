// The one pass over the gradient: residual = residual + gradient (velocity too), candidates found on the way.
//
// A warp takes 512 neighbouring elements at a time, 16 a lane as four 16-byte accesses that are all in flight
// before the first is used. Every element is stored back, candidates too: so a guess that fails costs nothing
// but time, and the finish zeroes the winners only. Candidates go to a bitmap (in order) and to a list (in
// any order), the latter through a stage in shared memory that costs one global atomic per flush.
#include "kernels.cuh"

namespace commhooks {
namespace {

constexpr int kGroups = kTile / (32 * 4);  // of four elements, per lane
constexpr int kStage = 256;                // candidates a warp holds back

template <typename G>
__device__ void load_four(const void *from, int64_t index, int64_t numel, bool aligned, float *out);

template <>
__device__ void load_four<F32>(const void *from, int64_t index, int64_t numel, bool aligned, float *out) {
  const float *const at = static_cast<const float *>(from) + index;
  if (aligned && index + 4 <= numel) {
    const float4 four = __ldcs(reinterpret_cast<const float4 *>(at));
    out[0] = four.x;
    out[1] = four.y;
    out[2] = four.z;
    out[3] = four.w;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = index + e < numel ? at[e] : 0.0f;
}

template <typename G>
__device__ void load_four_halves(const void *from, int64_t index, int64_t numel, bool aligned, float *out) {
  const uint16_t *const at = static_cast<const uint16_t *>(from) + index;
  if (aligned && index + 4 <= numel) {
    const uint2 four = __ldcs(reinterpret_cast<const uint2 *>(at));
    out[0] = decode<G>(static_cast<uint16_t>(four.x & 0xffffu));
    out[1] = decode<G>(static_cast<uint16_t>(four.x >> 16));
    out[2] = decode<G>(static_cast<uint16_t>(four.y & 0xffffu));
    out[3] = decode<G>(static_cast<uint16_t>(four.y >> 16));
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = index + e < numel ? decode<G>(at[e]) : 0.0f;
}

template <>
__device__ void load_four<Bf16>(const void *from, int64_t index, int64_t numel, bool aligned, float *out) {
  load_four_halves<Bf16>(from, index, numel, aligned, out);
}
template <>
__device__ void load_four<F16>(const void *from, int64_t index, int64_t numel, bool aligned, float *out) {
  load_four_halves<F16>(from, index, numel, aligned, out);
}

__device__ void store_four(float *to, int64_t index, int64_t numel, bool aligned, const float *in) {
  if (aligned && index + 4 <= numel) {
    // An ordinary store: from the plain assignment some compilers made four of 4 bytes.
    __stwb(reinterpret_cast<float4 *>(to + index), make_float4(in[0], in[1], in[2], in[3]));
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (index + e < numel) to[index + e] = in[e];
  }
}

// Writes the 16 words of a tile. Bit 4 j + e of `mask` is element 128 j + 4 lane + e.
__device__ void write_bits(uint32_t mask, uint32_t *words) {
  const int lane = lane_id();
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    uint32_t word = ((mask >> (4 * j)) & 0xfu) << (4 * (lane & 7));
    word |= __shfl_xor_sync(kFullWarp, word, 1);
    word |= __shfl_xor_sync(kFullWarp, word, 2);
    word |= __shfl_xor_sync(kFullWarp, word, 4);
    if ((lane & 7) == 0) words[4 * j + lane / 8] = word;
  }
}

// Room for `count` more candidates in the list; the same position in every lane. It may lie beyond the
// capacity.
__device__ uint32_t reserve(const Target &target, uint32_t count) {
  uint32_t position = 0;
  if (lane_id() == 0) position = atomicAdd(&target.control->listed, count);
  return __shfl_sync(kFullWarp, position, 0);
}

__device__ void flush_stage(const Target &target, const Candidate *stage, uint32_t staged) {
  if (staged == 0) return;
  __syncwarp();
  const uint32_t position = reserve(target, staged);
  for (uint32_t i = static_cast<uint32_t>(lane_id()); i < staged; i += 32) {
    if (position + i < target.capacity) target.list[position + i] = stage[i];
  }
  __syncwarp();
}

// Appends the candidates of a tile; returns how many the stage holds then. `corrected` has the 16 elements of
// a lane.
__device__ uint32_t append(const Target &target, Candidate *stage, uint32_t staged, uint32_t mask,
                           const float (*corrected)[4], int64_t base) {
  const uint32_t count = static_cast<uint32_t>(__popc(mask));
  const uint32_t inclusive = warp_inclusive_sum(count);
  const uint32_t total = __shfl_sync(kFullWarp, inclusive, 31);
  uint32_t place = inclusive - count;
  const bool direct = total > kStage;
  if (direct) {
    place += reserve(target, total);
  } else if (staged + total > kStage) {
    flush_stage(target, stage, staged);
    staged = 0;
  }
  if (!direct) place += staged;
#pragma unroll
  for (int bit = 0; bit < 4 * kGroups; ++bit) {
    if ((mask >> bit & 1u) == 0) continue;
    const int64_t index = base + 128 * (bit / 4) + bit % 4;
    const Candidate candidate = make_uint2(key_of(corrected[bit / 4][bit % 4]), static_cast<uint32_t>(index));
    if (!direct) {
      stage[place] = candidate;
    } else if (place < target.capacity) {
      target.list[place] = candidate;
    }
    ++place;
  }
  return direct ? staged : staged + total;
}

// What one lane finds in a tile: its 16 corrected elements, and of which of them the key reaches the floor.
struct Found {
  float corrected[kGroups][4];
  uint32_t mask;       // bit 4 j + e: element 128 j + e behind the lane's first
  uint32_t nonfinite;
};

// Corrects the 16 elements that a lane has of a tile, the first of which is `base`. kWhole: the tile is
// full, vectors are aligned and no element looks for its segment.
template <typename G, bool kVelocity, bool kWhole>
__device__ __forceinline__ void correct_tile(const Operands &op, int64_t base, bool aligned, float factor,
                                                uint32_t floor, SegmentCursor *cursor, Found *found) {
  const int64_t numel = kWhole ? base + kTile : op.numel;
  const bool vectors = kWhole || aligned;
  float g[kGroups][4];
  float v[kGroups][4];
  float (&r)[kGroups][4] = found->corrected;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    load_four<G>(op.grad, base + 128 * j, numel, vectors, g[j]);
    load_four<F32>(op.residual, base + 128 * j, numel, vectors, r[j]);
    if (kVelocity) load_four<F32>(op.velocity, base + 128 * j, numel, vectors, v[j]);
  }
  found->mask = 0;
  found->nonfinite = 0;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!kWhole) {
        const int64_t index = base + 128 * j + e;
        if (index >= numel) continue;
        const bool active = cursor->at(op, index);
        if (op.rescale != nullptr) r[j][e] = __fmul_rn(cursor->rescale, r[j][e]);
        if (!active) continue;
      }
      const Corrected x = correct(g[j][e], r[j][e], kVelocity ? v[j][e] : 0.0f, factor, op.momentum, kVelocity);
      r[j][e] = x.c;
      if (kVelocity) v[j][e] = x.v;
      found->nonfinite += x.bad ? 1u : 0u;
      if (key_of(x.c) >= floor) found->mask |= 1u << (4 * j + e);
    }
    store_four(op.residual_out, base + 128 * j, numel, vectors, r[j]);
    if (kVelocity) store_four(op.velocity_out, base + 128 * j, numel, vectors, v[j]);
  }
}

// Resident blocks per multiprocessor: what the registers of one tile allow.
constexpr int blocks_per_multiprocessor(bool velocity) { return velocity ? 3 : 4; }

template <typename G, bool kVelocity>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor(kVelocity))
    pass_kernel(Operands op, Target target, bool aligned) {
  __shared__ Candidate stages[kWarps][kStage];
  Candidate *const stage = stages[warp_id()];
  const float factor = gradient_factor(op);
  forget_if_all_active(&op, target.control);
  const uint32_t floor = target.floor != 0 ? target.floor : target.control->floor;
  const int64_t tiles = (op.numel + kTile - 1) / kTile;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  const bool simple = aligned && !op.looks_up;
  SegmentCursor cursor;
  uint32_t staged = 0;
  uint32_t nonfinite = 0;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(); tile < tiles; tile += stride) {
    const int64_t base = tile * kTile + 4 * lane_id();
    Found found;
    if (simple && (tile + 1) * kTile <= op.numel) {
      correct_tile<G, kVelocity, true>(op, base, aligned, factor, floor, &cursor, &found);
    } else {
      correct_tile<G, kVelocity, false>(op, base, aligned, factor, floor, &cursor, &found);
    }
    nonfinite += found.nonfinite;
    if (target.bitmap == nullptr) continue;
    uint32_t *const words = target.bitmap + tile * (kTile / 32);
    if (__ballot_sync(kFullWarp, found.mask != 0) == 0) {
      if (lane_id() < kTile / 32) words[lane_id()] = 0;
      continue;
    }
    write_bits(found.mask, words);
    if (target.list != nullptr) staged = append(target, stage, staged, found.mask, found.corrected, base);
  }
  if (target.list != nullptr) flush_stage(target, stage, staged);
  nonfinite = warp_sum(nonfinite);
  if (lane_id() == 0 && nonfinite != 0) {
    atomicAdd(&target.control->nonfinite, static_cast<unsigned long long>(nonfinite));
  }
}

bool aligned_to(const void *pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename G>
commhooks_status run_pass_of(const Operands &op, const Target &target, void *stream) {
  const bool aligned = aligned_to(op.grad, sizeof(typename G::four)) && aligned_to(op.residual, 16) &&
                       aligned_to(op.velocity, 16) && aligned_to(op.residual_out, 16) &&
                       aligned_to(op.velocity_out, 16);
  const int64_t items = (op.numel + kTile * kWarps - 1) / (kTile * kWarps);
  const int blocks = blocks_for(items, resident_blocks(blocks_per_multiprocessor(op.velocity != nullptr)));
  const auto kernel = op.velocity != nullptr ? pass_kernel<G, true> : pass_kernel<G, false>;
  return launch("pass", kernel, blocks, stream, op, target, aligned);
}

}  // namespace

commhooks_status run_pass(const Operands &op, int32_t dtype, const Target &target, void *stream) {
  if (dtype == COMMHOOKS_F32) return run_pass_of<F32>(op, target, stream);
  if (dtype == COMMHOOKS_BF16) return run_pass_of<Bf16>(op, target, stream);
  return run_pass_of<F16>(op, target, stream);
}

}  // namespace commhooks
