// Order between streaming stores and what other threads read.
#ifndef COMMHOOKS_CPU_FENCE_H
#define COMMHOOKS_CPU_FENCE_H

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace commhooks {

// Makes the streaming stores of this thread visible before what it stores next.
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace commhooks
#endif
