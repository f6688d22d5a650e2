// Errors, versions, and what the device offers.
#include <stdio.h>

#include "control.cuh"
#include "merge.cuh"

namespace commhooks {
namespace {

thread_local char last_error[256] = "";

constexpr int64_t kMaxNumel = INT32_MAX - 1;

bool in_range(int64_t value) { return value >= 0 && value <= kMaxNumel; }

}  // namespace

commhooks_status fail(commhooks_status status, const char *what, cudaError_t error) {
  if (error == cudaSuccess) {
    snprintf(last_error, sizeof(last_error), "%s", what);
  } else {
    snprintf(last_error, sizeof(last_error), "%s: %s", what, cudaGetErrorString(error));
    (void)cudaGetLastError();  // told now: the next launch must not find it and fail for it once more
  }
  return status;
}

int resident_blocks(int per_multiprocessor) {
  int device = 0;
  int multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      multiprocessors < 1) {
    (void)cudaGetLastError();  // the launch that follows will say what is wrong
    return per_multiprocessor;
  }
  return multiprocessors * per_multiprocessor;
}

}  // namespace commhooks

using namespace commhooks;

extern "C" int32_t commhooks_cuda_abi_version(void) { return COMMHOOKS_ABI_VERSION; }

extern "C" const char *commhooks_cuda_last_error(void) { return last_error; }

extern "C" int64_t commhooks_cuda_scratch_bytes(int32_t operation, int64_t numel, int64_t k, int64_t extra) {
  if (!in_range(numel) || !in_range(k) || !in_range(extra)) return -1;
  switch (operation) {
    case COMMHOOKS_CUDA_SELECT:
    case COMMHOOKS_CUDA_INDICES: {
      const bool lists = operation == COMMHOOKS_CUDA_SELECT;
      return lay_out(nullptr, numel > 0 ? numel : 1, lists ? k : 0, extra, lists).bytes;
    }
    case COMMHOOKS_CUDA_RANDOM:
      return lay_out(nullptr, numel > 0 ? numel : 1, 0, 0, true).bytes;
    case COMMHOOKS_CUDA_MERGE:
      return lay_out_merge(nullptr, numel, extra).bytes;
    default:
      return -1;
  }
}
