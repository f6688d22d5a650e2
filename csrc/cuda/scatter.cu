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
    if (index < 0 || index >= numel) continue;  // padding; nobody has looked for anything else
    dense[index] = __fadd_rn(dense[index], __fmul_rn(scale, values[i]));
  }
}

// Adds rows one after the other in one launch. A warp has the elements of one tile to itself. It finds by
// binary search which entries of each row lie there, and its barriers keep the rows in order.
__global__ void __launch_bounds__(kThreads) scatter_rows_kernel(float *dense, int64_t numel, commhooks_rows rows,
                                                                float scale, int64_t tile) {
  const int64_t tiles = (numel + tile - 1) / tile;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(); t < tiles; t += stride) {
    const int64_t begin = t * tile;
    const int64_t end = begin + tile < numel ? begin + tile : numel;
    for (int64_t group = 0; group < rows.rows; group += 32) {
      // Each lane searches one row.
      uint32_t from = 0;
      uint32_t to = 0;
      if (group + lane_id() < rows.rows) {
        const int32_t *const row = rows.indices + (group + lane_id()) * rows.indices_stride;
        from = static_cast<uint32_t>(lower_bound(row, rows.k, static_cast<int32_t>(begin)));
        to = static_cast<uint32_t>(lower_bound(row, rows.k, static_cast<int32_t>(end)));
      }
      const int count = rows.rows - group < 32 ? static_cast<int>(rows.rows - group) : 32;
      for (int r = 0; r < count; ++r) {
        const uint32_t last = __shfl_sync(kFullWarp, to, r);
        const float *const values = rows.values + (group + r) * rows.values_stride;
        const int32_t *const indices = rows.indices + (group + r) * rows.indices_stride;
        for (uint32_t j = __shfl_sync(kFullWarp, from, r) + static_cast<uint32_t>(lane_id()); j < last; j += 32) {
          const int32_t index = indices[j];
          if (index < begin || index >= end) continue;  // out of order: of another tile, or of none
          dense[index] = __fadd_rn(dense[index], __fmul_rn(scale, values[j]));
        }
        __syncwarp();
      }
    }
  }
}

constexpr int64_t kMinRowTile = 512;

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

commhooks_status check_rows(const commhooks_rows *rows, int64_t numel) {
  if (numel < 0 || numel >= INT32_MAX) return fail(COMMHOOKS_INVALID, "numel must be in [0, 2^31 - 1)");
  if (rows == nullptr) return fail(COMMHOOKS_INVALID, "rows must not be NULL");
  if (rows->k < 0 || rows->k >= INT32_MAX) return fail(COMMHOOKS_INVALID, "k must be in [0, 2^31 - 1)");
  if (rows->rows < 0 || rows->rows >= INT32_MAX) return fail(COMMHOOKS_INVALID, "rows must be in [0, 2^31 - 1)");
  if (rows->rows == 0 || rows->k == 0) return COMMHOOKS_OK;
  if (rows->values == nullptr || rows->indices == nullptr) {
    return fail(COMMHOOKS_INVALID, "values and indices must not be NULL");
  }
  if (rows->rows > 1 && (rows->values_stride < 0 || rows->indices_stride < 0)) {
    return fail(COMMHOOKS_INVALID, "strides must not be negative");
  }
  return COMMHOOKS_OK;
}

int scatter_blocks(int64_t k) { return blocks_for((k + kThreads - 1) / kThreads, resident_blocks(8)); }

commhooks_status add_rows(const char *what, float *dense, int64_t numel, const commhooks_rows &rows, float scale,
                          void *stream) {
  if (rows.rows == 0 || rows.k == 0) return COMMHOOKS_OK;
  if (rows.rows == 1) {
    return launch(what, scatter_kernel, scatter_blocks(rows.k), stream, dense, numel, rows.values, rows.indices, rows.k,
                  scale);
  }
  const int most = resident_blocks(8);
  const int64_t warps = static_cast<int64_t>(most) * kWarps;
  int64_t tile = (numel + warps - 1) / warps;
  if (tile < kMinRowTile) tile = kMinRowTile;
  const int blocks = blocks_for((numel + tile * kWarps - 1) / (tile * kWarps), most);
  return launch(what, scatter_rows_kernel, blocks, stream, dense, numel, rows, scale, tile);
}

}  // namespace
}  // namespace commhooks

using namespace commhooks;

extern "C" commhooks_status commhooks_cuda_scatter_add(float *dense, int64_t numel, const commhooks_rows *rows,
                                                       float scale, void *stream) {
  COMMHOOKS_TRY(check_rows(rows, numel));
  if (numel == 0) return COMMHOOKS_OK;
  if (dense == nullptr) return fail(COMMHOOKS_INVALID, "dense must not be NULL");
  return add_rows("scatter_add", dense, numel, *rows, scale, stream);
}

extern "C" commhooks_status commhooks_cuda_write_back(void *out, int32_t dtype, int64_t numel,
                                                      const commhooks_rows *rows, float scale, void *stream) {
  COMMHOOKS_TRY(check_rows(rows, numel));
  if (dtype < COMMHOOKS_F32 || dtype > COMMHOOKS_F16) return fail(COMMHOOKS_INVALID, "dtype must be a commhooks_dtype");
  if (dtype != COMMHOOKS_F32 && rows->rows > 1) return fail(COMMHOOKS_INVALID, "rows must be at most 1 in half precision");
  if (numel == 0) return COMMHOOKS_OK;
  if (out == nullptr) return fail(COMMHOOKS_INVALID, "out must not be NULL");
  const size_t element_bytes = dtype == COMMHOOKS_F32 ? 4 : 2;
  COMMHOOKS_TRY(check("memset", cudaMemsetAsync(out, 0, element_bytes * static_cast<size_t>(numel),
                                                static_cast<cudaStream_t>(stream))));
  if (dtype == COMMHOOKS_F32) return add_rows("write_back", static_cast<float *>(out), numel, *rows, scale, stream);
  if (rows->rows == 0 || rows->k == 0) return COMMHOOKS_OK;
  const auto kernel = dtype == COMMHOOKS_BF16 ? scatter_half_kernel<Bf16> : scatter_half_kernel<F16>;
  return launch("write_back", kernel, scatter_blocks(rows->k), stream, static_cast<uint16_t *>(out), numel,
                rows->values, rows->indices, rows->k, scale);
}
