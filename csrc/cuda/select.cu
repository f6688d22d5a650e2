// The selections of the C ABI: argument checks, scratch, and the order of the kernels.
#include <math.h>

#include "kernels.cuh"

namespace commhooks {
namespace {

constexpr int64_t kMaxNumel = INT32_MAX - 1;
constexpr int64_t kWantedHits = 256;          // of the k largest, in the sample
#ifdef COMMHOOKS_TEST_MISSES  // poor guesses and a short list: tests of the miss path on small sizes
constexpr int64_t kMinSample = 64;
#else
constexpr int64_t kMinSample = 16384;
#endif
constexpr int64_t kMaxSample = 1 << 19;
constexpr int64_t kMinEstimateSample = 65536;  // sample_threshold: nothing verifies it
constexpr double kMarginSigmas = 8.0;

commhooks_status check_fused(const commhooks_fused *fused) {
  if (fused == nullptr) return fail(COMMHOOKS_INVALID, "fused must not be NULL");
  if (fused->numel < 0 || fused->numel > kMaxNumel) return fail(COMMHOOKS_INVALID, "numel must be in [0, 2^31 - 1)");
  if (fused->grad_dtype < COMMHOOKS_F32 || fused->grad_dtype > COMMHOOKS_F16) {
    return fail(COMMHOOKS_INVALID, "grad_dtype must be a commhooks_dtype");
  }
  if (fused->num_segments < 0) return fail(COMMHOOKS_INVALID, "num_segments must not be negative");
  if (fused->segment_offsets != nullptr && fused->num_segments < 1 && fused->numel > 0) {
    return fail(COMMHOOKS_INVALID, "num_segments must be at least 1 with segment_offsets");
  }
  if (fused->numel > 0 && (fused->grad == nullptr || fused->residual == nullptr)) {
    return fail(COMMHOOKS_INVALID, "grad and residual must not be NULL");
  }
  if (fused->velocity_out != nullptr && fused->velocity == nullptr) {
    return fail(COMMHOOKS_INVALID, "velocity_out needs velocity");
  }
  return COMMHOOKS_OK;
}

commhooks_status check_scratch(const void *scratch, int64_t given, int64_t needed) {
  if (given < needed) return fail(COMMHOOKS_INVALID, "scratch is smaller than commhooks_cuda_scratch_bytes()");
  if (scratch == nullptr || reinterpret_cast<uintptr_t>(scratch) % 16 != 0) {
    return fail(COMMHOOKS_INVALID, "scratch must be aligned to 16 bytes");
  }
  return COMMHOOKS_OK;
}

Operands operands_of(const commhooks_fused &fused, const Scratch &scratch) {
  const bool segments = fused.segment_offsets != nullptr;
  Operands op{};
  op.grad = fused.grad;
  op.residual = fused.residual;
  op.velocity = fused.velocity;
  op.residual_out = fused.residual_out != nullptr ? fused.residual_out : fused.residual;
  op.velocity_out = fused.velocity_out != nullptr ? fused.velocity_out : fused.velocity;
  op.scale_ptr = fused.scale_ptr;
  op.rescale = fused.rescale;
  op.offsets = fused.segment_offsets;
  op.active = segments ? scratch.active : nullptr;
  op.active_out = segments ? fused.active : nullptr;
  op.looks_up = op.active != nullptr || op.rescale != nullptr;
  op.numel = fused.numel;
  op.num_segments = segments ? fused.num_segments : 0;
  op.scale = fused.scale;
  op.momentum = fused.momentum;
  return op;
}

commhooks_status clear(void *memory, int64_t bytes, void *stream) {
  if (bytes == 0) return COMMHOOKS_OK;
  return check("memset", cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

commhooks_status check_outputs(const float *values, const int32_t *indices, int64_t k, const commhooks_report *report) {
  if (report == nullptr || (k > 0 && (values == nullptr || indices == nullptr))) {
    return fail(COMMHOOKS_INVALID, "values, indices and report must not be NULL");
  }
  return COMMHOOKS_OK;
}

// What a selection from nothing reports.
commhooks_status report_nothing(const commhooks_fused &fused, commhooks_report *report, void *stream) {
  if (fused.segment_offsets != nullptr && fused.active != nullptr) {
    COMMHOOKS_TRY(clear(fused.active, fused.num_segments, stream));
  }
  return clear(report, sizeof(commhooks_report), stream);
}

// How much to sample for k of numel, and at which rank of the sample to guess.
Sample sample_of(int64_t numel, int64_t k, uint64_t seed, int64_t least, double sigmas) {
  Sample sample{};
  sample.seed = seed;
  if (k == 0 || numel == 0) return sample;
  int64_t size = kWantedHits * (numel / k);
  if (size > numel / 8) size = numel / 8;
  if (size > kMaxSample) size = kMaxSample;
  if (size < least) size = least;
  if (size > numel) size = numel;
  sample.pieces = (size + kPiece - 1) / kPiece;
  const bool everything = sample.pieces * kPiece >= numel;
  const double total = everything ? static_cast<double>(numel) : static_cast<double>(sample.pieces * kPiece);
  const double hits = total * static_cast<double>(k) / static_cast<double>(numel);
  // Neighbours in a piece may be alike: the margin is that of a sample a few times smaller, hence the
  // constant.
  const double margin = everything ? 0.0 : sigmas * (sqrt(hits) + 1.0);
  sample.rank = static_cast<uint32_t>(fmax(1.0, floor(hits + margin + 0.5)));
  sample.interpolate = !everything;
  return sample;
}

}  // namespace
}  // namespace commhooks

using namespace commhooks;

extern "C" commhooks_status commhooks_cuda_select_topk(const commhooks_fused *fused, int64_t k, uint64_t seed,
                                                       float *values, int32_t *indices, commhooks_report *report,
                                                       void *scratch, int64_t scratch_bytes, void *stream) {
  COMMHOOKS_TRY(check_fused(fused));
  if (k < 0 || k > fused->numel) return fail(COMMHOOKS_INVALID, "k must be in [0, numel]");
  COMMHOOKS_TRY(check_outputs(values, indices, k, report));
  if (fused->numel == 0) return report_nothing(*fused, report, stream);
  const Scratch parts = lay_out(scratch, fused->numel, k, fused->num_segments, true);
  COMMHOOKS_TRY(check_scratch(scratch, scratch_bytes, parts.bytes));
  const Operands op = operands_of(*fused, parts);
  const uint32_t floor = k == 0 ? kNoKey : 0;
  COMMHOOKS_TRY(clear(scratch, parts.zeroed_bytes, stream));
  COMMHOOKS_TRY(run_sample(op, fused->grad_dtype, sample_of(fused->numel, k, seed, kMinSample, kMarginSigmas), parts,
                           stream));
  const Target target{parts.control, parts.bitmap, parts.list, parts.capacity, floor};
  COMMHOOKS_TRY(run_pass(op, fused->grad_dtype, target, stream));
  return run_finish(Finish{after_pass(op), parts, values, indices, report, k, -1, floor}, stream);
}

extern "C" commhooks_status commhooks_cuda_select_threshold(const commhooks_fused *fused, float threshold, int64_t k,
                                                            int64_t start, float *values, int32_t *indices,
                                                            commhooks_report *report, void *scratch,
                                                            int64_t scratch_bytes, void *stream) {
  COMMHOOKS_TRY(check_fused(fused));
  if (k < 0 || k > fused->numel) return fail(COMMHOOKS_INVALID, "k must be in [0, numel]");
  if (!(threshold >= 0.0f)) return fail(COMMHOOKS_INVALID, "threshold must be at least 0");
  if (start < 0 || start > (fused->numel > 0 ? fused->numel - 1 : 0)) {
    return fail(COMMHOOKS_INVALID, "start must be in [0, numel)");
  }
  COMMHOOKS_TRY(check_outputs(values, indices, k, report));
  if (fused->numel == 0) return report_nothing(*fused, report, stream);
  const Scratch parts = lay_out(scratch, fused->numel, k, fused->num_segments, true);
  COMMHOOKS_TRY(check_scratch(scratch, scratch_bytes, parts.bytes));
  const Operands op = operands_of(*fused, parts);
  union {
    float value;
    uint32_t bits;
  } limit{threshold};
  const uint32_t floor = (limit.bits & kMagnitudeBits) + 1;
  COMMHOOKS_TRY(clear(scratch, parts.zeroed_bytes, stream));
  COMMHOOKS_TRY(run_sample(op, fused->grad_dtype, Sample{}, parts, stream));
  const Target target{parts.control, parts.bitmap, nullptr, 0, floor};
  COMMHOOKS_TRY(run_pass(op, fused->grad_dtype, target, stream));
  return run_finish(Finish{after_pass(op), parts, values, indices, report, k, start, floor}, stream);
}

extern "C" commhooks_status commhooks_cuda_select_indices(const commhooks_fused *fused, const int32_t *indices,
                                                          int64_t k, float *values, commhooks_report *report,
                                                          void *scratch, int64_t scratch_bytes, void *stream) {
  COMMHOOKS_TRY(check_fused(fused));
  if (k < 0 || k > kMaxNumel) return fail(COMMHOOKS_INVALID, "k must be in [0, 2^31 - 1)");
  COMMHOOKS_TRY(check_outputs(values, indices, k, report));
  const int64_t numel = fused->numel > 0 ? fused->numel : 1;
  const Scratch parts = lay_out(scratch, numel, 0, fused->num_segments, false);
  COMMHOOKS_TRY(check_scratch(scratch, scratch_bytes, parts.bytes));
  const Operands op = operands_of(*fused, parts);
  COMMHOOKS_TRY(clear(scratch, parts.zeroed_bytes, stream));
  if (fused->numel > 0) {
    COMMHOOKS_TRY(run_sample(op, fused->grad_dtype, Sample{}, parts, stream));
    const Target target{parts.control, nullptr, nullptr, 0, kNoKey};
    COMMHOOKS_TRY(run_pass(op, fused->grad_dtype, target, stream));
  }
  return run_gather(after_pass(op), parts, indices, k, values, report, stream);
}

extern "C" commhooks_status commhooks_cuda_sample_threshold(const commhooks_fused *fused, int64_t k, uint64_t seed,
                                                            float *threshold, void *scratch, int64_t scratch_bytes,
                                                            void *stream) {
  COMMHOOKS_TRY(check_fused(fused));
  if (k < 0 || k > fused->numel) return fail(COMMHOOKS_INVALID, "k must be in [0, numel]");
  if (threshold == nullptr) return fail(COMMHOOKS_INVALID, "threshold must not be NULL");
  if (k == 0) return clear(threshold, sizeof(float), stream);
  const Scratch parts = lay_out(scratch, fused->numel, 0, 0, false);
  COMMHOOKS_TRY(check_scratch(scratch, scratch_bytes, parts.bytes));
  Operands op = operands_of(*fused, parts);
  op.active = nullptr;  // inactive segments count like active ones
  op.looks_up = op.rescale != nullptr;
  COMMHOOKS_TRY(clear(scratch, parts.zeroed_bytes, stream));
  Sample sample = sample_of(fused->numel, k, seed, kMinEstimateSample, 0.0);
  sample.interpolate = true;
  sample.estimate = threshold;
  return run_sample(op, fused->grad_dtype, sample, parts, stream);
}
