// Low-bit messages: encode, decode, decode onto a sum. docs/kernels.md has the format.
#include "device.cuh"

namespace commhooks {
namespace {

constexpr int kBlock = 256;  // elements with one scale
constexpr int kRow = 16;     // half a warp has one block: each of its threads has one element of each row
constexpr int kRows = kBlock / kRow;
constexpr int kHalves = kThreads / kRow;
// Adding it rounds a float below 2^22 to an integer, half to even, which is then in the lowest bits.
constexpr float kToInteger = 12582912.0f;
constexpr float kLeastScale = 7.88860905221011805e-31f;   // 2^-100
constexpr float kLargestScale = 1.26765060022822940e30f;  // 2^100
constexpr uint32_t kFiniteKey = 0x7f7fffffu;
constexpr uint32_t kNan = 0x7fc00000u;

// A code c stands for (c - kCenter) * step. Each product is exact.
template <int kBits>
struct Levels {
  static constexpr float kCenter = kBits == 1 ? 0.5f : kBits == 2 ? 1.5f : kBits == 4 ? 8.0f : 128.0f;
  static constexpr float kLargest = kBits == 4 ? 7.0f : 127.0f;
  __device__ static float value(uint32_t code, float scale) {
    const float step = kBits <= 2 ? __fmul_rn(2.0f, scale) : scale;
    return __fmul_rn(__fadd_rn(static_cast<float>(code), -kCenter), step);
  }
};

__device__ inline float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// The scale of the block whose elements the half warp holds, as bits of bfloat16. All 32 threads call it.
template <int kBits>
__device__ uint16_t block_scale(const float (&element)[kRows], int count) {
  float sum = 0.0f;
  uint32_t key = 0;
  for (int row = 0; row < kRows; ++row) {
    const uint32_t own = __float_as_uint(element[row]) & 0x7fffffffu;
    sum = __fadd_rn(sum, __uint_as_float(own));
    key = own > key ? own : key;
  }
  for (int half = kRow / 2; half > 0; half /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, half));
    const uint32_t other = __shfl_xor_sync(kFullWarp, key, half);
    key = other > key ? other : key;
  }
  if (key > kFiniteKey) return static_cast<uint16_t>(kNan >> 16);
  float scale = kBits <= 2 ? __fdiv_rn(sum, static_cast<float>(count > 0 ? count : 1))
                           : __fdiv_rn(__uint_as_float(key), Levels<kBits>::kLargest);
  if (kBits == 2) scale = __fmul_rn(0.625f, scale);
  if (scale > kLargestScale) scale = kLargestScale;
  const uint16_t rounded = __bfloat16_as_ushort(__float2bfloat16_rn(scale));
  return from_bf16(rounded) < kLeastScale ? uint16_t{0} : rounded;
}

template <int kBits>
__device__ uint32_t code_of(float x, float scale, float inverse) {
  if (kBits == 1) return x >= 0.0f ? 1 : 0;
  if (kBits == 2) {
    const uint32_t outer = __uint_as_float(__float_as_uint(x) & 0x7fffffffu) >= __fmul_rn(2.0f, scale) ? 1 : 0;
    return x >= 0.0f ? 2 + outer : 1 - outer;
  }
  // Scale 0 or NaN: level 0.
  if (!(scale > 0.0f)) return static_cast<uint32_t>(Levels<kBits>::kCenter);
  float level = __fmul_rn(x, inverse);
  level = level > Levels<kBits>::kLargest ? Levels<kBits>::kLargest : level;
  level = level < -Levels<kBits>::kLargest ? -Levels<kBits>::kLargest : level;
  return __float_as_uint(__fadd_rn(level, kToInteger + Levels<kBits>::kCenter)) & 0xffu;
}

// remainder may be x: a thread reads its elements before it writes them, and nobody else's.
template <int kBits>
__global__ void __launch_bounds__(kThreads) encode_kernel(const float *x, int64_t numel, uint8_t *message,
                                                          float *remainder) {
  __shared__ uint8_t codes[kHalves][kBlock];
  const int lane = static_cast<int>(threadIdx.x) % kRow;
  const int half = static_cast<int>(threadIdx.x) / kRow;
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  // Whole thread blocks go round together: the exchanges need every thread of a warp.
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kHalves; base < blocks;
       base += static_cast<int64_t>(gridDim.x) * kHalves) {
    const int64_t block = base + half;
    const int64_t first = block * kBlock;
    const int count = first >= numel ? 0 : numel - first < kBlock ? static_cast<int>(numel - first) : kBlock;
    float element[kRows];
    for (int row = 0; row < kRows; ++row) {
      const int i = row * kRow + lane;
      element[row] = i < count ? x[first + i] : 0.0f;
    }
    const uint16_t bits = block_scale<kBits>(element, count);
    const float scale = from_bf16(bits);
    const float inverse = __fdiv_rn(1.0f, scale);
    for (int row = 0; row < kRows; ++row) {
      const int i = row * kRow + lane;
      const uint32_t code = code_of<kBits>(element[row], scale, inverse);
      codes[half][i] = static_cast<uint8_t>(i < count ? code : 0);
      if (remainder != nullptr && i < count) {
        remainder[first + i] = __fadd_rn(element[row], -Levels<kBits>::value(code, scale));
      }
    }
    __syncwarp();
    if (lane == 0 && count > 0) {
      message[2 * block] = static_cast<uint8_t>(bits & 0xffu);
      message[2 * block + 1] = static_cast<uint8_t>(bits >> 8);
    }
    uint8_t *const packed = message + 2 * blocks + block * (kBlock / 8 * kBits);
    for (int byte = lane; byte < (count * kBits + 7) / 8; byte += kRow) {
      uint32_t all = 0;
      for (int j = 0; j < 8 / kBits; ++j) all |= static_cast<uint32_t>(codes[half][byte * (8 / kBits) + j]) << (j * kBits);
      packed[byte] = static_cast<uint8_t>(all);
    }
    __syncwarp();
  }
}

// The scale of a block, NaN for one that no encoder writes. Messages begin at any address.
__device__ inline float read_scale(const uint8_t *message, int64_t block) {
  const uint32_t bits = message[2 * block] | static_cast<uint32_t>(message[2 * block + 1]) << 8;
  const float scale = __uint_as_float(bits << 16);
  const bool valid = bits == 0 || (scale >= kLeastScale && scale <= kLargestScale);
  return valid ? scale : __uint_as_float(kNan);
}

template <int kBits, bool kAdd>
__global__ void __launch_bounds__(kThreads) decode_kernel(commhooks_messages messages, float *out, int64_t numel) {
  const int64_t codes = 2 * ((numel + kBlock - 1) / kBlock);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < numel; i += stride) {
    float total = kAdd ? out[i] : 0.0f;
    for (int64_t row = 0; row < messages.rows; ++row) {
      const uint8_t *const message = messages.bytes + row * messages.stride;
      const uint32_t byte = message[codes + i * kBits / 8];
      const uint32_t code = byte >> (i * kBits % 8) & ((1u << kBits) - 1);
      float value = Levels<kBits>::value(code, read_scale(message, i / kBlock));
      if (kBits >= 4 && code == 0) value = __uint_as_float(kNan);
      total = kAdd ? __fadd_rn(total, value) : value;
    }
    out[i] = total;
  }
}

commhooks_status check_size(int64_t numel, int32_t bits, int64_t size) {
  if (numel < 0 || numel >= INT32_MAX) return fail(COMMHOOKS_INVALID, "numel must be in [0, 2^31 - 1)");
  if (bits != 1 && bits != 2 && bits != 4 && bits != 8) return fail(COMMHOOKS_INVALID, "bits must be 1, 2, 4 or 8");
  if (size != 2 * ((numel + kBlock - 1) / kBlock) + (numel * bits + 7) / 8) {
    return fail(COMMHOOKS_INVALID, "size must be that of a message of numel elements");
  }
  return COMMHOOKS_OK;
}

template <bool kAdd>
commhooks_status decode(const char *what, const commhooks_messages *messages, float *out, int64_t numel, void *stream) {
  if (messages == nullptr) return fail(COMMHOOKS_INVALID, "messages must not be NULL");
  COMMHOOKS_TRY(check_size(numel, messages->bits, messages->size));
  if (messages->rows < 0 || (!kAdd && messages->rows != 1)) {
    return fail(COMMHOOKS_INVALID, kAdd ? "rows must be at least 0" : "rows must be 1");
  }
  if (messages->rows > 1 && messages->stride < 0) return fail(COMMHOOKS_INVALID, "stride must not be negative");
  if (numel == 0 || messages->rows == 0) return COMMHOOKS_OK;
  if (out == nullptr || messages->bytes == nullptr) return fail(COMMHOOKS_INVALID, "out and bytes must not be NULL");
  const auto kernel = messages->bits == 1   ? decode_kernel<1, kAdd>
                      : messages->bits == 2 ? decode_kernel<2, kAdd>
                      : messages->bits == 4 ? decode_kernel<4, kAdd>
                                            : decode_kernel<8, kAdd>;
  const int blocks = blocks_for((numel + kThreads - 1) / kThreads, resident_blocks(8));
  return launch(what, kernel, blocks, stream, *messages, out, numel);
}

}  // namespace
}  // namespace commhooks

using namespace commhooks;

extern "C" commhooks_status commhooks_cuda_low_bit_encode(const float *x, int64_t numel, int32_t bits, uint8_t *message,
                                                          int64_t size, float *remainder, void *stream) {
  COMMHOOKS_TRY(check_size(numel, bits, size));
  if (numel == 0) return COMMHOOKS_OK;
  if (x == nullptr || message == nullptr) return fail(COMMHOOKS_INVALID, "x and message must not be NULL");
  const auto kernel = bits == 1   ? encode_kernel<1>
                      : bits == 2 ? encode_kernel<2>
                      : bits == 4 ? encode_kernel<4>
                                  : encode_kernel<8>;
  const int blocks = blocks_for((numel + kBlock * kHalves - 1) / (kBlock * kHalves), resident_blocks(8));
  return launch("low_bit_encode", kernel, blocks, stream, x, numel, message, remainder);
}

extern "C" commhooks_status commhooks_cuda_low_bit_decode(const commhooks_messages *messages, float *out, int64_t numel,
                                                          void *stream) {
  return decode<false>("low_bit_decode", messages, out, numel, stream);
}

extern "C" commhooks_status commhooks_cuda_low_bit_decode_add(const commhooks_messages *messages, float *out,
                                                              int64_t numel, void *stream) {
  return decode<true>("low_bit_decode_add", messages, out, numel, stream);
}
