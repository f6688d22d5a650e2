// The scratch memory of one selection and how it is laid out.
//
// [Control | chunk counts | segment flags] is zeroed by one memset; [bitmap | list] is written before it is
// read.
#pragma once

#include "device.cuh"

namespace commhooks {

constexpr int kSampleBins = 4096;  // of keys: 8 bits of exponent, 4 of mantissa
constexpr int kSampleShift = 19;
constexpr int kDigits = 3;
constexpr int kDigitBins = 2048;
constexpr int kMaxPhases = 6;
constexpr int kTile = 512;             // elements a warp handles at once in the pass: 16 a lane
constexpr int kMinChunkShift = 15;     // elements per chunk of the ordered output, at least 2^15
constexpr int kMaxChunks = 4096;
#ifdef COMMHOOKS_TEST_MISSES
constexpr int64_t kListSlack = 16;
#else
constexpr int64_t kListSlack = 65536;  // candidates that fit beyond 3k
#endif

// Work handed out in order of phases; see phases.cuh.
struct Schedule {
  uint32_t ticket;
  uint32_t done[kMaxPhases];
  uint32_t unused;
};

struct Control {
  unsigned long long nonfinite;
  unsigned long long active_numel;  // elements in active segments, once the flag phase is over
  uint32_t listed;      // candidates found, also those that did not fit the list
  uint32_t floor;       // keys at least this are candidates
  uint32_t before;      // select_threshold: candidates of start's chunk below start
  uint32_t unused;
  Schedule first;       // of the sample kernel
  Schedule second;      // of the finish kernel
  uint32_t sample[kSampleBins];
  uint32_t digit[kDigits][kDigitBins];
};

// Winners above the threshold and elements equal to it, of one chunk.
struct ChunkCount {
  uint32_t greater;
  uint32_t equal;
};

// A candidate: its key and its index.
using Candidate = uint2;

struct Scratch {
  Control *control;
  ChunkCount *chunks;
  uint32_t *active;   // one per segment
  uint32_t *bitmap;   // bit i % 32 of word i / 32: element i is a candidate; whole tiles
  Candidate *list;
  int64_t zeroed_bytes;
  int64_t bytes;
  uint32_t capacity;  // of the list
  int32_t num_chunks;
  int32_t chunk_shift;
};

__host__ __device__ inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline int chunk_shift_of(int64_t numel) {
  int shift = kMinChunkShift;
  while ((numel >> shift) >= kMaxChunks) ++shift;
  return shift;
}

__host__ __device__ inline int64_t bitmap_words(int64_t numel) { return round_up(numel, kTile) / 32; }

// Lays the parts out from `base` (nullptr: only the sizes are wanted). Without `lists` there is no bitmap and
// no list.
inline Scratch lay_out(void *base, int64_t numel, int64_t k, int64_t num_segments, bool lists) {
  Scratch scratch{};
  char *const start = static_cast<char *>(base);
  int64_t offset = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = offset;
    offset += round_up(bytes, 256);
    return at;
  };
  scratch.chunk_shift = chunk_shift_of(numel);
  scratch.num_chunks = static_cast<int32_t>(((numel - 1) >> scratch.chunk_shift) + 1);
  const int64_t most = 3 * k + kListSlack;
  scratch.capacity = lists ? static_cast<uint32_t>(numel < most ? numel : most) : 0u;
  const int64_t control = take(static_cast<int64_t>(sizeof(Control)));
  const int64_t chunks = take(static_cast<int64_t>(sizeof(ChunkCount)) * scratch.num_chunks);
  const int64_t active = take(static_cast<int64_t>(sizeof(uint32_t)) * num_segments);
  scratch.zeroed_bytes = offset;
  const int64_t bitmap = take(lists ? 4 * bitmap_words(numel) : 0);
  const int64_t list = take(static_cast<int64_t>(sizeof(Candidate)) * scratch.capacity);
  scratch.bytes = offset;
  if (base != nullptr) {
    scratch.control = reinterpret_cast<Control *>(start + control);
    scratch.chunks = reinterpret_cast<ChunkCount *>(start + chunks);
    scratch.active = reinterpret_cast<uint32_t *>(start + active);
    scratch.bitmap = reinterpret_cast<uint32_t *>(start + bitmap);
    scratch.list = reinterpret_cast<Candidate *>(start + list);
  }
  return scratch;
}

}  // namespace commhooks
