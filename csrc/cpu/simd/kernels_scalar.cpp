#include "simd/kernels_impl.h"

namespace commhooks {
namespace {

void stream(void *destination, const void *source, int64_t bytes) {
  if (source == nullptr) {
    memset(destination, 0, static_cast<size_t>(bytes));
  } else {
    memcpy(destination, source, static_cast<size_t>(bytes));
  }
}

}  // namespace

const Kernels kScalarKernels = make_kernels<ScalarVector>("scalar", stream);

}  // namespace commhooks
