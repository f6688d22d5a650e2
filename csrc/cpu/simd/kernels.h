// The table of inner loops that exist once per instruction set.
//
// This header and what it includes must stay free of C++ library templates: the files that include it are
// compiled with different target flags, and a shared inline function built for AVX-512 must never be the one
// the linker keeps.
#ifndef COMMHOOKS_CPU_KERNELS_H
#define COMMHOOKS_CPU_KERNELS_H

#include <stdint.h>

namespace commhooks {

constexpr uint32_t kMagnitudeBits = 0x7fffffffu;
constexpr uint32_t kLargestFiniteKey = 0x7f7fffffu;
// Buffers that kernels append to have this many places beyond their capacity: a whole vector is stored at a
// time.
constexpr int64_t kAppendSlack = 64;

// Operands of the fused pass. In place the outputs are the inputs.
struct FuseArgs {
  const void *grad;
  const float *residual;
  const float *velocity;  // or nullptr
  float *residual_out;
  float *velocity_out;  // or nullptr
  float factor;         // of the gradient
  float momentum;
  float rescale;   // of the residual
  int32_t dtype;   // commhooks_dtype
  int32_t stream;  // whether outputs that are not the inputs get streaming stores
};

// Where a pass puts the candidates it takes out: those whose key (|c| as an integer) is above `floor`.
struct Appender {
  float *values;
  int32_t *indices;
  int64_t count;
  int64_t capacity;
  int64_t nonfinite;
  uint32_t floor;
  int32_t dense;     // a hint: more than about one candidate in 200 elements
  int32_t overflow;  // set when a candidate had to stay because `capacity` was reached
};

struct Emitted {
  float *values;
  int32_t *indices;
  int64_t size;
};

// At most so many stretches of a union are merged by one call of `unite`.
constexpr int kSideBySide = 4;

// A stretch of the union of two index-sorted lists a and b: what is in [begin_a, end_a) of a and in [begin_b,
// end_b) of b. Its elements are put where values, indices and tags point, in index order; each has room for
// what a and b have together and kAppendSlack more. tags[u]: bit 0 when element u of the union is in a, bit 1
// when it is in b.
struct Stretch {
  float *values;
  int32_t *indices;
  uint8_t *tags;
  int64_t begin_a;
  int64_t end_a;
  int64_t begin_b;
  int64_t end_b;
  int64_t size;
};

struct MergeInput {
  const float *values_a;
  const int32_t *indices_a;
  const float *values_b;
  const int32_t *indices_b;
};

struct Survivors {
  uint8_t *a;
  uint8_t *b;
};

// Elements of one block of a low-bit message.
constexpr int64_t kLowBitBlock = 256;

struct LowBitEncode {
  const float *x;
  float *remainder;  // may be x; nullptr: not wanted
  uint8_t *scales;   // 2 bytes a block
  uint8_t *codes;
  int64_t numel;
  int32_t bits;
  int32_t stream;  // whether the remainder gets streaming stores: then it begins on a cache line
};

struct LowBitDecode {
  const uint8_t *messages;  // scales, then codes
  int64_t rows;
  int64_t stride;  // bytes from one message to the next
  float *out;
  int64_t numel;
  int32_t bits;
  int32_t add;     // whether values are added; else there is one row
  int32_t stream;  // whether `out` gets streaming stores: then it begins on a cache line
};

struct Kernels {
  const char *name;
  // The fused pass over [begin, end); `append` chooses whether candidates are taken out.
  void (*fuse)(const FuseArgs &args, int64_t begin, int64_t end, bool append, Appender &out);
  // Carries [begin, end), part of an inactive segment, over to the outputs.
  void (*carry)(const FuseArgs &args, int64_t begin, int64_t end);
  // Takes candidates out of values that are already corrected.
  void (*collect)(float *residual, int64_t begin, int64_t end, Appender &out);
  bool (*all_zero)(const void *grad, int32_t dtype, int64_t begin, int64_t end);
  // Corrected values of `count` elements from `begin`, nothing written back; not finite: 0.
  void (*sample)(const FuseArgs &args, int64_t begin, int64_t count, float *out);
  void (*key_range)(const float *values, int64_t size, uint32_t *lowest, uint32_t *highest);
  // Writes the values whose keys are in [low, high] to `out`, which may be `values`; returns how many.
  // `above`: how many keys are larger than that.
  int64_t (*between)(const float *values, int64_t size, uint32_t low, uint32_t high, float *out, int64_t *above);
  void (*count)(const float *values, int64_t size, uint32_t key, int64_t *above, int64_t *equal);
  // Keeps keys above `key` and the first `ties` equal to it; what is not kept goes back into `residual` (or
  // nowhere).
  void (*emit)(const float *values, const int32_t *indices, int64_t size, uint32_t key, int64_t ties, Emitted out,
               float *residual);
  // Writes the elements of `count` stretches (values are sums where both have the index) and their sizes.
  void (*unite)(const MergeInput &in, Stretch *stretches, int count);
  // Like emit, and marks in `survivors` which elements of a and b are kept.
  void (*emit_merged)(const Stretch &stretch, uint32_t key, int64_t ties, Emitted out, Survivors survivors);
  // found[j] = whether element j of a is in b as well, for the a of the stretch.
  void (*mark_common)(const Stretch &stretch, uint8_t *found);
  // Streaming stores of `bytes` (a multiple of 64) to `destination` (64-aligned); source nullptr: zeros.
  // Other threads may see them only after a fence, which is the caller's: one for each block took a third of
  // write_back's time.
  void (*stream)(void *destination, const void *source, int64_t bytes);
  // Whether the indices are not negative and ascend without repetition, up to padding at the end.
  bool (*ascending)(const int32_t *indices, int64_t size);
  // One pass of the Feistel network over out[j] = first + j, in place over `size` indices.
  void (*feistel)(uint32_t *indices, int64_t size, const uint32_t *round_keys, int32_t half_bits);
  // Blocks [begin, end) of a low-bit message.
  void (*low_bit_encode)(const LowBitEncode &args, int64_t begin, int64_t end);
  void (*low_bit_decode)(const LowBitDecode &args, int64_t begin, int64_t end);
};

extern const Kernels kScalarKernels;
#if defined(COMMHOOKS_HAVE_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif
#if defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace commhooks
#endif
