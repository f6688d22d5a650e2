#include "simd/kernels_impl.h"
#include "simd/vector_neon.h"

namespace commhooks {
namespace {

void stream(void *destination, const void *source, int64_t bytes) {
  char *to = static_cast<char *>(destination);
  const char *from = static_cast<const char *>(source);
  const uint8x16_t zero = vdupq_n_u8(0);
  // AArch64 has no streaming vector store in the intrinsics; whole-line stores avoid most of the reads
  // anyway.
  for (int64_t i = 0; i < bytes; i += 16) {
    const uint8x16_t line = from != nullptr ? vld1q_u8(reinterpret_cast<const uint8_t *>(from + i)) : zero;
    vst1q_u8(reinterpret_cast<uint8_t *>(to + i), line);
  }
}

}  // namespace

const Kernels kNeonKernels = make_kernels<NeonVector>("neon", stream);

}  // namespace commhooks
