/* commhooks: the plain C ABI of the native kernels. CPU and CUDA share this header.
 *
 * Every function returns a commhooks_status and never throws. Pointers are to memory of the library's own
 * device. The CUDA functions take a stream, enqueue on it and never wait for the device. Sizes are in
 * elements unless a name says bytes. Both devices compute the same, each operation rounded to float32 on its
 * own:
 *
 *   g   = float(grad[i]) * (scale * (scale_ptr ? *scale_ptr : 1))
 *   v   = momentum * velocity[i] + g                     (velocity == NULL: v = g)
 *   u   = (rescale ? rescale[segment of i] : 1) * residual[i]
 *   c   = u + v                                          the corrected gradient
 *   If c is not finite, v and c are computed again with g = 0, and the element is counted in `nonfinite`.
 *   residual_out[i] = c, velocity_out[i] = v. Elements that are taken out leave residual_out[i] = 0.
 *
 * A segment (one parameter) whose gradient is exactly zero everywhere is inactive. None of its elements is
 * selected; residual_out[i] = u and velocity_out[i] = velocity[i]. In place and without rescale nothing of it
 * is touched.
 *
 * Order of magnitudes: larger |c| first, then the lower index. Results are sorted by index. When there are
 * fewer eligible elements than k, the places at the end carry index COMMHOOKS_PAD and value 0. Such places
 * are ignored in inputs.
 */
#ifndef COMMHOOKS_H
#define COMMHOOKS_H

#include <stdint.h>

#define COMMHOOKS_ABI_VERSION 4
#define COMMHOOKS_PAD INT32_MAX

#if defined(_WIN32)
#define COMMHOOKS_API __declspec(dllexport)
#else
#define COMMHOOKS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  COMMHOOKS_OK = 0,
  COMMHOOKS_INVALID = 1,   /* an argument is out of range; nothing was touched */
  COMMHOOKS_NO_MEMORY = 2, /* scratch could not be allocated; nothing but `active` was touched */
  COMMHOOKS_DEVICE = 3     /* a CUDA call failed; commhooks_cuda_last_error() says how */
} commhooks_status;

typedef enum { COMMHOOKS_F32 = 0, COMMHOOKS_BF16 = 1, COMMHOOKS_F16 = 2 } commhooks_dtype;

/* What the fused pass reads and writes. Outputs must not overlap inputs or each other. */
typedef struct {
  const void *grad;               /* numel elements of grad_dtype, only read */
  float *residual;                /* numel; overwritten when residual_out is NULL, else only read */
  float *velocity;                /* numel, or NULL; overwritten when velocity_out is NULL, else only read */
  float *residual_out;            /* numel: where the new residual goes; NULL: in place */
  float *velocity_out;            /* numel: where the new velocity goes; NULL: in place. Needs velocity */
  const float *scale_ptr;         /* one float, a further factor of the gradient; NULL: 1 */
  const float *rescale;           /* a factor of the residual for each segment (one without segments); NULL: 1 */
  const int64_t *segment_offsets; /* num_segments + 1 ascending offsets from 0 to numel; NULL: one active segment */
  uint8_t *active;                /* num_segments flags, written: 1 where the segment is active; NULL: not wanted */
  int64_t numel;                  /* < 2^31 - 1 */
  int32_t num_segments;           /* 0 without segment_offsets */
  int32_t grad_dtype;             /* commhooks_dtype */
  float scale;
  float momentum;
} commhooks_fused;

/* Sparse gradients of one size, such as the messages of all ranks: row r has k pairs. */
typedef struct {
  const float *values;    /* values[r * values_stride + j] */
  const int32_t *indices; /* indices[r * indices_stride + j], ascending and unique in each row, padding at the end */
  int64_t rows;
  int64_t k;
  int64_t values_stride;  /* elements from one row to the next, at least 0 */
  int64_t indices_stride;
} commhooks_rows;

/* Low-bit messages of one vector's length and width. A message of numel elements has ceil(numel / 256) scales of 2
 * bytes and then ceil(numel * bits / 8) bytes of codes; docs/kernels.md has the format. */
typedef struct {
  const uint8_t *bytes; /* row r: from bytes + r * stride on; any alignment */
  int64_t rows;
  int64_t size;   /* bytes of a message */
  int64_t stride; /* bytes from one row to the next, at least 0 */
  int32_t bits;   /* 1, 2, 4 or 8 */
} commhooks_messages;

/* What a selection reports; written to memory of the device (CUDA) or of the host (CPU). */
typedef struct {
  int64_t count;     /* pairs written before the padding */
  int64_t nonfinite; /* elements that were not finite */
  int64_t misses;    /* guesses that did not hold: 0 on the one-pass path */
  int64_t inactive;  /* elements in inactive segments */
} commhooks_report;

#ifdef __cplusplus
}
#endif
#endif
