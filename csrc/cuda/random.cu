// Random-k indices: a keyed permutation of 0 .. numel - 1 applied to 0 .. k - 1, then put in order.
//
// Order comes from a bitmap (one bit per element) rather than from a sort: n / 8 bytes are cleared and read
// once, about one per cent of what the pass over the gradient moves.
#include "feistel.cuh"
#include "kernels.cuh"

namespace commhooks {
namespace {

__global__ void __launch_bounds__(kThreads) mark_kernel(Feistel permutation, int64_t k, Scratch scratch) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < k; i += stride) {
    const uint32_t index = permutation.at(static_cast<uint64_t>(i));
    atomicOr(scratch.bitmap + (index >> 5), 1u << (index & 31u));
    atomicAdd(&scratch.chunks[index >> scratch.chunk_shift].greater, 1u);
  }
}

// One chunk: its indices go behind those of all chunks before it.
__device__ void list_chunk(const Scratch &scratch, int64_t words, int32_t chunk, uint32_t place, int32_t *indices,
                           uint32_t *shared) {
  const int64_t each = int64_t{1} << (scratch.chunk_shift - 5);
  for (int64_t begin = chunk * each; begin < (chunk + 1) * each && begin < words; begin += 4 * kThreads) {
    const int64_t first = begin + 4 * static_cast<int64_t>(threadIdx.x);
    uint32_t bits[4];
    uint32_t count = 0;
    // The bitmap has whole tiles, so a multiple of four words.
    const uint4 four = first < words ? *reinterpret_cast<const uint4 *>(scratch.bitmap + first) : uint4{0, 0, 0, 0};
    bits[0] = four.x;
    bits[1] = four.y;
    bits[2] = four.z;
    bits[3] = four.w;
#pragma unroll
    for (int w = 0; w < 4; ++w) count += static_cast<uint32_t>(__popc(bits[w]));
    uint32_t total;
    uint32_t at = place + block_exclusive_sum(count, shared, &total);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      while (bits[w] != 0) {
        indices[at++] = static_cast<int32_t>(32 * (first + w) + __ffs(static_cast<int>(bits[w])) - 1);
        bits[w] &= bits[w] - 1;
      }
    }
    place += total;
  }
}

__global__ void __launch_bounds__(kThreads) list_kernel(Scratch scratch, int64_t words, int32_t *indices) {
  __shared__ uint32_t shared[kWarps];
  const int32_t begin = static_cast<int32_t>(static_cast<int64_t>(blockIdx.x) * scratch.num_chunks / gridDim.x);
  const int32_t end = static_cast<int32_t>(static_cast<int64_t>(blockIdx.x + 1) * scratch.num_chunks / gridDim.x);
  uint32_t sum = 0;
  for (int32_t chunk = static_cast<int32_t>(threadIdx.x); chunk < begin; chunk += kThreads) {
    sum += scratch.chunks[chunk].greater;
  }
  uint32_t place;
  block_exclusive_sum(sum, shared, &place);
  for (int32_t chunk = begin; chunk < end; ++chunk) {
    list_chunk(scratch, words, chunk, place, indices, shared);
    place += scratch.chunks[chunk].greater;
  }
}

}  // namespace
}  // namespace commhooks

using namespace commhooks;

extern "C" commhooks_status commhooks_cuda_random_indices(uint64_t seed, uint64_t step, uint64_t stream_key,
                                                          int64_t numel, int64_t k, int32_t *indices, void *scratch,
                                                          int64_t scratch_bytes, void *stream) {
  if (numel < 0 || numel >= INT32_MAX) return fail(COMMHOOKS_INVALID, "numel must be in [0, 2^31 - 1)");
  if (k < 0 || k > numel) return fail(COMMHOOKS_INVALID, "k must be in [0, numel]");
  if (k == 0) return COMMHOOKS_OK;
  if (indices == nullptr) return fail(COMMHOOKS_INVALID, "indices must not be NULL");
  const Scratch parts = lay_out(scratch, numel, 0, 0, true);
  if (scratch == nullptr || reinterpret_cast<uintptr_t>(scratch) % 16 != 0 || scratch_bytes < parts.bytes) {
    return fail(COMMHOOKS_INVALID, "scratch must be aligned and as long as commhooks_cuda_scratch_bytes() says");
  }
  const int64_t words = bitmap_words(numel);
  const char *const start = static_cast<const char *>(scratch);
  // The bitmap follows what is zeroed.
  const char *const end = reinterpret_cast<const char *>(parts.bitmap + words);
  COMMHOOKS_TRY(check("memset", cudaMemsetAsync(scratch, 0, static_cast<size_t>(end - start),
                                                static_cast<cudaStream_t>(stream))));
  const Feistel permutation = make_feistel(seed, step, stream_key, numel);
  COMMHOOKS_TRY(launch("mark", mark_kernel, blocks_for((k + kThreads - 1) / kThreads, resident_blocks(8)), stream,
                       permutation, k, parts));
  return launch("list", list_kernel, blocks_for(parts.num_chunks, resident_blocks(4)), stream, parts, words, indices);
}
