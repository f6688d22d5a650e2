// A small thread pool of the library's own.
#ifndef COMMHOOKS_CPU_POOL_H
#define COMMHOOKS_CPU_POOL_H

#include <stdint.h>

#include <type_traits>

namespace commhooks {

// Into how many shares to cut `elements` for `threads` threads: more than one each, so that what a thread whose core is
// taken by something else does not get to, the others do; none too short to be worth handing out.
int share_count(int64_t elements, int threads);

// Runs task(context, index, thread) for all indices in [0, tasks) and returns when all are done. `thread` is below
// `threads`, and 0 is the caller; each takes the next index when it is free, so indices ascend for every thread, and one
// that the system wakes late, because something else has its core, leaves the work to the others. When the pool is busy
// with another caller, or threads cannot be had, the caller runs all tasks: results must not depend on who runs one.
// Denormals are kept in every task, whatever the caller's floating-point mode.
void run_tasks(int threads, int tasks, void (*task)(void *context, int index, int thread), void *context);

// The same with a callable `void f(int index)` or `void f(int index, int thread)`. It must not throw.
template <class F>
void parallel(int threads, int tasks, F &&f) {
  using Callable = typename std::remove_reference<F>::type;
  run_tasks(
      threads, tasks,
      [](void *context, int index, int thread) {
        Callable &callable = *static_cast<Callable *>(context);
        if constexpr (std::is_invocable_v<Callable &, int, int>) {
          callable(index, thread);
        } else {
          (void)thread;
          callable(index);
        }
      },
      const_cast<void *>(static_cast<const void *>(&f)));
}

}  // namespace commhooks
#endif
