// A small thread pool of the library's own.
#ifndef COMMHOOKS_CPU_POOL_H
#define COMMHOOKS_CPU_POOL_H

#include <type_traits>

namespace commhooks {

// Runs task(context, 0) .. task(context, tasks - 1), the first on the calling thread, and returns when all are done.
// When the pool is busy with another caller, or threads cannot be had, the caller runs all of them in order: results
// never depend on who runs a task. Denormals are kept in every task, whatever the caller's floating-point mode.
void run_tasks(int tasks, void (*task)(void *context, int index), void *context);

// The same with a callable `void f(int index)`. It must not throw.
template <class F>
void parallel(int tasks, F &&f) {
  using Callable = typename std::remove_reference<F>::type;
  run_tasks(
      tasks, [](void *context, int index) { (*static_cast<Callable *>(context))(index); },
      const_cast<void *>(static_cast<const void *>(&f)));
}

}  // namespace commhooks
#endif
