// Random operands of the fuzz driver, and what a simple loop makes of them.
#ifndef COMMHOOKS_TESTS_OPERANDS_H
#define COMMHOOKS_TESTS_OPERANDS_H

#include <string.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "commhooks_cpu.h"

namespace {

using Random = std::mt19937_64;

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
      std::abort();                                                             \
    }                                                                           \
  } while (0)

int64_t below(Random &random, int64_t limit) {
  return limit <= 0 ? 0 : static_cast<int64_t>(random() % static_cast<uint64_t>(limit));
}

uint32_t key_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffffu;
}

// Equal, or both NaN.
bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

float from_half(uint16_t bits, int32_t dtype) {
  const float sign = (bits & 0x8000u) != 0 ? -1.0f : 1.0f;
  const int fraction_bits = dtype == COMMHOOKS_BF16 ? 7 : 10;
  const int bias = dtype == COMMHOOKS_BF16 ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  if (exponent == 2 * bias + 1) return fraction != 0 ? NAN : sign * INFINITY;
  const int whole = exponent == 0 ? fraction : fraction + (1 << fraction_bits);
  return sign * std::ldexp(static_cast<float>(whole), std::max(exponent, 1) - bias - fraction_bits);
}

// Exactly n elements at the end of their own allocation, 4-aligned but mostly not more.
template <class T>
class Buffer {
 public:
  Buffer(int64_t n, Random &random) : shift_(below(random, 4)), data_(new T[static_cast<size_t>(n + shift_)]()), size_(n) {}
  T *get() { return data_.get() + shift_; }
  T &operator[](int64_t i) { return get()[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t shift_;
  std::unique_ptr<T[]> data_;
  int64_t size_;
};

int64_t random_size(Random &random) {
  static const int64_t sizes[] = {0, 1, 2, 15, 16, 17, 67, 257, 1009, 4096, 4099, 40009, 150001};
  return sizes[below(random, sizeof sizes / sizeof *sizes)];
}

void fill(Buffer<float> &buffer, Random &random, bool nasty) {
  const int kind = static_cast<int>(below(random, 6));
  std::normal_distribution<float> gauss;
  for (int64_t i = 0; i < buffer.size(); ++i) {
    float x = gauss(random);
    if (kind == 0) x = 0.0f;
    if (kind == 1) x = 1.5f;
    if (kind == 2) x = std::round(2 * x);
    if (kind == 3) x = static_cast<float>(i) * 1e-3f;
    if (kind == 4 && i > buffer.size() / 50) x *= 1e-6f;
    if (nasty && random() % (kind == 5 ? 9 : 97) == 0) x = random() % 2 != 0 ? NAN : INFINITY;
    buffer[i] = x;
  }
}

struct Operands {
  Buffer<float> grad;  // what the library should read, whatever the gradient's type
  Buffer<uint16_t> half;
  Buffer<float> residual, velocity;
  Buffer<float> residual_out, velocity_out;  // used when the outputs are apart
  float more_scale = 1.0f;
  std::vector<int64_t> offsets;
  std::vector<float> factors;
  std::vector<uint8_t> flags;
  commhooks_fused fused{};

  Operands(int64_t n, Random &random) : grad(n, random), half(n, random), residual(n, random), velocity(n, random),
        residual_out(n, random), velocity_out(n, random) {
    fill(grad, random, random() % 2 != 0);
    fill(residual, random, random() % 8 == 0);
    fused.grad = grad.get();
    fused.residual = residual.get();
    fused.numel = n;
    fused.scale = random() % 2 != 0 ? 1.0f : 0.3f;
    if (random() % 2 != 0) {
      fill(velocity, random, random() % 8 == 0);
      fused.velocity = velocity.get();
      fused.momentum = 0.9f;
    }
    if (random() % 3 == 0) {
      more_scale = 1.7f;
      fused.scale_ptr = &more_scale;
    }
    fused.grad_dtype = static_cast<int32_t>(below(random, 3));
    const bool any_bits = random() % 4 == 0;
    for (int64_t i = 0; fused.grad_dtype != COMMHOOKS_F32 && i < n; ++i) {
      half[i] = any_bits ? static_cast<uint16_t>(random()) : static_cast<uint16_t>(0x3c00 + below(random, 2048) * 16);
      grad[i] = from_half(half[i], fused.grad_dtype);
      fused.grad = half.get();
    }
    if (random() % 2 != 0) {
      offsets = {0, below(random, n + 1), below(random, n + 1), n};
      std::sort(offsets.begin(), offsets.end());
      for (int64_t i = offsets[1]; i < offsets[2]; ++i) {
        grad[i] = 0.0f;
        half[i] = 0x8000u;  // minus zero is zero
      }
      fused.segment_offsets = offsets.data();
      fused.num_segments = 3;
      flags.assign(3, 7);
      fused.active = flags.data();
    }
    if (random() % 3 == 0) {
      factors = offsets.empty() ? std::vector<float>{0.75f} : std::vector<float>{0.5f, 1.0f, 3.0f};
      fused.rescale = factors.data();
    }
    if (random() % 2 != 0) {
      fused.residual_out = residual_out.get();
      if (fused.velocity != nullptr && random() % 2 != 0) fused.velocity_out = velocity_out.get();
    }
  }

  // Where the pass leaves the residual.
  Buffer<float> &new_residual() { return fused.residual_out != nullptr ? residual_out : residual; }

  float kept(int64_t i) {
    size_t s = 0;
    while (!offsets.empty() && i >= offsets[s + 1]) ++s;
    return factors.empty() ? residual[i] : factors[s] * residual[i];
  }

  bool active(int64_t i) {
    if (offsets.empty()) return true;
    size_t s = 0;
    while (i >= offsets[s + 1]) ++s;
    for (int64_t j = offsets[s]; j < offsets[s + 1]; ++j) {
      if (!(grad[j] == 0.0f)) return true;
    }
    return false;
  }

  // The corrected gradient; where inactive, the residual.
  std::vector<float> corrected(int64_t *nonfinite, std::vector<bool> *live) {
    std::vector<float> c(static_cast<size_t>(fused.numel));
    live->assign(c.size(), true);
    *nonfinite = 0;
    bool state = true;
    for (int64_t i = 0; i < fused.numel; ++i) {
      if (!offsets.empty() && (i == 0 || std::find(offsets.begin(), offsets.end(), i) != offsets.end())) state = active(i);
      const size_t at = static_cast<size_t>(i);
      (*live)[at] = state;
      c[at] = kept(i);
      if (!state) continue;
      c[at] = kept(i) + moved(i, grad[i] * (fused.scale * more_scale));
      if (!std::isfinite(c[at])) {
        ++*nonfinite;
        c[at] = kept(i) + moved(i, 0.0f);
      }
    }
    return c;
  }

  // The gradient, or with momentum the new velocity.
  float moved(int64_t i, float g) {
    if (fused.velocity == nullptr) return g;
    const float decayed = fused.momentum * velocity[i];
    return decayed + g;
  }
};

}  // namespace
#endif
