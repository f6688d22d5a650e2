// The host side of each group of kernels: they check nothing and enqueue on `stream`.
#pragma once

#include "elements.cuh"
#include "control.cuh"

namespace commhooks {

// Where and how much to sample. The sample moves time only, never results.
struct Sample {
  uint64_t seed;
  int64_t pieces;     // of kPiece neighbouring elements, one in each of as many equal strata; 0: take no sample
  uint32_t rank;      // the guess is about the rank-th largest key of the sample; 0: nothing is to be selected
  bool interpolate;   // within the bin; otherwise its lower edge
  float *estimate;    // sample_threshold: where the guess goes as a magnitude; otherwise nullptr
};

constexpr int kPiece = 8;

// Sets the flag of each segment that has a nonzero gradient, then guesses control->floor.
commhooks_status run_sample(const Operands &op, int32_t dtype, const Sample &sample, const Scratch &scratch,
                            void *stream);

// Forgets the segments when every element lies in an active one. That is the usual case, and then no element has to
// look for its segment. Only after the flag phase.
__device__ inline void forget_if_all_active(Operands *op, const Control *control) {
  if (op->active != nullptr && __ldcg(&control->active_numel) == static_cast<unsigned long long>(op->numel)) {
    op->active = nullptr;
  }
}

// What the pass finds and where it puts it.
struct Target {
  Control *control;
  uint32_t *bitmap;    // nullptr: only compensate
  Candidate *list;     // nullptr: no list
  uint32_t capacity;
  uint32_t floor;      // 0: control->floor
};

commhooks_status run_pass(const Operands &op, int32_t dtype, const Target &target, void *stream);

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

// values[j] = residual[indices[j]], taken out; writes the report.
commhooks_status run_gather(const Operands &op, const Control *control, const int32_t *indices, int64_t k,
                            float *values, commhooks_report *report, void *stream);

}  // namespace commhooks
