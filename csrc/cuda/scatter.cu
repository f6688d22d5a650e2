// Sparse into dense: scatter_add, and the write-back into a bucket.
#include "elements.cuh"

namespace commhooks {
namespace {

constexpr float kMaxBf16 = 3.38953138925153547590470800371487866880e38f;
constexpr float kMaxF16 = 65504.0f;

__global__ void __launch_bounds__(kThreads) scatter_kernel(float *dense, int64_t numel, const float *values,
                                                           const int32_t *indices, int64_t k, float scale) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < k; i += stride) {
    const int32_t index = indices[i];
    if (index < 0 || index >= numel) continue;  // padding; anything else would be the caller's error
    dense[index] = __fadd_rn(dense[index], __fmul_rn(scale, values[i]));
  }
}

__device__ float clamped(float value, float limit) {
  // Not fminf/fmaxf: NaN stays NaN.
  return value > limit ? limit : value < -limit ? -limit : value;
}

template <typename G>
__device__ uint16_t encode(float value);
template <>
__device__ uint16_t encode<Bf16>(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(clamped(value, kMaxBf16)));
}
template <>
__device__ uint16_t encode<F16>(float value) {
  return __half_as_ushort(__float2half_rn(clamped(value, kMaxF16)));
}

template <typename G>
__global__ void __launch_bounds__(kThreads) scatter_half_kernel(uint16_t *out, int64_t numel, const float *values,
                                                                const int32_t *indices, int64_t k, float scale) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < k; i += stride) {
    const int32_t index = indices[i];
    if (index < 0 || index >= numel) continue;
    out[index] = encode<G>(__fadd_rn(0.0f, __fmul_rn(scale, values[i])));
  }
}

commhooks_status check_pairs(const float *values, const int32_t *indices, int64_t k) {
  if (k < 0 || k >= INT32_MAX) return fail(COMMHOOKS_INVALID, "k must be in [0, 2^31 - 1)");
  if (k > 0 && (values == nullptr || indices == nullptr)) {
    return fail(COMMHOOKS_INVALID, "values and indices must not be NULL");
  }
  return COMMHOOKS_OK;
}

int scatter_blocks(int64_t k) { return blocks_for((k + kThreads - 1) / kThreads, resident_blocks(8)); }

}  // namespace
}  // namespace commhooks

using namespace commhooks;

extern "C" commhooks_status commhooks_cuda_scatter_add(float *dense, int64_t numel, const float *values,
                                                       const int32_t *indices, int64_t k, float scale, void *stream) {
  COMMHOOKS_TRY(check_pairs(values, indices, k));
  if (numel < 0 || numel >= INT32_MAX) return fail(COMMHOOKS_INVALID, "numel must be in [0, 2^31 - 1)");
  if (k == 0 || numel == 0) return COMMHOOKS_OK;
  if (dense == nullptr) return fail(COMMHOOKS_INVALID, "dense must not be NULL");
  return launch("scatter_add", scatter_kernel, scatter_blocks(k), stream, dense, numel, values, indices, k, scale);
}

extern "C" commhooks_status commhooks_cuda_write_back(void *out, int32_t dtype, int64_t numel, const float *values,
                                                      const int32_t *indices, int64_t rows, int64_t k, float scale,
                                                      void *stream) {
  COMMHOOKS_TRY(check_pairs(values, indices, rows > 0 ? k : 0));
  if (numel < 0 || numel >= INT32_MAX) return fail(COMMHOOKS_INVALID, "numel must be in [0, 2^31 - 1)");
  if (dtype < COMMHOOKS_F32 || dtype > COMMHOOKS_F16) return fail(COMMHOOKS_INVALID, "dtype must be a commhooks_dtype");
  if (rows < 0 || (dtype != COMMHOOKS_F32 && rows > 1)) {
    return fail(COMMHOOKS_INVALID, "rows must not be negative, and at most 1 in half precision");
  }
  if (numel == 0) return COMMHOOKS_OK;
  if (out == nullptr) return fail(COMMHOOKS_INVALID, "out must not be NULL");
  const size_t element_bytes = dtype == COMMHOOKS_F32 ? 4 : 2;
  COMMHOOKS_TRY(check("memset", cudaMemsetAsync(out, 0, element_bytes * static_cast<size_t>(numel),
                                                static_cast<cudaStream_t>(stream))));
  for (int64_t row = 0; row < rows && k > 0; ++row) {
    const float *const row_values = values + row * k;
    const int32_t *const row_indices = indices + row * k;
    if (dtype == COMMHOOKS_F32) {
      COMMHOOKS_TRY(launch("write_back", scatter_kernel, scatter_blocks(k), stream, static_cast<float *>(out), numel,
                           row_values, row_indices, k, scale));
    } else {
      const auto kernel = dtype == COMMHOOKS_BF16 ? scatter_half_kernel<Bf16> : scatter_half_kernel<F16>;
      COMMHOOKS_TRY(launch("write_back", kernel, scatter_blocks(k), stream, static_cast<uint16_t *>(out), numel,
                           row_values, row_indices, k, scale));
    }
  }
  return COMMHOOKS_OK;
}
