// Several dependent phases in one kernel, without a cooperative launch.
//
// Blocks draw tickets from one counter; tickets are numbered phase by phase. Whoever holds a ticket of phase
// p first waits until all items of the phases before p are done. Those tickets were drawn earlier, so running
// blocks hold them, and the lowest unfinished ticket waits for nothing: progress needs no number of blocks to
// be resident at once.
#pragma once

#include "control.cuh"

namespace commhooks {

struct Item {
  int phase;       // num_phases: nothing is left
  uint32_t index;  // within the phase
};

// Work items per phase; the same numbers in every block of the grid.
struct Plan {
  uint32_t items[kMaxPhases];
  int num_phases;
};

// The next item of this block; waits for the phases before it. Every thread of the block must call it.
__device__ inline Item next_item(Schedule *schedule, const Plan &plan, uint32_t *shared) {
  uint32_t drawn = 0;
  if (threadIdx.x == 0) drawn = atomicAdd(&schedule->ticket, 1u);
  drawn = block_broadcast(drawn, shared);
  Item item{0, drawn};
  while (item.phase < plan.num_phases && item.index >= plan.items[item.phase]) {
    item.index -= plan.items[item.phase];
    ++item.phase;
  }
  if (item.phase == plan.num_phases) return item;
  if (threadIdx.x == 0) {
    for (int phase = 0; phase < item.phase; ++phase) {
      while (load_now(&schedule->done[phase]) < plan.items[phase]) __nanosleep(100);
    }
    fence_device();
  }
  __syncthreads();
  return item;
}

// Reports an item as done. Every thread of the block must call it, after its last store for the item. The
// barrier brings those stores before the fence of thread 0, which orders them before the count.
__device__ inline void finish_item(Schedule *schedule, const Item &item) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  fence_device();
  atomicAdd(&schedule->done[item.phase], 1u);
}

// The same; returns, in every thread, whether all items of the phase are done. Then their results may be
// read.
__device__ inline bool finish_item_as_last(Schedule *schedule, const Item &item, const Plan &plan, uint32_t *shared) {
  __syncthreads();
  uint32_t before = 0;
  if (threadIdx.x == 0) {
    fence_device();
    before = atomicAdd(&schedule->done[item.phase], 1u);
    fence_device();
  }
  return block_broadcast(before, shared) + 1 == plan.items[item.phase];
}

}  // namespace commhooks
