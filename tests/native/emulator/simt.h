// A small SIMT machine on the CPU, enough to run the kernels of csrc/cuda without a GPU (tests only).
//
// Every block is an operating system thread, every CUDA thread of it a fiber. Barriers and warp exchanges are
// rendezvous between fibers; the order in which fibers run is shuffled by COMMHOOKS_EMULATE_SEED, so that a missing
// barrier shows as a wrong result under some seed. A rendezvous that not all threads reach ends the program with a
// message. `__shared__` is thread-local to the block's thread. What it cannot show: memory ordering between blocks
// (the host is stronger), misaligned vector accesses (checked here by an assertion), speed.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline const char *cudaGetErrorString(cudaError_t) { return "emulated error"; }
namespace simt {
inline thread_local cudaError_t last_error = cudaSuccess;
}
// Like the runtime's: a failing call leaves its error until somebody asks.
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::last_error;
  simt::last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t) {
  if (getenv("COMMHOOKS_EMULATE_BAD_MEMSET") != nullptr) return simt::last_error = cudaErrorInvalidValue;
  memset(memory, value, bytes);
  return cudaSuccess;
}

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace simt {

struct Dimension {
  unsigned x;
};

Dimension thread_index();
Dimension block_index();
Dimension grid_size();

// Runs `body` in every thread of `blocks` blocks of `threads` threads; returns when all have returned.
void launch(int blocks, int threads, const std::function<void()> &body);

void block_barrier();
void warp_barrier();
// Deposits `value`; when all 32 lanes of the warp have done so, all go on. Returns the deposits of the warp.
const uint64_t *warp_exchange(uint64_t value);
void yield();
[[noreturn]] void misaligned(const void *pointer);

template <typename T>
const T *aligned(const T *pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignof(T) != 0) misaligned(pointer);
  return pointer;
}

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define gridDim (simt::grid_size())

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp() { simt::warp_barrier(); }
#ifdef COMMHOOKS_EMULATE_RACES
inline void __threadfence() {}  // ThreadSanitizer knows no fences; the atomics below order anyway
#else
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
#endif
inline void __nanosleep(unsigned) { simt::yield(); }

template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return from_bits<T>(simt::warp_exchange(to_bits(value))[lane & 31]);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return from_bits<T>(simt::warp_exchange(to_bits(value))[(simt::thread_index().x & 31) ^ static_cast<unsigned>(mask)]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned offset) {
  const unsigned lane = simt::thread_index().x & 31;
  const uint64_t *const all = simt::warp_exchange(to_bits(value));
  return from_bits<T>(all[lane >= offset ? lane - offset : lane]);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t *const all = simt::warp_exchange(predicate ? 1 : 0);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(all[lane]) << lane;
  return result;
}

template <typename T>
T atomicAdd(T *address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
template <typename T>
T atomicOr(T *address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_ACQ_REL);
}

template <typename T>
T __ldcg(const T *address) {
  return *simt::aligned(address);
}
template <typename T>
T __ldcs(const T *address) {
  return *simt::aligned(address);
}
template <typename T>
void __stwb(T *address, T value) {
  *const_cast<T *>(simt::aligned(address)) = value;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline uint32_t __float_as_uint(float value) { return static_cast<uint32_t>(to_bits(value)); }
inline float __uint_as_float(uint32_t bits) { return from_bits<float>(bits); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

inline _Float16 __ushort_as_half(uint16_t bits) { return from_bits<_Float16>(bits); }
inline uint16_t __half_as_ushort(_Float16 value) { return static_cast<uint16_t>(to_bits(value)); }
inline float __half2float(_Float16 value) { return static_cast<float>(value); }
inline _Float16 __float2half_rn(float value) { return static_cast<_Float16>(value); }
inline uint16_t __float2bfloat16_rn(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline uint16_t __bfloat16_as_ushort(uint16_t value) { return value; }
