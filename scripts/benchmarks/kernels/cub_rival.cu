// The rival of select_topk in the benchmark: r += g, CUB's DeviceTopK, and taking out. Not part of the library.
//
// It does less than select_topk: no order by index, ties in any order, no non-finite count, no segments.
#include <cub/device/device_topk.cuh>
#include <cuda/iterator>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

struct Magnitude {
  __host__ __device__ uint32_t operator()(float value) const {
    union {
      float value;
      uint32_t bits;
    } both{value};
    return both.bits & 0x7fffffffu;
  }
};

__global__ void add(float4 *residual, const float4 *grad, int64_t fours) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < fours; i += stride) {
    float4 r = residual[i];
    const float4 g = grad[i];
    r.x += g.x;
    r.y += g.y;
    r.z += g.z;
    r.w += g.w;
    residual[i] = r;
  }
}

__global__ void take(float *residual, const int32_t *indices, float *values, int64_t k) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= k) return;
  values[i] = residual[indices[i]];
  residual[indices[i]] = 0.0f;
}

}  // namespace

// With scratch == NULL only *scratch_bytes is set. `numel` is a multiple of 4, pointers are aligned to 16 bytes; `keys`
// has k elements. Returns a cudaError_t.
extern "C" int cub_rival(const float *grad, float *residual, int64_t numel, int64_t k, uint32_t *keys, float *values,
                         int32_t *indices, void *scratch, size_t *scratch_bytes, void *stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const auto keys_in = cuda::make_transform_iterator(static_cast<const float *>(residual), Magnitude{});
  const auto indices_in = cuda::make_counting_iterator(int32_t{0});
  const auto requirements = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                                     cuda::execution::output_ordering::unsorted);
  const auto environment = cuda::std::execution::env{cuda::stream_ref{on}, requirements};
  if (scratch != nullptr) add<<<1056, 256, 0, on>>>(reinterpret_cast<float4 *>(residual),
                                                    reinterpret_cast<const float4 *>(grad), numel / 4);
  const cudaError_t error = cub::DeviceTopK::MaxPairs(scratch, *scratch_bytes, keys_in, keys, indices_in, indices,
                                                      numel, k, environment);
  if (error != cudaSuccess || scratch == nullptr) return error;
  take<<<static_cast<int>((k + 255) / 256), 256, 0, on>>>(residual, indices, values, k);
  return cudaGetLastError();
}
