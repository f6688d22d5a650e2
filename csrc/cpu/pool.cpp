#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace commhooks {
namespace {

// Long enough to bridge the gap between the phases of one call, short enough not to burn a core between calls.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Clears flush-to-zero and denormals-are-zero for its lifetime (torch.set_flush_denormal sets them per thread).
class KeepDenormals {
 public:
#if defined(__x86_64__)
  KeepDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~KeepDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  KeepDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ & ~(1ull << 24)));
  }
  ~KeepDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  unsigned long long saved_;
#endif
};

struct Job {
  void (*task)(void *, int);
  void *context;
};

struct Worker {
  std::atomic<const Job *> job{nullptr};
  std::mutex mutex;
  std::condition_variable wake;
};

class Pool {
 public:
  // Runs the tasks, or returns false when the pool is in use or has too few threads.
  bool run(int tasks, const Job &job) {
    if (!busy_.try_lock()) return false;
    const std::lock_guard<std::mutex> owner(busy_, std::adopt_lock);
    if (!grow(tasks - 1)) return false;
    remaining_.store(tasks - 1, std::memory_order_relaxed);
    for (int i = 0; i + 1 < tasks; ++i) {
      Worker &worker = *workers_[static_cast<size_t>(i)];
      {
        const std::lock_guard<std::mutex> lock(worker.mutex);
        worker.job.store(&job, std::memory_order_release);
      }
      worker.wake.notify_one();
    }
    job.task(job.context, 0);
    for (int spin = 0; spin < kSpins && remaining_.load(std::memory_order_acquire) != 0; ++spin) relax();
    if (remaining_.load(std::memory_order_acquire) != 0) {
      std::unique_lock<std::mutex> lock(done_mutex_);
      done_.wait(lock, [this] { return remaining_.load(std::memory_order_acquire) == 0; });
    }
    return true;
  }

 private:
  bool grow(int size) {
    try {
      while (static_cast<int>(workers_.size()) < size) {
        workers_.push_back(std::make_unique<Worker>());
        const int index = static_cast<int>(workers_.size());
        try {
          // Detached: a pool lives as long as the process, and exit must not wait for sleeping threads.
          std::thread(&Pool::serve, this, workers_.back().get(), index).detach();
        } catch (...) {
          workers_.pop_back();
          throw;
        }
      }
    } catch (...) {
      return false;
    }
    return true;
  }

  void serve(Worker *worker, int index) {
    const KeepDenormals mode;
    for (;;) {
      const Job *job = nullptr;
      for (int spin = 0; spin < kSpins && job == nullptr; ++spin) {
        job = worker->job.load(std::memory_order_acquire);
        if (job == nullptr) relax();
      }
      if (job == nullptr) {
        std::unique_lock<std::mutex> lock(worker->mutex);
        worker->wake.wait(lock, [worker] { return worker->job.load(std::memory_order_acquire) != nullptr; });
        job = worker->job.load(std::memory_order_acquire);
      }
      worker->job.store(nullptr, std::memory_order_relaxed);
      job->task(job->context, index);
      if (remaining_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        const std::lock_guard<std::mutex> lock(done_mutex_);
        done_.notify_one();
      }
    }
  }

  std::mutex busy_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<int> remaining_{0};
  std::mutex done_mutex_;
  std::condition_variable done_;
};

std::atomic<Pool *> g_pool{nullptr};

// A fork copies the pool without its threads, perhaps with a lock held: the child forgets it and builds its own.
void forget_pool() { g_pool.store(nullptr, std::memory_order_relaxed); }

Pool *shared_pool() {
  Pool *pool = g_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return pool;
#if !defined(_WIN32)
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
#endif
  std::unique_ptr<Pool> fresh(new Pool);
  if (g_pool.compare_exchange_strong(pool, fresh.get(), std::memory_order_acq_rel)) return fresh.release();
  return pool;
}

}  // namespace

void run_tasks(int tasks, void (*task)(void *, int), void *context) {
  const KeepDenormals mode;
  if (tasks > 1) {
    const Job job{task, context};
    if (shared_pool()->run(tasks, job)) return;
  }
  for (int i = 0; i < tasks; ++i) task(context, i);
}

}  // namespace commhooks
