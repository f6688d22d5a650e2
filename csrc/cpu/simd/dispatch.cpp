// Chooses the instruction set at run time.
#include "simd/dispatch.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "commhooks_cpu.h"
#include "simd/processor.h"

namespace commhooks {
namespace {

bool supported(const Kernels &table) {
#if defined(COMMHOOKS_HAVE_X86)
  if (&table == &kAvx512Kernels) return processor_has_avx512();
  if (&table == &kAvx2Kernels) return processor_has_avx2();
#endif
  (void)table;
  return true;
}

// Best first.
const Kernels *const kTables[] = {
#if defined(COMMHOOKS_HAVE_X86)
    &kAvx512Kernels, &kAvx2Kernels,
#endif
#if defined(__aarch64__)
    &kNeonKernels,
#endif
    &kScalarKernels,
};

// The named table, or the best for nullptr; nullptr when it does not exist or this processor lacks it.
const Kernels *find(const char *name) {
  for (const Kernels *table : kTables) {
    if ((name == nullptr || strcmp(name, table->name) == 0) && supported(*table)) return table;
  }
  return nullptr;
}

const Kernels *initial() {
  const Kernels *asked = find(getenv("COMMHOOKS_ISA"));
  return asked != nullptr ? asked : find(nullptr);
}

std::atomic<const Kernels *> &current() {
  static std::atomic<const Kernels *> table{initial()};
  return table;
}

}  // namespace

const Kernels &kernels() { return *current().load(std::memory_order_acquire); }

}  // namespace commhooks

extern "C" int32_t commhooks_cpu_abi_version(void) { return COMMHOOKS_ABI_VERSION; }

extern "C" const char *commhooks_cpu_isa(void) { return commhooks::kernels().name; }

extern "C" int32_t commhooks_cpu_use_isa(const char *name) {
  const commhooks::Kernels *table = commhooks::find(name);
  if (table == nullptr) return COMMHOOKS_INVALID;
  commhooks::current().store(table, std::memory_order_release);
  return COMMHOOKS_OK;
}
