#ifndef COMMHOOKS_CPU_PROCESSOR_H
#define COMMHOOKS_CPU_PROCESSOR_H

namespace commhooks {

// What kernels_avx2.cpp and kernels_avx512.cpp are compiled for: the processor has the instructions, and the operating
// system saves their registers. x86-64 only.
bool processor_has_avx2();
bool processor_has_avx512();

}  // namespace commhooks
#endif
