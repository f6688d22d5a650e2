// What the kernels need of the machine: launches, errors, warp and block helpers.
//
// With COMMHOOKS_EMULATE the same sources are compiled for the host against tests/native/emulator/simt.h,
// which runs every thread of a block as a fiber and every block as an operating system thread. So the logic
// is tested without a GPU; memory ordering, alignment traps and speed are not.
#pragma once

#include <stdint.h>

#ifdef COMMHOOKS_EMULATE
#include <simt.h>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "commhooks_cuda.h"

namespace commhooks {

constexpr int kThreads = 256;  // of every block in this library
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Records `what` (and the CUDA error, if any) for commhooks_cuda_last_error(); returns `status`.
commhooks_status fail(commhooks_status status, const char *what, cudaError_t error = cudaSuccess);

// COMMHOOKS_OK, or COMMHOOKS_DEVICE with the text of the error.
inline commhooks_status check(const char *what, cudaError_t error) {
  return error == cudaSuccess ? COMMHOOKS_OK : fail(COMMHOOKS_DEVICE, what, error);
}

// Number of blocks that keep the current device busy: `per_multiprocessor` on each, at least 1.
int resident_blocks(int per_multiprocessor);

// Blocks for `items` pieces of work, no more than `most`, at least 1.
inline int blocks_for(int64_t items, int most) {
  return items < 1 ? 1 : static_cast<int>(items < most ? items : most);
}

// Enqueues `kernel` with kThreads threads a block and reports what the launch has to say.
template <typename... Params, typename... Arguments>
commhooks_status launch(const char *what, void (*kernel)(Params...), int blocks, void *stream,
                        const Arguments &...arguments) {
#ifdef COMMHOOKS_EMULATE
  simt::launch(blocks, kThreads, [&] { kernel(arguments...); });
  (void)stream;
#else
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
#endif
  return check(what, cudaGetLastError());
}

#define COMMHOOKS_TRY(expression)                                   \
  do {                                                              \
    const commhooks_status status_of_try = (expression);            \
    if (status_of_try != COMMHOOKS_OK) return status_of_try;        \
  } while (0)

// Reads what other blocks may be changing with atomics at this moment.
__device__ inline uint32_t load_now(uint32_t *counter) {
#ifdef COMMHOOKS_EMULATE
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
#else
  return *static_cast<volatile uint32_t *>(counter);
#endif
}

// Orders this thread's accesses, and those of its block before the last barrier, with those of the other
// blocks.
__device__ inline void fence_device() {
#ifdef COMMHOOKS_EMULATE
  __threadfence();
#else
  asm volatile("fence.acq_rel.gpu;" ::: "memory");  // __threadfence() is the dearer fence.sc
#endif
}

// First place of `sorted` whose index is not below `index`; in [0, size] whatever the order.
__device__ inline int64_t lower_bound(const int32_t *sorted, int64_t size, int32_t index) {
  int64_t low = 0;
  int64_t high = size;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sorted[middle] < index) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x & 31u); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

__device__ inline uint32_t warp_sum(uint32_t value) {
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// Sum over the lanes up to and including this one.
template <typename T>
__device__ inline T warp_inclusive_sum(T value) {
  for (int offset = 1; offset < 32; offset <<= 1) {
    const T below = __shfl_up_sync(kFullWarp, value, offset);
    if (lane_id() >= offset) value += below;
  }
  return value;
}

// Sum over the threads of the block before this one; `total` gets the sum over all. Every thread must call
// it. `shared` holds kWarps elements and may be used again at once: the function begins and ends with a
// barrier.
template <typename T>
__device__ inline T block_exclusive_sum(T value, T *shared, T *total) {
  const T inclusive = warp_inclusive_sum(value);
  __syncthreads();
  if (lane_id() == 31) shared[warp_id()] = inclusive;
  __syncthreads();
  T before = 0;
  T all = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp < warp_id()) before += shared[warp];
    all += shared[warp];
  }
  __syncthreads();
  *total = all;
  return before + inclusive - value;
}

// The same value to all threads of the block, from thread 0. Begins and ends with a barrier.
__device__ inline uint32_t block_broadcast(uint32_t value, uint32_t *shared) {
  __syncthreads();
  if (threadIdx.x == 0) *shared = value;
  __syncthreads();
  const uint32_t result = *shared;
  __syncthreads();
  return result;
}

}  // namespace commhooks
