// Random calls of the C ABI against simple oracles, for the sanitizer builds (scripts/sanitize): sizes 0 and 1, primes,
// unaligned pointers, ties, non-finite values, many threads, several callers at once, a fork after use.
// Every buffer has exactly its size, so that a step outside is seen.
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
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
    if (nasty && random() % 97 == 0) x = random() % 2 != 0 ? NAN : INFINITY;
    buffer[i] = x;
  }
}

struct Operands {
  Buffer<float> grad, residual;
  std::vector<int64_t> offsets;
  commhooks_fused fused{};

  Operands(int64_t n, Random &random) : grad(n, random), residual(n, random) {
    fill(grad, random, random() % 2 != 0);
    fill(residual, random, false);
    fused.grad = grad.get();
    fused.residual = residual.get();
    fused.numel = n;
    fused.scale = 1.0f;
    if (random() % 2 != 0) {
      offsets = {0, below(random, n + 1), below(random, n + 1), n};
      std::sort(offsets.begin(), offsets.end());
      for (int64_t i = offsets[1]; i < offsets[2]; ++i) grad[i] = 0.0f;
      fused.segment_offsets = offsets.data();
      fused.num_segments = 3;
    }
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
      c[at] = state ? residual[i] + grad[i] : residual[i];
      if (state && !std::isfinite(c[at])) {
        ++*nonfinite;
        c[at] = residual[i] + 0.0f;
      }
    }
    return c;
  }
};

void fuzz_topk(Random &random) {
  const int64_t n = random_size(random);
  const int64_t k = random() % 3 != 0 ? below(random, n / 50 + 2) % (n + 1) : below(random, n + 1);
  Operands operands(n, random);
  int64_t nonfinite = 0;
  std::vector<bool> live;
  const std::vector<float> c = operands.corrected(&nonfinite, &live);
  std::vector<int64_t> order;
  for (int64_t i = 0; i < n; ++i) {
    if (live[static_cast<size_t>(i)] && key_of(c[static_cast<size_t>(i)]) > 0) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return key_of(c[static_cast<size_t>(a)]) > key_of(c[static_cast<size_t>(b)]);
  });
  order.resize(std::min(order.size(), static_cast<size_t>(k)));
  std::sort(order.begin(), order.end());

  Buffer<float> values(k, random);
  Buffer<int32_t> indices(k, random);
  commhooks_report report{};
  const int32_t threads = 1 + static_cast<int32_t>(below(random, 4));
  CHECK(commhooks_cpu_select_topk(&operands.fused, k, random(), threads, values.get(), indices.get(), &report) ==
        COMMHOOKS_OK);
  CHECK(report.count == static_cast<int64_t>(order.size()) && report.nonfinite == nonfinite);
  for (int64_t j = 0; j < k; ++j) {
    const bool used = j < report.count;
    CHECK(indices[j] == (used ? order[static_cast<size_t>(j)] : COMMHOOKS_PAD));
    CHECK(values[j] == (used ? c[static_cast<size_t>(indices[j])] : 0.0f));
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool taken = std::binary_search(order.begin(), order.end(), i);
    CHECK(operands.residual[i] == (taken ? 0.0f : c[static_cast<size_t>(i)]));
  }
}

void fuzz_other_selections(Random &random) {
  const int64_t n = random_size(random);
  const int64_t k = below(random, n + 1);
  Buffer<float> values(k, random);
  Buffer<int32_t> indices(k, random);
  commhooks_report report{};
  const int32_t threads = 1 + static_cast<int32_t>(below(random, 4));
  Operands first(n, random);
  CHECK(commhooks_cpu_select_threshold(&first.fused, 0.5f, k, below(random, n), threads, values.get(), indices.get(),
                                       &report) == COMMHOOKS_OK);
  CHECK(commhooks_cpu_check_indices(indices.get(), k, n) == -1);
  for (int64_t j = 0; j < report.count; ++j) CHECK(std::fabs(values[j]) > 0.5f && first.residual[indices[j]] == 0.0f);

  CHECK(commhooks_cpu_random_indices(random(), 1, 2, n, k, indices.get()) == COMMHOOKS_OK);
  CHECK(commhooks_cpu_check_indices(indices.get(), k, n) == -1);
  Operands second(n, random);
  CHECK(commhooks_cpu_select_indices(&second.fused, indices.get(), k, threads, values.get(), &report) == COMMHOOKS_OK);
  CHECK(report.count == k);
  float threshold = 0.0f;
  CHECK(commhooks_cpu_sample_threshold(&second.fused, k, random(), &threshold) == COMMHOOKS_OK && threshold >= 0.0f);
  if (k > 1) {
    std::swap(indices[0], indices[k - 1]);
    CHECK(commhooks_cpu_select_indices(&second.fused, indices.get(), k, 1, values.get(), &report) == COMMHOOKS_INVALID);
  }
}

struct Sparse {
  Buffer<float> values;
  Buffer<int32_t> indices;
  Sparse(int64_t n, int64_t used, int64_t size, Random &random) : values(size, random), indices(size, random) {
    CHECK(commhooks_cpu_random_indices(random(), 3, 4, n, used, indices.get()) == COMMHOOKS_OK);
    for (int64_t j = used; j < size; ++j) indices[j] = COMMHOOKS_PAD;
    for (int64_t j = 0; j < used; ++j) values[j] = static_cast<float>(below(random, 9) - 4);
  }
};

void fuzz_merge_and_scatter(Random &random) {
  const int64_t n = std::max<int64_t>(1, random_size(random));
  const int64_t used_a = below(random, n + 1);
  const int64_t used_b = below(random, n + 1);
  Sparse a(n, used_a, used_a + below(random, 3), random);
  Sparse b(n, used_b, used_b + below(random, 3), random);
  const int64_t k = below(random, used_a + used_b + 2);
  Buffer<float> values(k, random);
  Buffer<int32_t> indices(k, random);
  Buffer<uint8_t> survives_a(a.indices.size(), random), survives_b(b.indices.size(), random);
  CHECK(commhooks_cpu_merge_topk(a.values.get(), a.indices.get(), a.indices.size(), b.values.get(), b.indices.get(),
                                 b.indices.size(), k, static_cast<int32_t>(1 + below(random, 3)), values.get(), indices.get(), survives_a.get(),
                                 survives_b.get()) == COMMHOOKS_OK);
  CHECK(commhooks_cpu_check_indices(indices.get(), k, n) == -1);
  Buffer<float> dense(n, random);
  for (Sparse *x : {&a, &b}) {
    CHECK(commhooks_cpu_scatter_add(dense.get(), n, x->values.get(), x->indices.get(), x->indices.size(), 1.0f) ==
          COMMHOOKS_OK);
  }
  float smallest = INFINITY;
  for (int64_t j = 0; j < k && indices[j] != COMMHOOKS_PAD; ++j) {
    CHECK(values[j] == dense[indices[j]]);
    smallest = std::min(smallest, std::fabs(values[j]));
    dense[indices[j]] = 0.0f;
  }
  for (int64_t i = 0; i < n && k > 0; ++i) CHECK(std::fabs(dense[i]) <= smallest);
  for (int64_t j = 0; j < a.indices.size(); ++j) {
    const bool in = std::binary_search(indices.get(), indices.get() + k, a.indices[j]) && a.indices[j] != COMMHOOKS_PAD;
    CHECK(survives_a[j] == (in ? 1 : 0));
  }
  Buffer<uint8_t> found(a.indices.size(), random);
  CHECK(commhooks_cpu_contains(a.indices.get(), a.indices.size(), b.indices.get(), b.indices.size(), found.get()) ==
        COMMHOOKS_OK);
  for (int64_t j = 0; j < a.indices.size(); ++j) {
    const bool in = j < used_a && std::binary_search(b.indices.get(), b.indices.get() + used_b, a.indices[j]);
    CHECK(found[j] == (in ? 1 : 0));
  }
  Buffer<float> out(n, random);
  Buffer<uint16_t> half(n, random);
  CHECK(commhooks_cpu_write_back(out.get(), COMMHOOKS_F32, n, a.values.get(), a.indices.get(), 1, a.indices.size(), 0.5f,
                                 1 + static_cast<int32_t>(below(random, 4))) == COMMHOOKS_OK);
  CHECK(commhooks_cpu_write_back(half.get(), COMMHOOKS_BF16, n, a.values.get(), a.indices.get(), 1, a.indices.size(),
                                 0.5f, 2) == COMMHOOKS_OK);
  for (int64_t j = 0; j < used_a; ++j) CHECK(out[a.indices[j]] == 0.5f * a.values[j]);
}

// A large output, so that the streaming stores run too.
void stream_once(Random &random) {
  const int64_t n = (4 << 20) + 77;
  Sparse a(n, 5000, 5000, random);
  Buffer<float> out(n, random);
  CHECK(commhooks_cpu_write_back(out.get(), COMMHOOKS_F32, n, a.values.get(), a.indices.get(), 1, 5000, 1.0f, 3) ==
        COMMHOOKS_OK);
  for (int64_t j = 0; j < 5000; ++j) CHECK(out[a.indices[j]] == a.values[j]);
}

void fuzz(uint64_t seed, int rounds) {
  Random random(seed);
  for (int round = 0; round < rounds; ++round) {
    fuzz_topk(random);
    fuzz_other_selections(random);
    fuzz_merge_and_scatter(random);
  }
}

void refuse_bad_arguments() {
  commhooks_report report{};
  float x = 0.0f;
  int32_t index = 5;
  commhooks_fused fused{};
  fused.grad = &x;
  fused.residual = &x;
  fused.numel = 1;
  CHECK(commhooks_cpu_select_topk(&fused, 2, 0, 1, &x, &index, &report) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_select_topk(&fused, 1, 0, 0, &x, &index, &report) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_select_topk(nullptr, 1, 0, 1, &x, &index, &report) == COMMHOOKS_INVALID);
  fused.grad_dtype = 7;
  CHECK(commhooks_cpu_select_topk(&fused, 1, 0, 1, &x, &index, &report) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_scatter_add(&x, 1, &x, &index, 1, 1.0f) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_write_back(&x, 0, 1, &x, &index, 1, 1, 1.0f, 1) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_check_indices(&index, 1, 5) == 0 && commhooks_cpu_check_indices(&index, 1, 6) == -1);
}

}  // namespace

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  refuse_bad_arguments();
  for (const char *isa : {"scalar", "avx2", "avx512", "neon"}) {
    if (commhooks_cpu_use_isa(isa) != COMMHOOKS_OK) continue;
    Random random(1);
    stream_once(random);
    fuzz(1, rounds);
    std::printf("%s: %d rounds\n", isa, rounds);
  }
  std::vector<std::thread> callers;
  for (uint64_t seed = 2; seed < 5; ++seed) callers.emplace_back(fuzz, seed, std::max(rounds / 3, 1));
  for (std::thread &caller : callers) caller.join();
  std::printf("3 callers at once\n");
#if !defined(COMMHOOKS_NO_FORK)
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    fuzz(9, std::max(rounds / 3, 1));
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  std::printf("after a fork\n");
#endif
  return 0;
}
