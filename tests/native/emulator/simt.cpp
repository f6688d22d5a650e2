// The fibers behind simt.h. A fiber starts by ucontext; after that _setjmp and _longjmp switch, which, unlike
// swapcontext, make no system call.
//
// With COMMHOOKS_EMULATE_RACES (and the kernels built with -fsanitize=thread, this file without) each fiber is one to
// ThreadSanitizer, and only barriers, __syncwarp and atomics order them: races between the threads of a block, in
// shared or global memory, and between blocks are reported, whatever the schedule was.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include "simt.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <thread>
#include <vector>

#ifdef COMMHOOKS_EMULATE_RACES
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 * 1024;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Warp {
  int arrived = 0;
  char order[2];  // only their addresses matter
  uint64_t deposits[32];
  uint64_t results[32];
};

struct Block {
  unsigned index = 0;
  unsigned grid = 0;
  int threads = 0;
  int current = 0;
  int at_barrier = 0;
  char order[2];
  std::vector<unsigned> barriers;  // how many each thread has passed
  std::vector<unsigned> warp_barriers;
  const std::function<void()> *body = nullptr;
  jmp_buf scheduler;
  std::unique_ptr<jmp_buf[]> fibers;
  std::vector<ucontext_t> entries;
  std::vector<char> started;
  std::vector<State> states;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> stacks;
};

thread_local Block *block = nullptr;

#ifdef COMMHOOKS_EMULATE_RACES
thread_local ucontext_t scheduler_context;
thread_local void *scheduler_fiber = nullptr;
thread_local std::vector<void *> *race_fibers = nullptr;

void before(void *order) { __tsan_release(order); }
void after(void *order) { __tsan_acquire(order); }

void switch_out() {
  __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
  swapcontext(&block->entries[block->current], &scheduler_context);
}

void switch_to(int thread) {
  block->current = thread;
  __tsan_switch_to_fiber((*race_fibers)[thread], __tsan_switch_to_fiber_no_sync);
  swapcontext(&scheduler_context, &block->entries[thread]);
}
#else
void before(void *) {}
void after(void *) {}

void switch_out() {
  if (_setjmp(block->fibers[block->current]) == 0) _longjmp(block->scheduler, 1);
}

void switch_to(int thread) {
  block->current = thread;
  if (_setjmp(block->scheduler) != 0) return;
  if (block->started[thread]) _longjmp(block->fibers[thread], 1);
  block->started[thread] = 1;
  setcontext(&block->entries[thread]);
}
#endif

void fiber_main() {
  after(&block->order[0]);
  (*block->body)();
  before(&block->at_barrier);
  block->states[block->current] = State::kDone;
  switch_out();
}

uint64_t seed_from_environment() {
  const char *const text = getenv("COMMHOOKS_EMULATE_SEED");
  return text == nullptr ? 1 : strtoull(text, nullptr, 10) + 1;
}

[[noreturn]] void stuck() {
  int counts[4] = {0, 0, 0, 0};
  for (const State state : block->states) ++counts[static_cast<int>(state)];
  fprintf(stderr, "emulated block %u is stuck: %d threads at a barrier, %d at a warp exchange, %d returned\n",
          block->index, counts[1], counts[2], counts[3]);
  abort();
}

// Runs fibers in a shuffled order until all have returned.
void schedule() {
  uint64_t random = seed_from_environment() * 0x9E3779B97F4A7C15ull + block->index;
  int done = 0;
  while (done < block->threads) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    const int first = static_cast<int>((random >> 33) % static_cast<uint64_t>(block->threads));
    const bool backwards = (random >> 20 & 1) != 0;
    bool moved = false;
    for (int i = 0; i < block->threads; ++i) {
      const int thread = (first + (backwards ? block->threads - i : i)) % block->threads;
      if (block->states[thread] != State::kReady) continue;
      moved = true;
      switch_to(thread);
      if (block->states[thread] == State::kDone) ++done;
    }
    if (!moved) stuck();
  }
}

void run_block(Block *mine) {
  block = mine;
  const size_t threads = static_cast<size_t>(mine->threads);
  mine->fibers.reset(new jmp_buf[threads]);
  mine->entries.resize(threads);
  mine->started.assign(threads, 0);
  mine->barriers.assign(threads, 0);
  mine->warp_barriers.assign(threads, 0);
  mine->states.assign(threads, State::kReady);
  mine->warps.resize(threads / 32);
  mine->stacks.reset(new char[threads * kStackBytes]);
  for (size_t thread = 0; thread < threads; ++thread) {
    ucontext_t *const fiber = &mine->entries[thread];
    getcontext(fiber);
    fiber->uc_stack.ss_sp = mine->stacks.get() + thread * kStackBytes;
    fiber->uc_stack.ss_size = kStackBytes;
    fiber->uc_link = nullptr;
    makecontext(fiber, fiber_main, 0);
  }
#ifdef COMMHOOKS_EMULATE_RACES
  std::vector<void *> fibers;
  scheduler_fiber = __tsan_get_current_fiber();
  // What the launching thread wrote comes before every fiber: without the flag creation is no synchronisation, but a
  // switch with synchronisation at the start is.
  for (size_t thread = 0; thread < threads; ++thread) fibers.push_back(__tsan_create_fiber(0));
  race_fibers = &fibers;
  __tsan_release(&mine->order[0]);
#endif
  schedule();
#ifdef COMMHOOKS_EMULATE_RACES
  __tsan_acquire(&mine->at_barrier);
  for (void *const fiber : fibers) __tsan_destroy_fiber(fiber);
#endif
}

}  // namespace

Dimension thread_index() { return {static_cast<unsigned>(block->current)}; }
Dimension block_index() { return {block->index}; }
Dimension grid_size() { return {block->grid}; }

void launch(int blocks, int threads, const std::function<void()> &body) {
  std::vector<std::unique_ptr<Block>> state;
  std::vector<std::thread> running;
  for (int index = 0; index < blocks; ++index) {
    state.emplace_back(new Block);
    Block *const mine = state.back().get();
    mine->index = static_cast<unsigned>(index);
    mine->grid = static_cast<unsigned>(blocks);
    mine->threads = threads;
    mine->body = &body;
    running.emplace_back(run_block, mine);
  }
  for (std::thread &thread : running) thread.join();
}

void block_barrier() {
  char *const order = &block->order[++block->barriers[block->current] & 1];
  before(order);
  if (++block->at_barrier == block->threads) {
    block->at_barrier = 0;
    for (State &state : block->states) {
      if (state == State::kAtBarrier) state = State::kReady;
    }
  } else {
    block->states[block->current] = State::kAtBarrier;
    switch_out();
  }
  after(order);
}

void warp_barrier() {
  char *const order = &block->warps[block->current / 32].order[++block->warp_barriers[block->current] & 1];
  before(order);
  warp_exchange(0);
  after(order);
}

const uint64_t *warp_exchange(uint64_t value) {
  const int first = block->current / 32 * 32;
  Warp *const warp = &block->warps[block->current / 32];
  warp->deposits[block->current - first] = value;
  if (++warp->arrived == 32) {
    warp->arrived = 0;
    memcpy(warp->results, warp->deposits, sizeof(warp->results));
    for (int lane = 0; lane < 32; ++lane) {
      if (block->states[first + lane] == State::kAtWarp) block->states[first + lane] = State::kReady;
    }
    return warp->results;
  }
  block->states[block->current] = State::kAtWarp;
  switch_out();
  return warp->results;
}

void yield() {
  std::this_thread::yield();
  switch_out();
}

void misaligned(const void *pointer) {
  fprintf(stderr, "emulated misaligned access at %p\n", pointer);
  abort();
}

}  // namespace simt
