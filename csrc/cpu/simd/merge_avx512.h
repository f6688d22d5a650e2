// gTop-k's merge with AVX-512: sixteen elements of both inputs are merged at a time by a bitonic network.
//
// An index and the list it comes from go through the network as one number, 2 * index + (0 for a, 1 for b):
// below 2^32, and of an index that both have, a's comes first. Values follow without being moved around:
// those of a list come in the order of its keys.
#ifndef COMMHOOKS_CPU_MERGE_AVX512_H
#define COMMHOOKS_CPU_MERGE_AVX512_H

#include <immintrin.h>

#include "simd/kernels.h"

namespace commhooks {
namespace {

// The first `count` lanes of sixteen (all when it is more).
inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<uint32_t>(count < 16 ? count : 16)));
}

// Sorts a bitonic vector of unsigned numbers.
inline __m512i sort_bitonic(__m512i x) {
  __m512i y = _mm512_shuffle_i64x2(x, x, 0x4e);
  x = _mm512_mask_mov_epi32(_mm512_min_epu32(x, y), 0xff00, _mm512_max_epu32(x, y));
  y = _mm512_permutex_epi64(x, 0x4e);
  x = _mm512_mask_mov_epi32(_mm512_min_epu32(x, y), 0xf0f0, _mm512_max_epu32(x, y));
  y = _mm512_shuffle_epi32(x, _MM_PERM_BADC);
  x = _mm512_mask_mov_epi32(_mm512_min_epu32(x, y), 0xcccc, _mm512_max_epu32(x, y));
  y = _mm512_shuffle_epi32(x, _MM_PERM_CDAB);
  return _mm512_mask_mov_epi32(_mm512_min_epu32(x, y), 0xaaaa, _mm512_max_epu32(x, y));
}

// Hands out the keys of both lists in vectors of one list, the one with the smaller next index first.
class KeySource {
 public:
  KeySource(const MergeInput &in, const Stretch &s)
      : a_(in.indices_a + s.begin_a),
        b_(in.indices_b + s.begin_b),
        left_a_(s.end_a - s.begin_a),
        left_b_(s.end_b - s.begin_b) {}

  bool empty() const { return left_a_ <= 0 && left_b_ <= 0; }

  // Behind the end of its list a vector is filled with what is larger than any key.
  __m512i take() {
    const int64_t head_a = left_a_ > 0 ? *a_ : INT64_MAX;
    const int64_t head_b = left_b_ > 0 ? *b_ : INT64_MAX;
    // All ones when b is next. A branch would be mispredicted half of the time, and GCC makes one of a
    // condition.
    const int64_t b_next = (head_b - head_a) >> 63;
    const int32_t *next = pick(a_, b_, b_next);
    const int64_t left = left_a_ ^ ((left_a_ ^ left_b_) & b_next);
    const int64_t step_b = kLanes & b_next;
    const int64_t step_a = kLanes - step_b;
    a_ += step_a;
    left_a_ -= step_a;
    b_ += step_b;
    left_b_ -= step_b;
    const __m512i indices = _mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), first_lanes(left), next);
    return _mm512_sub_epi32(_mm512_slli_epi32(indices, 1), _mm512_set1_epi32(static_cast<int32_t>(b_next)));
  }

 private:
  static constexpr int64_t kLanes = 16;

  static const int32_t *pick(const int32_t *a, const int32_t *b, int64_t b_next) {
    const uintptr_t from_a = reinterpret_cast<uintptr_t>(a);
    const uintptr_t from_b = reinterpret_cast<uintptr_t>(b);
    return reinterpret_cast<const int32_t *>(from_a ^ ((from_a ^ from_b) & static_cast<uintptr_t>(b_next)));
  }

  const int32_t *a_;
  const int32_t *b_;
  int64_t left_a_;
  int64_t left_b_;
};

// Writes the union from the sorted keys.
class Uniter {
 public:
  Uniter(const MergeInput &in, const Stretch &s)
      : a_(in.values_a + s.begin_a),
        b_(in.values_b + s.begin_b),
        left_a_(s.end_a - s.begin_a),
        left_b_(s.end_b - s.begin_b),
        out_(s),
        keys_(_mm512_set1_epi32(-1)),
        values_(_mm512_setzero_ps()) {}

  // The next sixteen keys, of which those that no list has come last.
  void put(__m512i keys) {
    const uint32_t lanes = first_lanes(left_a_ + left_b_);
    const uint32_t in_b = _mm512_test_epi32_mask(keys, _mm512_set1_epi32(1)) & lanes;
    const uint32_t in_a = lanes & ~in_b;
    const __m512 from_a = _mm512_maskz_loadu_ps(first_lanes(left_a_), a_);
    const __m512 from_b = _mm512_maskz_loadu_ps(first_lanes(left_b_), b_);
    __m512 values = _mm512_maskz_expand_ps(static_cast<__mmask16>(in_b), from_b);
    values = _mm512_mask_expand_ps(values, static_cast<__mmask16>(in_a), from_a);
    // An index that both have is two neighbours. Only the second stays; a first one at the end of the last
    // vector has been written already and is overwritten.
    const __m512i before = _mm512_alignr_epi32(keys, keys_, 15);
    const __m512i twin = _mm512_or_si512(before, _mm512_set1_epi32(1));
    const uint32_t second = _mm512_cmpeq_epi32_mask(keys, twin) & in_b;
    const __m512 value_before = _mm512_castsi512_ps(
        _mm512_alignr_epi32(_mm512_castps_si512(values), _mm512_castps_si512(values_), 15));
    values = _mm512_mask_add_ps(values, static_cast<__mmask16>(second), value_before, values);
    size_ -= second & 1u;
    const __mmask16 kept = static_cast<__mmask16>(lanes & ~(second >> 1));
    __m512i tags = _mm512_mask_mov_epi32(_mm512_set1_epi32(1), static_cast<__mmask16>(in_b), _mm512_set1_epi32(2));
    tags = _mm512_mask_mov_epi32(tags, static_cast<__mmask16>(second), _mm512_set1_epi32(3));
    _mm512_storeu_ps(out_.values + size_, _mm512_maskz_compress_ps(kept, values));
    _mm512_storeu_si512(out_.indices + size_, _mm512_maskz_compress_epi32(kept, _mm512_srli_epi32(keys, 1)));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out_.tags + size_),
                     _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(kept, tags)));
    size_ += __builtin_popcount(kept);
    const int taken_a = __builtin_popcount(in_a);
    const int taken_b = __builtin_popcount(in_b);
    a_ += taken_a;
    b_ += taken_b;
    left_a_ -= taken_a;
    left_b_ -= taken_b;
    keys_ = keys;
    values_ = values;
  }

  int64_t size() const { return size_; }

 private:
  const float *a_;
  const float *b_;
  int64_t left_a_;
  int64_t left_b_;
  Stretch out_;
  int64_t size_ = 0;
  __m512i keys_;
  __m512 values_;
};

inline int64_t unite_one(const MergeInput &in, const Stretch &s) {
  KeySource source(in, s);
  Uniter uniter(in, s);
  if (source.empty()) return 0;
  const __m512i backwards = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i high = source.take();
  while (!source.empty()) {
    // The sixteen smallest of what is left are among these two vectors.
    const __m512i next = _mm512_permutexvar_epi32(backwards, source.take());
    const __m512i low = _mm512_min_epu32(high, next);
    high = sort_bitonic(_mm512_max_epu32(high, next));
    uniter.put(sort_bitonic(low));
  }
  uniter.put(high);
  return uniter.size();
}

inline void unite_avx512(const MergeInput &in, Stretch *stretches, int count) {
  for (int i = 0; i < count; ++i) stretches[i].size = unite_one(in, stretches[i]);
}

}  // namespace
}  // namespace commhooks
#endif
