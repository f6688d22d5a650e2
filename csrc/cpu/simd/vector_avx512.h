// Sixteen lanes of AVX-512 (F, BW, DQ, VL). No library templates (kernels.h).
#ifndef COMMHOOKS_CPU_VECTOR_AVX512_H
#define COMMHOOKS_CPU_VECTOR_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#include "simd/bytes.h"

namespace commhooks {
namespace {

struct Avx512Vector {
  static constexpr int kLanes = 16;
  using Float = __m512;

  static Float load(const float *p) { return _mm512_loadu_ps(p); }
  static Float load_bf16(const uint16_t *p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Float load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  }
  static void store(float *p, Float x) { _mm512_storeu_ps(p, x); }
  static void stream(float *p, Float x) { _mm512_stream_ps(p, x); }
  static Float broadcast(float x) { return _mm512_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  // For low-bit messages.
  using Mask = __mmask16;
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float magnitude(Float x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
  }
  static Float clamp(Float x, Float low, Float high) { return _mm512_min_ps(_mm512_max_ps(x, low), high); }
  static Float larger_key(Float a, Float b) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static Mask at_least(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Float choose(Mask mask, Float a, Float b) { return _mm512_mask_mov_ps(b, mask, a); }
  static Bytes16 low_bytes(const Float *x) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_castps_si512(x[0]));
    return {static_cast<uint64_t>(_mm_cvtsi128_si64(bytes)), static_cast<uint64_t>(_mm_extract_epi64(bytes, 1))};
  }
  static void from_bytes(Bytes16 bytes, Float *x) {
    const __m128i both = _mm_set_epi64x(static_cast<long long>(bytes.high), static_cast<long long>(bytes.low));
    x[0] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(both));
  }
  static uint32_t above(Float x, uint32_t key) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    return _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(static_cast<int32_t>(key)));
  }
  static Float clear(Float x, uint32_t lanes) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(~lanes), x);
  }
  // Compressed in a register and stored whole: compressing straight to memory is microcoded on Zen 4.
  static void compress(float *p, Float x, uint32_t lanes) {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), x));
  }
  static void compress_indices(int32_t *p, int32_t first, uint32_t lanes) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i chosen = _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), lane);
    _mm512_storeu_si512(p, _mm512_add_epi32(chosen, _mm512_set1_epi32(first)));
  }
  static void compress_loaded(int32_t *p, const int32_t *source, uint32_t lanes) {
    const __m512i loaded = _mm512_loadu_si512(source);
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), loaded));
  }
  static uint32_t tagged(const uint8_t *tags, int bit) {
    const __m128i tag = _mm_loadu_si128(reinterpret_cast<const __m128i *>(tags));
    return _mm_test_epi8_mask(tag, _mm_set1_epi8(static_cast<char>(1 << bit)));
  }
  static Float expand(const float *p, uint32_t lanes) {
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(lanes), _mm512_loadu_ps(p));
  }
  static __m512i expand(const int32_t *p, uint32_t lanes) {
    return _mm512_maskz_expand_epi32(static_cast<__mmask16>(lanes), _mm512_loadu_si512(p));
  }
  static Float join(Float a, Float b, uint32_t in_a, uint32_t in_b) {
    const Float one = _mm512_mask_mov_ps(a, static_cast<__mmask16>(~in_a), b);
    return _mm512_mask_add_ps(one, static_cast<__mmask16>(in_a & in_b), a, b);
  }
  static __m512i join(__m512i a, __m512i b, uint32_t in_a, uint32_t) {
    return _mm512_mask_mov_epi32(a, static_cast<__mmask16>(~in_a), b);
  }
  static void store(int32_t *p, __m512i x) { _mm512_storeu_si512(p, x); }
  static void bytes(uint8_t *p, uint32_t kept, uint32_t lanes) {
    const __m128i set = _mm_movm_epi8(static_cast<__mmask16>(_pext_u32(kept, lanes)));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm_and_si128(set, _mm_set1_epi8(1)));
  }
};

}  // namespace
}  // namespace commhooks
#endif
