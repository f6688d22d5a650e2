#ifndef COMMHOOKS_CPU_DISPATCH_H
#define COMMHOOKS_CPU_DISPATCH_H

#include "simd/kernels.h"

namespace commhooks {

// The kernels of the instruction set in use.
const Kernels &kernels();

}  // namespace commhooks
#endif
