// Low-bit messages: encode, decode, decode onto a sum. docs/kernels.md has the format.
#include <string.h>

#include <algorithm>
#include <atomic>

#include "commhooks_cpu.h"
#include "simd/dispatch.h"
#include "support/fence.h"
#include "support/plan.h"
#include "support/pool.h"

namespace commhooks {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 16;

int64_t blocks_of(int64_t numel) { return (numel + kLowBitBlock - 1) / kLowBitBlock; }

bool valid_size(int64_t numel, int32_t bits, int64_t size) {
  if (numel < 0 || numel >= COMMHOOKS_PAD) return false;
  if (bits != 1 && bits != 2 && bits != 4 && bits != 8) return false;
  return size == 2 * blocks_of(numel) + (numel * bits + 7) / 8;
}

// Whether an encoder writes these scales: 0, NaN or in [2^-100, 2^100], as bits of bfloat16.
bool valid_scales(const uint8_t *scales, int64_t begin, int64_t end) {
  unsigned bad = 0;
  for (int64_t block = begin; block < end; ++block) {
    uint16_t bits;
    memcpy(&bits, scales + 2 * block, 2);
    const unsigned in_range = bits >= (27u << 7) && bits <= (227u << 7) ? 1u : 0u;
    const unsigned nan = (bits & 0x7fffu) > 0x7f80u ? 1u : 0u;
    bad |= (in_range | nan | (bits == 0 ? 1u : 0u)) ^ 1u;
  }
  return bad == 0;
}

// Whether no code in [from, to) is 0; for 4 and 8 bits.
template <int kBits>
bool no_zero_code(const uint8_t *from, const uint8_t *to) {
  // Borrows run upwards from a zero only, so a word without one gives exactly 0.
  constexpr uint64_t kOnes = ~uint64_t{0} / ((1u << kBits) - 1);
  uint64_t zeros = 0;
  for (; to - from >= 8; from += 8) {
    uint64_t word;
    memcpy(&word, from, 8);
    zeros |= (word - kOnes) & ~word & (kOnes << (kBits - 1));
  }
  for (; from < to; ++from) {
    const unsigned high = kBits == 4 ? *from >> 4 : 1u;
    const unsigned low = kBits == 4 ? *from & 15u : *from;
    zeros |= high == 0 || low == 0 ? 1 : 0;
  }
  return zeros == 0;
}

// Whether blocks [begin, end) of a message are ones that an encoder writes.
bool valid_blocks(const uint8_t *message, int64_t numel, int32_t bits, int64_t begin, int64_t end) {
  if (!valid_scales(message, begin, end)) return false;
  if (bits < 4) return true;
  const int64_t last = std::min(numel, end * kLowBitBlock);
  const uint8_t *codes = message + 2 * blocks_of(numel);
  const uint8_t *from = codes + begin * kLowBitBlock * bits / 8;
  if (bits == 8) return no_zero_code<8>(from, codes + last);
  // The upper half of a last byte may be no code.
  return no_zero_code<4>(from, codes + last / 2) && (last % 2 == 0 || (codes[last / 2] & 15u) != 0);
}

// Runs f(begin, end) for shares of the blocks.
template <class F>
void for_blocks(int64_t numel, int32_t threads, F &&f) {
  const int64_t blocks = blocks_of(numel);
  const int used = static_cast<int>(std::clamp<int64_t>(numel / kElementsPerThread, 1, threads));
  const int shares = share_count(numel, used);
  parallel(used, shares, [&](int share) {
    f(blocks * share / shares, blocks * (share + 1) / shares);
    finish_streams();
  });
}

bool valid_messages(const commhooks_messages &messages, int64_t numel, int32_t threads) {
  std::atomic<bool> valid{true};
  for_blocks(numel, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < messages.rows && valid.load(std::memory_order_relaxed); ++row) {
      const uint8_t *message = messages.bytes + row * messages.stride;
      if (!valid_blocks(message, numel, messages.bits, begin, end)) valid.store(false, std::memory_order_relaxed);
    }
  });
  return valid.load();
}

// Whether an output is large enough for streaming stores and begins on a cache line.
bool streams(const float *out, int64_t numel) {
  return numel * static_cast<int64_t>(sizeof(float)) >= kStreamBytes && (reinterpret_cast<uintptr_t>(out) & 63u) == 0;
}

int32_t decode(const commhooks_messages *messages, int32_t threads, float *out, int64_t numel, bool add) {
  if (messages == nullptr || threads < 1 || messages->rows < 0 || (!add && messages->rows != 1)) return COMMHOOKS_INVALID;
  if (!valid_size(numel, messages->bits, messages->size)) return COMMHOOKS_INVALID;
  if (messages->rows > 1 && messages->stride < 0) return COMMHOOKS_INVALID;
  if (numel == 0 || messages->rows == 0) return COMMHOOKS_OK;
  if (out == nullptr || messages->bytes == nullptr) return COMMHOOKS_INVALID;
  try {
    if (!valid_messages(*messages, numel, threads)) return COMMHOOKS_INVALID;
    const LowBitDecode args{messages->bytes, messages->rows, messages->stride, out, numel, messages->bits,
                            add ? 1 : 0, !add && streams(out, numel) ? 1 : 0};
    for_blocks(numel, threads, [&](int64_t begin, int64_t end) { kernels().low_bit_decode(args, begin, end); });
  } catch (...) {
    return COMMHOOKS_NO_MEMORY;
  }
  return COMMHOOKS_OK;
}

}  // namespace
}  // namespace commhooks

extern "C" int32_t commhooks_cpu_low_bit_encode(const float *x, int64_t numel, int32_t bits, int32_t threads,
                                                uint8_t *message, int64_t size, float *remainder) {
  using namespace commhooks;
  if (threads < 1 || !valid_size(numel, bits, size)) return COMMHOOKS_INVALID;
  if (numel == 0) return COMMHOOKS_OK;
  if (x == nullptr || message == nullptr) return COMMHOOKS_INVALID;
  try {
    const bool apart = remainder != nullptr && remainder != x;
    const LowBitEncode args{x,     remainder, message, message + 2 * blocks_of(numel),
                            numel, bits,      apart && streams(remainder, numel) ? 1 : 0};
    for_blocks(numel, threads, [&](int64_t begin, int64_t end) { kernels().low_bit_encode(args, begin, end); });
  } catch (...) {
    return COMMHOOKS_NO_MEMORY;
  }
  return COMMHOOKS_OK;
}

extern "C" int32_t commhooks_cpu_low_bit_decode(const commhooks_messages *messages, int32_t threads, float *out,
                                                int64_t numel) {
  return commhooks::decode(messages, threads, out, numel, false);
}

extern "C" int32_t commhooks_cpu_low_bit_decode_add(const commhooks_messages *messages, int32_t threads, float *out,
                                                    int64_t numel) {
  return commhooks::decode(messages, threads, out, numel, true);
}
