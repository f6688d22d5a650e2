// Eight lanes of AVX2 (with F16C). No library templates (kernels.h).
#ifndef COMMHOOKS_CPU_VECTOR_AVX2_H
#define COMMHOOKS_CPU_VECTOR_AVX2_H

#include <immintrin.h>
#include <stdint.h>

#include "simd/bytes.h"

namespace commhooks {
namespace {

// For each of the 256 lane sets: the chosen lanes' numbers, densely, a byte each.
struct CompressTable {
  alignas(64) uint8_t lane[256][8];
  constexpr CompressTable() : lane{} {
    for (int set = 0; set < 256; ++set) {
      int count = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if (((set >> bit) & 1) != 0) lane[set][count++] = static_cast<uint8_t>(bit);
      }
    }
  }
};
constexpr CompressTable kCompress{};

// The inverse: for each lane the number of the element that it gets.
struct ExpandTable {
  alignas(64) uint8_t lane[256][8];
  constexpr ExpandTable() : lane{} {
    for (int set = 0; set < 256; ++set) {
      int count = 0;
      for (int bit = 0; bit < 8; ++bit) {
        lane[set][bit] = static_cast<uint8_t>(count);
        if (((set >> bit) & 1) != 0 && count < 7) ++count;
      }
    }
  }
};
constexpr ExpandTable kExpand{};

struct Avx2Vector {
  static constexpr int kLanes = 8;
  using Float = __m256;

  static Float load(const float *p) { return _mm256_loadu_ps(p); }
  static Float load_bf16(const uint16_t *p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static Float load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  }
  static void store(float *p, Float x) { _mm256_storeu_ps(p, x); }
  static void stream(float *p, Float x) { _mm256_stream_ps(p, x); }
  static Float broadcast(float x) { return _mm256_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  // For low-bit messages.
  using Mask = __m256;
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float magnitude(Float x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  static Float clamp(Float x, Float low, Float high) { return _mm256_min_ps(_mm256_max_ps(x, low), high); }
  static Float larger_key(Float a, Float b) {
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  static Mask at_least(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static Float choose(Mask mask, Float a, Float b) { return _mm256_blendv_ps(b, a, mask); }
  static Bytes16 low_bytes(const Float *x) {
    const __m256i byte = _mm256_set1_epi32(0xff);
    const __m256i words = _mm256_packus_epi32(_mm256_and_si256(_mm256_castps_si256(x[0]), byte),
                                              _mm256_and_si256(_mm256_castps_si256(x[1]), byte));
    // Each half holds four bytes of x[0] and then four of x[1].
    const __m256i packed = _mm256_packus_epi16(words, words);
    const uint64_t first = static_cast<uint64_t>(_mm256_extract_epi64(packed, 0));
    const uint64_t second = static_cast<uint64_t>(_mm256_extract_epi64(packed, 2));
    return {(first & 0xffffffffu) | second << 32, first >> 32 | (second & ~uint64_t{0xffffffffu})};
  }
  static void from_bytes(Bytes16 bytes, Float *x) {
    x[0] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes.low))));
    x[1] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes.high))));
  }
  static uint32_t above(Float x, uint32_t key) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    const __m256i larger = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(static_cast<int32_t>(key)));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(larger)));
  }
  static Float clear(Float x, uint32_t lanes) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(lanes)), bit);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)), x);
  }
  static __m256i places(uint32_t lanes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(kCompress.lane[lanes])));
  }
  static void compress(float *p, Float x, uint32_t lanes) {
    _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(x, places(lanes)));
  }
  static void compress_indices(int32_t *p, int32_t first, uint32_t lanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_add_epi32(places(lanes), _mm256_set1_epi32(first)));
  }
  static void compress_loaded(int32_t *p, const int32_t *source, uint32_t lanes) {
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(source));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_permutevar8x32_epi32(loaded, places(lanes)));
  }
  static uint32_t tagged(const uint8_t *tags, int bit) {
    const __m128i tag = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(tags));
    return static_cast<uint32_t>(_mm_movemask_epi8(_mm_slli_epi16(tag, 7 - bit))) & 0xffu;
  }
  static __m256i sources(uint32_t lanes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(kExpand.lane[lanes])));
  }
  static __m256i lane_mask(uint32_t lanes) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(lanes)), bit), bit);
  }
  // Lanes that are not chosen hold anything: join masks them.
  static Float expand(const float *p, uint32_t lanes) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), sources(lanes));
  }
  static __m256i expand(const int32_t *p, uint32_t lanes) {
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return _mm256_permutevar8x32_epi32(loaded, sources(lanes));
  }
  static Float join(Float a, Float b, uint32_t in_a, uint32_t in_b) {
    const Float one = _mm256_blendv_ps(b, a, _mm256_castsi256_ps(lane_mask(in_a)));
    return _mm256_blendv_ps(one, _mm256_add_ps(a, b), _mm256_castsi256_ps(lane_mask(in_a & in_b)));
  }
  static __m256i join(__m256i a, __m256i b, uint32_t in_a, uint32_t) {
    return _mm256_blendv_epi8(b, a, lane_mask(in_a));
  }
  static void store(int32_t *p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), x); }
  static void bytes(uint8_t *p, uint32_t kept, uint32_t lanes) {
    const uint64_t dense = _pdep_u64(_pext_u32(kept, lanes), 0x0101010101010101u);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_cvtsi64_si128(static_cast<long long>(dense)));
  }
};

}  // namespace
}  // namespace commhooks
#endif
