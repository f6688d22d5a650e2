// Sixteen codes, a byte each, and their packing into 1, 2, 4 or 8 bits. No library templates (kernels.h).
#ifndef COMMHOOKS_CPU_BYTES_H
#define COMMHOOKS_CPU_BYTES_H

#include <stdint.h>
#include <string.h>

#if defined(__BMI2__)
#include <immintrin.h>
#endif

namespace commhooks {
namespace {

struct Bytes16 {
  uint64_t low;   // the first eight, the first of them in the lowest byte
  uint64_t high;
};

// The lowest `width` bits of every `gap` bits.
constexpr uint64_t low_bits_of_each(int width, int gap) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += gap) mask |= ((uint64_t{1} << width) - 1) << at;
  return mask;
}

// The lowest kBits bits of each of eight bytes, one after the other; the other bits of a byte are 0.
template <int kBits>
inline uint64_t compact(uint64_t bytes) {
#if defined(__BMI2__)
  return _pext_u64(bytes, low_bits_of_each(kBits, 8));
#else
  // Neighbours move together, then neighbouring pairs, then fours.
  bytes = (bytes | bytes >> (8 - kBits)) & low_bits_of_each(2 * kBits, 16);
  bytes = (bytes | bytes >> (16 - 2 * kBits)) & low_bits_of_each(4 * kBits, 32);
  return (bytes | bytes >> (32 - 4 * kBits)) & ((uint64_t{1} << (8 * kBits)) - 1);
#endif
}

// The inverse: eight codes of kBits bits, a byte each.
template <int kBits>
inline uint64_t spread(uint64_t codes) {
#if defined(__BMI2__)
  return _pdep_u64(codes, low_bits_of_each(kBits, 8));
#else
  codes = (codes | codes << (32 - 4 * kBits)) & low_bits_of_each(4 * kBits, 32);
  codes = (codes | codes << (16 - 2 * kBits)) & low_bits_of_each(2 * kBits, 16);
  return (codes | codes << (8 - kBits)) & low_bits_of_each(kBits, 8);
#endif
}

// Writes 16 codes as 2 kBits bytes. Little-endian machines only, like the format.
template <int kBits>
inline void put_codes(uint8_t *to, Bytes16 bytes) {
  if constexpr (kBits == 8) {
    memcpy(to, &bytes, 16);
  } else {
    const uint64_t low = compact<kBits>(bytes.low);
    const uint64_t high = compact<kBits>(bytes.high);
    memcpy(to, &low, kBits);
    memcpy(to + kBits, &high, kBits);
  }
}

template <int kBits>
inline Bytes16 get_codes(const uint8_t *from) {
  Bytes16 bytes{0, 0};
  if constexpr (kBits == 8) {
    memcpy(&bytes, from, 16);
  } else {
    memcpy(&bytes.low, from, kBits);
    memcpy(&bytes.high, from + kBits, kBits);
    bytes = {spread<kBits>(bytes.low), spread<kBits>(bytes.high)};
  }
  return bytes;
}

}  // namespace
}  // namespace commhooks
#endif
