#include "simd/kernels_impl.h"
#include "simd/vector_avx2.h"

namespace commhooks {
namespace {

void stream(void *destination, const void *source, int64_t bytes) {
  char *to = static_cast<char *>(destination);
  const char *from = static_cast<const char *>(source);
  for (int64_t i = 0; i < bytes; i += 32) {
    const __m256i half_line = from != nullptr ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i))
                                              : _mm256_setzero_si256();
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to + i), half_line);
  }
}

}  // namespace

const Kernels kAvx2Kernels = make_kernels<Avx2Vector>("avx2", stream);

}  // namespace commhooks
