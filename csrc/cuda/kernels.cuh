// The host side of each group of kernels: they check nothing and enqueue on `stream`.
#pragma once

#include "elements.cuh"
#include "control.cuh"

namespace commhooks {

// Where and how much to sample. The sample moves time only, never results.
struct Sample {
  uint64_t seed;
  int64_t pieces;     // of kPiece neighbouring elements, one in each equal stratum; 0: take no sample
  uint32_t rank;      // the guess is about the rank-th largest key of the sample; 0: select nothing
  bool interpolate;   // within the bin; otherwise its lower edge
  float *estimate;    // sample_threshold: where the guess goes as a magnitude; otherwise nullptr
};

constexpr int kPiece = 8;

// Sets the flag of each segment that has a nonzero gradient, then guesses control->floor.
commhooks_status run_sample(const Operands &op, int32_t dtype, const Sample &sample, const Scratch &scratch,
                            void *stream);

// Forgets the flags when every element lies in an active segment. That is the usual case, and then no element
// has to look for its segment, unless segments have factors. Only after the flag phase.
__device__ inline void forget_if_all_active(Operands *op, const Control *control) {
  if (op->active != nullptr && __ldcg(&control->active_numel) == static_cast<unsigned long long>(op->numel)) {
    op->active = nullptr;
    op->looks_up = op->rescale != nullptr;
  }
}

// Whether the caller's flags and the report are to be written: by one block, after the flag phase.
__device__ inline void report_segments(const Operands &op, const Control *control, const uint32_t *flags,
                                       commhooks_report *report) {
  if (op.active_out != nullptr) {
    for (int32_t s = static_cast<int32_t>(threadIdx.x); s < op.num_segments; s += kThreads) {
      op.active_out[s] = __ldcg(flags + s) != 0 ? 1 : 0;
    }
  }
  if (threadIdx.x != 0) return;
  report->nonfinite = static_cast<int64_t>(control->nonfinite);
  report->inactive = op.offsets == nullptr ? 0 : op.numel - static_cast<int64_t>(__ldcg(&control->active_numel));
}

// What the pass finds and where it puts it.
struct Target {
  Control *control;
  uint32_t *bitmap;    // nullptr: only correct
  Candidate *list;     // nullptr: no list
  uint32_t capacity;
  uint32_t floor;      // 0: control->floor
};

commhooks_status run_pass(const Operands &op, int32_t dtype, const Target &target, void *stream);

// Operands as they are after the pass, when the new residual holds the corrected gradient.
inline Operands after_pass(Operands op) {
  op.rescale = nullptr;
  op.looks_up = op.active != nullptr;
  return op;
}

struct Finish {
  Operands op;
  Scratch scratch;
  float *values;
  int32_t *indices;
  commhooks_report *report;
  int64_t k;
  int64_t start;   // select_threshold: first index of the cyclic order; -1: top-k
  uint32_t floor;  // 0: control->floor
};

commhooks_status run_finish(const Finish &finish, void *stream);

// values[j] = residual_out[indices[j]], taken out; writes the report.
commhooks_status run_gather(const Operands &op, const Scratch &scratch, const int32_t *indices, int64_t k,
                            float *values, commhooks_report *report, void *stream);

}  // namespace commhooks
