/* commhooks: the CUDA functions of the C ABI. Semantics: commhooks.h.
 *
 * All pointers are to memory of the current device, except the structs themselves, which are the host's.
 * Every function enqueues on `stream` (a cudaStream_t; NULL is the legacy default stream), never allocates,
 * never waits for the device and may be captured into a CUDA graph. `scratch` is the caller's: at least
 * commhooks_cuda_scratch_bytes() long, 16-byte aligned, with any contents, and not used by anything else
 * until the work has run. An argument that can be judged on the host and is wrong gives COMMHOOKS_INVALID
 * before anything is enqueued.
 *
 * Index arrays are ascending and unique with COMMHOOKS_PAD at the end. Nobody checks that on the device.
 * Indices that break the rule give wrong results, but no function reads or writes outside its buffers because
 * of them.
 */
#ifndef COMMHOOKS_CUDA_H
#define COMMHOOKS_CUDA_H

#include "commhooks.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  COMMHOOKS_CUDA_SELECT = 0,  /* select_topk, select_threshold: numel, k, extra = number of segments */
  COMMHOOKS_CUDA_INDICES = 1, /* select_indices, sample_threshold: extra = number of segments */
  COMMHOOKS_CUDA_RANDOM = 2,  /* random_indices: numel */
  COMMHOOKS_CUDA_MERGE = 3    /* merge_topk: numel = length of a, extra = length of b */
} commhooks_cuda_operation;

COMMHOOKS_API int32_t commhooks_cuda_abi_version(void);

/* What the last failing call of this host thread has to say; "" when none failed. Valid until the next call.
 */
COMMHOOKS_API const char *commhooks_cuda_last_error(void);

/* Bytes of scratch an operation needs, or -1 when an argument is out of range. Touches no device. */
COMMHOOKS_API int64_t commhooks_cuda_scratch_bytes(int32_t operation, int64_t numel, int64_t k, int64_t extra);

/* Corrects and takes out the k largest magnitudes; ties go to the lower index, zeros are never taken.
 * `seed` places the sample that guesses a threshold: it changes time, never the result. */
COMMHOOKS_API commhooks_status commhooks_cuda_select_topk(const commhooks_fused *fused, int64_t k, uint64_t seed,
                                                          float *values, int32_t *indices, commhooks_report *report,
                                                          void *scratch, int64_t scratch_bytes, void *stream);

/* Corrects and takes out elements with |c| > threshold, at most k, in cyclic index order from `start`. */
COMMHOOKS_API commhooks_status commhooks_cuda_select_threshold(const commhooks_fused *fused, float threshold, int64_t k,
                                                               int64_t start, float *values, int32_t *indices,
                                                               commhooks_report *report, void *scratch,
                                                               int64_t scratch_bytes, void *stream);

/* Corrects and takes out the elements at `indices` (k, sorted, unique). Inactive: value 0, residual kept.
 */
COMMHOOKS_API commhooks_status commhooks_cuda_select_indices(const commhooks_fused *fused, const int32_t *indices,
                                                             int64_t k, float *values, commhooks_report *report,
                                                             void *scratch, int64_t scratch_bytes, void *stream);

/* Writes an estimate of the k-th largest |c| to *threshold, from a sample. Reads only. */
COMMHOOKS_API commhooks_status commhooks_cuda_sample_threshold(const commhooks_fused *fused, int64_t k, uint64_t seed,
                                                               float *threshold, void *scratch, int64_t scratch_bytes,
                                                               void *stream);

/* k distinct sorted indices below numel, the same bits as on the CPU. */
COMMHOOKS_API commhooks_status commhooks_cuda_random_indices(uint64_t seed, uint64_t step, uint64_t stream_key,
                                                             int64_t numel, int64_t k, int32_t *indices, void *scratch,
                                                             int64_t scratch_bytes, void *stream);

/* The k largest magnitudes of the sum of two sorted sparse gradients; survives_x[j]: entry j's index is in
 * it. */
COMMHOOKS_API commhooks_status commhooks_cuda_merge_topk(const float *values_a, const int32_t *indices_a, int64_t size_a,
                                                         const float *values_b, const int32_t *indices_b, int64_t size_b,
                                                         int64_t k, float *values, int32_t *indices,
                                                         uint8_t *survives_a, uint8_t *survives_b, void *scratch,
                                                         int64_t scratch_bytes, void *stream);

/* dense[indices[j]] += scale * values[j], row by row, in one launch; the product is rounded first. */
COMMHOOKS_API commhooks_status commhooks_cuda_scatter_add(float *dense, int64_t numel, const commhooks_rows *rows,
                                                          float scale, void *stream);

/* out = 0, then out[indices[j]] += scale * values[j], row by row, in one launch. Half types take one row at
 * most; its products are rounded to nearest even and clamped to the finite range. */
COMMHOOKS_API commhooks_status commhooks_cuda_write_back(void *out, int32_t dtype, int64_t numel,
                                                         const commhooks_rows *rows, float scale, void *stream);

/* Encodes x with `bits` bits an element into a message of `size` bytes. remainder[i] = x[i] - decoded value; it may be
 * x itself; NULL: not wanted. */
COMMHOOKS_API commhooks_status commhooks_cuda_low_bit_encode(const float *x, int64_t numel, int32_t bits,
                                                             uint8_t *message, int64_t size, float *remainder,
                                                             void *stream);

/* out = the values of one message. Nobody checks its bytes: a scale or code that no encoder writes gives NaN. */
COMMHOOKS_API commhooks_status commhooks_cuda_low_bit_decode(const commhooks_messages *messages, float *out,
                                                             int64_t numel, void *stream);

/* out += the values of each row, row by row, in one launch and one pass over out. */
COMMHOOKS_API commhooks_status commhooks_cuda_low_bit_decode_add(const commhooks_messages *messages, float *out,
                                                                 int64_t numel, void *stream);

#ifdef __cplusplus
}
#endif
#endif
