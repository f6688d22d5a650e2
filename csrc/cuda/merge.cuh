// Scratch of merge_topk. Positions 0 .. size_a - 1 are the entries of a, then follow those of b.
#pragma once

#include "control.cuh"

namespace commhooks {

constexpr int kMergeTile = 2048;  // positions a block scans at once
constexpr int kMergeChunks = 4096;

struct MergeControl {
  Schedule schedule;
  uint32_t digit[kDigits][kDigitBins];
  ChunkCount chunks[kMergeChunks];
};

struct MergeScratch {
  MergeControl *control;
  uint32_t *keys;      // of the sum; kNoKey: padding, or an entry of b whose index a has too
  int64_t *partners;   // place in the other input: of the same index as ~place, else of the next larger one
  uint2 *before;       // size + 1: certain winners and equal ones among the positions before
  int64_t bytes;
  int64_t chunk;       // positions per chunk
  int32_t num_chunks;
};

inline MergeScratch lay_out_merge(void *base, int64_t size_a, int64_t size_b) {
  MergeScratch scratch{};
  char *const start = static_cast<char *>(base);
  const int64_t size = size_a + size_b;
  scratch.chunk = round_up((size + kMergeChunks - 1) / kMergeChunks, kMergeTile);
  if (scratch.chunk == 0) scratch.chunk = kMergeTile;
  scratch.num_chunks = static_cast<int32_t>((size + scratch.chunk - 1) / scratch.chunk);
  int64_t offset = round_up(static_cast<int64_t>(sizeof(MergeControl)), 256);
  const int64_t keys = offset;
  offset += round_up(size * static_cast<int64_t>(sizeof(uint32_t)), 256);
  const int64_t partners = offset;
  offset += round_up(size * static_cast<int64_t>(sizeof(int64_t)), 256);
  const int64_t before = offset;
  offset += round_up((size + 1) * static_cast<int64_t>(sizeof(uint2)), 256);
  scratch.bytes = offset;
  if (base != nullptr) {
    scratch.control = reinterpret_cast<MergeControl *>(start);
    scratch.keys = reinterpret_cast<uint32_t *>(start + keys);
    scratch.partners = reinterpret_cast<int64_t *>(start + partners);
    scratch.before = reinterpret_cast<uint2 *>(start + before);
  }
  return scratch;
}

}  // namespace commhooks
