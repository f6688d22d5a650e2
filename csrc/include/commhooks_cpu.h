/* commhooks: the CPU functions of the C ABI. Semantics: commhooks.h.
 *
 * All pointers are to host memory and need only the alignment of their element type. Outputs must not overlap
 * inputs or each other. `threads` >= 1 is an upper bound and never changes a result. Every function may be
 * called from any thread, by several at a time, and after a fork. Index arrays are ascending and unique with
 * COMMHOOKS_PAD at the end. Each function checks this, and returns COMMHOOKS_INVALID, before it writes
 * anything.
 */
#ifndef COMMHOOKS_CPU_H
#define COMMHOOKS_CPU_H

#include "commhooks.h"

#ifdef __cplusplus
extern "C" {
#endif

COMMHOOKS_API int32_t commhooks_cpu_abi_version(void);

/* The instruction set in use: "avx512", "avx2", "neon" or "scalar". The environment variable COMMHOOKS_ISA,
 * read at first use, asks for a lower one; commhooks_cpu_use_isa changes it (NULL: the best) for calls that
 * start later. */
COMMHOOKS_API const char *commhooks_cpu_isa(void);
COMMHOOKS_API int32_t commhooks_cpu_use_isa(const char *name);

/* Takes out the k largest magnitudes. values, indices: k places. seed: of the sample, never changes the
 * result. */
COMMHOOKS_API int32_t commhooks_cpu_select_topk(const commhooks_fused *fused, int64_t k, uint64_t seed,
                                                int32_t threads, float *values, int32_t *indices,
                                                commhooks_report *report);

/* Takes out |c| > threshold, at most k, in index order beginning cyclically at start. */
COMMHOOKS_API int32_t commhooks_cpu_select_threshold(const commhooks_fused *fused, float threshold, int64_t k,
                                                     int64_t start, int32_t threads, float *values,
                                                     int32_t *indices, commhooks_report *report);

/* Takes out what stands at `indices`; values: k places, 0 for padding and for inactive segments. */
COMMHOOKS_API int32_t commhooks_cpu_select_indices(const commhooks_fused *fused, const int32_t *indices, int64_t k,
                                                   int32_t threads, float *values, commhooks_report *report);

/* Estimates the k-th largest magnitude from a sample, on the calling thread; touches nothing. */
COMMHOOKS_API int32_t commhooks_cpu_sample_threshold(const commhooks_fused *fused, int64_t k, uint64_t seed,
                                                     float *threshold);

/* k distinct indices below numel, ascending (docs/kernels.md has the algorithm). */
COMMHOOKS_API int32_t commhooks_cpu_random_indices(uint64_t seed, uint64_t step, uint64_t stream, int64_t numel,
                                                   int64_t k, int32_t *indices);

/* The k largest magnitudes of a + b; survives_x[j] = 1 where entry j of x has its index in the result, else
 * 0. Every explicit entry is eligible, also a sum of 0 (it ranks last). */
COMMHOOKS_API int32_t commhooks_cpu_merge_topk(const float *values_a, const int32_t *indices_a, int64_t size_a,
                                               const float *values_b, const int32_t *indices_b, int64_t size_b,
                                               int64_t k, int32_t threads, float *values, int32_t *indices,
                                               uint8_t *survives_a, uint8_t *survives_b);

/* found[j] = 1 where wanted[j] is in `among`, else 0 (padding: 0). */
COMMHOOKS_API int32_t commhooks_cpu_contains(const int32_t *wanted, int64_t size, const int32_t *among,
                                             int64_t among_size, uint8_t *found);

/* dense[indices[j]] += scale * values[j], row by row; the product is rounded first. */
COMMHOOKS_API int32_t commhooks_cpu_scatter_add(float *dense, int64_t numel, const commhooks_rows *rows, float scale);

/* out = 0, then out[indices[j]] += scale * values[j], row by row. Half types take one row at most; its
 * products are rounded to nearest even and clamped to the finite range. */
COMMHOOKS_API int32_t commhooks_cpu_write_back(void *out, int32_t dtype, int64_t numel, const commhooks_rows *rows,
                                               float scale, int32_t threads);

/* Encodes x with `bits` bits an element into a message of `size` bytes. remainder[i] = x[i] - decoded value; it may be x
 * itself; NULL: not wanted. */
COMMHOOKS_API int32_t commhooks_cpu_low_bit_encode(const float *x, int64_t numel, int32_t bits, int32_t threads,
                                                   uint8_t *message, int64_t size, float *remainder);

/* out = the values of one message. All scales and codes are looked at first: one that no encoder writes gives
 * COMMHOOKS_INVALID before anything is written. */
COMMHOOKS_API int32_t commhooks_cpu_low_bit_decode(const commhooks_messages *messages, int32_t threads, float *out,
                                                   int64_t numel);

/* out += the values of each row, row by row, in one pass over out. Checks like low_bit_decode. */
COMMHOOKS_API int32_t commhooks_cpu_low_bit_decode_add(const commhooks_messages *messages, int32_t threads, float *out,
                                                       int64_t numel);

/* Position of the first index that is out of order, negative or >= numel (padding aside); -1 when there is
 * none. */
COMMHOOKS_API int64_t commhooks_cpu_check_indices(const int32_t *indices, int64_t k, int64_t numel);

#ifdef __cplusplus
}
#endif
#endif
