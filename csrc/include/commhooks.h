/* commhooks: the plain C ABI of the native kernels, one header for CPU and CUDA.
 *
 * Every function returns a commhooks_status and never throws. Pointers are to memory of the library's own device; the
 * CUDA functions take a stream, enqueue on it and never wait for the device. Sizes are in elements unless a name says
 * bytes. Semantics shared by both devices:
 *
 *   g   = float(grad[i]) * scale * (scale_ptr ? *scale_ptr : 1)
 *   v   = momentum * velocity[i] + g          (velocity == NULL: v = g)
 *   c   = residual[i] + v                     the corrected gradient
 *   if c is not finite: g is taken as 0 for this element and the element is counted in `nonfinite`
 *   residual[i] = c, velocity[i] = v; elements that are taken out leave residual[i] = 0
 *
 * A segment (one parameter) whose gradient is exactly zero everywhere is inactive: its residual and velocity are not
 * touched and none of its elements is selected.
 *
 * Order of magnitudes: larger |c| first, then the lower index. Results are sorted by index. Places left over (fewer
 * eligible elements than k) carry index COMMHOOKS_PAD and value 0; they stand at the end and are ignored as input.
 */
#ifndef COMMHOOKS_H
#define COMMHOOKS_H

#include <stdint.h>

#define COMMHOOKS_ABI_VERSION 2
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
  COMMHOOKS_INVALID = 1,   /* an argument out of range; nothing was touched */
  COMMHOOKS_NO_MEMORY = 2, /* scratch could not be allocated; nothing was touched */
  COMMHOOKS_DEVICE = 3     /* a CUDA call failed: commhooks_cuda_last_error() says how */
} commhooks_status;

typedef enum { COMMHOOKS_F32 = 0, COMMHOOKS_BF16 = 1, COMMHOOKS_F16 = 2 } commhooks_dtype;

/* What the fused pass reads and updates. */
typedef struct {
  const void *grad;               /* numel elements of grad_dtype, only read */
  float *residual;                /* numel, updated in place */
  float *velocity;                /* numel, updated in place; may be NULL */
  const float *scale_ptr;         /* one float, a further factor of the gradient; may be NULL */
  const int64_t *segment_offsets; /* num_segments + 1 ascending offsets from 0 to numel; NULL: one active segment */
  int64_t numel;                  /* < 2^31 - 1 */
  int32_t num_segments;
  int32_t grad_dtype;             /* commhooks_dtype */
  float scale;
  float momentum;
} commhooks_fused;

/* What a selection reports; written to memory of the device (CUDA) or of the host (CPU). */
typedef struct {
  int64_t count;     /* pairs written before the padding */
  int64_t nonfinite; /* elements that were not finite */
  int64_t misses;    /* guesses that did not hold: 0 on the one-pass path */
} commhooks_report;

#ifdef __cplusplus
}
#endif
#endif
