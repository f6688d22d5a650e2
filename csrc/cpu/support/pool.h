// A small thread pool of the library's own.
#ifndef COMMHOOKS_CPU_POOL_H
#define COMMHOOKS_CPU_POOL_H

#include <stdint.h>

#include <type_traits>

namespace commhooks {

// Number of shares into which `elements` are cut for `threads` threads. There are several for each thread:
// other threads take the shares of one whose core is busy with another process. No share is so short that
// handing it out costs more than its work.
int share_count(int64_t elements, int threads);

// Runs task(context, index, thread) for all indices in [0, tasks) and returns when all are done. `thread` is
// below `threads`; 0 is the caller. Each thread takes the next index when it is free, so indices ascend for
// every thread, and a thread that wakes late leaves its work to the others. When the pool serves another
// caller, or threads cannot be started, the caller runs all tasks: results must not depend on which thread
// runs a task. Denormals are kept in every task, whatever the caller's floating-point mode.
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
