#ifndef COMMHOOKS_CPU_INDICES_H
#define COMMHOOKS_CPU_INDICES_H

#include <stdint.h>

namespace commhooks {

// Whether `indices` ascend, are unique, lie in [0, numel) and have padding only at the end.
bool valid_indices(const int32_t *indices, int64_t k, int64_t numel);

// How many of valid indices are not padding.
int64_t used_indices(const int32_t *indices, int64_t k);

}  // namespace commhooks
#endif
