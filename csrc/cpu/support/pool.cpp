#include "support/pool.h"

#include <algorithm>
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

// A worker spins through the gap between two phases of a call, and sleeps between calls.
constexpr int kSpins = 2000;

constexpr int64_t kSharesPerThread = 8;
constexpr int64_t kElementsPerShare = 1 << 18;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Clears flush-to-zero and denormals-are-zero for its lifetime (torch.set_flush_denormal sets them per
// thread).
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
  void (*task)(void *, int, int);
  void *context;
  int tasks;
  std::atomic<int> next{0};

  // Takes tasks until there are none.
  void work(int thread) {
    for (int i = next.fetch_add(1, std::memory_order_relaxed); i < tasks;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      task(context, i, thread);
    }
  }
};

struct Worker {
  std::atomic<Job *> job{nullptr};
  std::mutex mutex;
  std::condition_variable wake;
};

class Pool {
 public:
  // Runs the job, or returns false when the pool is in use or has too few threads.
  bool run(int threads, Job &job) {
    if (!busy_.try_lock()) return false;
    const std::lock_guard<std::mutex> owner(busy_, std::adopt_lock);
    if (!grow(threads - 1)) return false;
    remaining_.store(threads - 1, std::memory_order_relaxed);
    for (int i = 0; i + 1 < threads; ++i) {
      Worker &worker = *workers_[static_cast<size_t>(i)];
      {
        const std::lock_guard<std::mutex> lock(worker.mutex);
        worker.job.store(&job, std::memory_order_release);
      }
      worker.wake.notify_one();
    }
    job.work(0);
    // No task is left. A worker that has not started on the job is not waited for.
    for (int i = 0; i + 1 < threads; ++i) {
      if (workers_[static_cast<size_t>(i)]->job.exchange(nullptr, std::memory_order_acq_rel) != nullptr) {
        remaining_.fetch_sub(1, std::memory_order_acq_rel);
      }
    }
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
      for (int spin = 0; spin < kSpins && worker->job.load(std::memory_order_relaxed) == nullptr; ++spin) relax();
      if (worker->job.load(std::memory_order_relaxed) == nullptr) {
        std::unique_lock<std::mutex> lock(worker->mutex);
        worker->wake.wait(lock, [worker] { return worker->job.load(std::memory_order_relaxed) != nullptr; });
      }
      // The job belongs to whoever exchanges it for nullptr: this worker, or the caller, who then does not
      // wait.
      Job *job = worker->job.exchange(nullptr, std::memory_order_acq_rel);
      if (job == nullptr) continue;
      job->work(index);
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

// A fork copies the pool without its threads, perhaps with a lock held. So the child drops it and builds its
// own.
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

int share_count(int64_t elements, int threads) {
  if (threads == 1) return 1;
  return threads * static_cast<int>(std::clamp<int64_t>(elements / threads / kElementsPerShare, 1, kSharesPerThread));
}

void run_tasks(int threads, int tasks, void (*task)(void *, int, int), void *context) {
  const KeepDenormals mode;
  Job job{task, context, tasks};
  if (threads > 1 && tasks > 1 && shared_pool()->run(std::min(threads, tasks), job)) return;
  job.work(0);
}

}  // namespace commhooks
