// The integer hash behind every random choice of the library.
#ifndef COMMHOOKS_CPU_MIX_H
#define COMMHOOKS_CPU_MIX_H

#include <stdint.h>

namespace commhooks {

// The finaliser of splitmix64.
inline uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9u;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace commhooks
#endif
