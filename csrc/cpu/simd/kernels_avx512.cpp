#include "simd/kernels_impl.h"
#include "simd/merge_avx512.h"
#include "simd/vector_avx512.h"

namespace commhooks {
namespace {

void stream(void *destination, const void *source, int64_t bytes) {
  char *to = static_cast<char *>(destination);
  const char *from = static_cast<const char *>(source);
  for (int64_t i = 0; i < bytes; i += 64) {
    const __m512i line = from != nullptr ? _mm512_loadu_si512(from + i) : _mm512_setzero_si512();
    _mm512_stream_si512(reinterpret_cast<__m512i *>(to + i), line);
  }
}

}  // namespace

const Kernels kAvx512Kernels = make_kernels<Avx512Vector>("avx512", stream, unite_avx512);

}  // namespace commhooks
