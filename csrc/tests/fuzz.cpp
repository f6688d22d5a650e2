// Random calls of the C ABI against simple oracles, for the sanitizer builds (scripts/sanitize): sizes 0 and
// 1, primes, unaligned pointers, ties, half precision, momentum, non-finite values in gradients and in
// memories, many threads, several callers at once, a fork after use. Every buffer has exactly its size, so
// that a step outside is seen.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <thread>
#include <vector>

#include "operands.h"

namespace {

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
    CHECK(same(values[j], used ? c[static_cast<size_t>(indices[j])] : 0.0f));
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool taken = std::binary_search(order.begin(), order.end(), i);
    CHECK(same(operands.new_residual()[i], taken ? 0.0f : c[static_cast<size_t>(i)]));
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
  for (int64_t j = 0; j < report.count; ++j) {
    CHECK(key_of(values[j]) > key_of(0.5f) && first.new_residual()[indices[j]] == 0.0f);
  }

  CHECK(commhooks_cpu_random_indices(random(), 1, 2, n, k, indices.get()) == COMMHOOKS_OK);
  CHECK(commhooks_cpu_check_indices(indices.get(), k, n) == -1);
  Operands second(n, random);
  int64_t nonfinite = 0;
  std::vector<bool> live;
  const std::vector<float> c = second.corrected(&nonfinite, &live);
  CHECK(commhooks_cpu_select_indices(&second.fused, indices.get(), k, threads, values.get(), &report) == COMMHOOKS_OK);
  CHECK(report.count == k && report.nonfinite == nonfinite);
  for (int64_t j = 0; j < k; ++j) {
    const size_t at = static_cast<size_t>(indices[j]);
    CHECK(same(values[j], live[at] ? c[at] : 0.0f));
  }
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
  commhooks_rows row() { return {values.get(), indices.get(), 1, values.size(), 0, 0}; }
  // Values are small integers, whose halves and sums are exact in any type, or `any`.
  Sparse(int64_t n, int64_t used, int64_t size, Random &random, bool any = false)
      : values(size, random), indices(size, random) {
    CHECK(commhooks_cpu_random_indices(random(), 3, 4, n, used, indices.get()) == COMMHOOKS_OK);
    for (int64_t j = used; j < size; ++j) indices[j] = COMMHOOKS_PAD;
    const bool nasty = random() % 4 == 0;
    std::normal_distribution<float> gauss;
    for (int64_t j = 0; j < used; ++j) {
      values[j] = any ? gauss(random) : static_cast<float>(below(random, 9) - 4);
      if (nasty && random() % 5 == 0) values[j] = random() % 3 == 0 ? INFINITY : NAN;
    }
  }
};

void fuzz_merge_and_scatter(Random &random) {
  const int64_t n = std::max<int64_t>(1, random_size(random));
  const int64_t used_a = below(random, n + 1);
  const int64_t used_b = below(random, n + 1);
  const bool any = random() % 2 != 0;
  Sparse a(n, used_a, used_a + below(random, 3), random, any);
  Sparse b(n, used_b, used_b + below(random, 3), random, any);
  const int64_t k = below(random, random() % 2 != 0 ? 9 : used_a + used_b + 2);
  Buffer<float> values(k, random);
  Buffer<int32_t> indices(k, random);
  Buffer<uint8_t> survives_a(a.indices.size(), random), survives_b(b.indices.size(), random);
  CHECK(commhooks_cpu_merge_topk(a.values.get(), a.indices.get(), a.indices.size(), b.values.get(), b.indices.get(),
                                 b.indices.size(), k, static_cast<int32_t>(1 + below(random, 3)), values.get(), indices.get(), survives_a.get(),
                                 survives_b.get()) == COMMHOOKS_OK);
  CHECK(commhooks_cpu_check_indices(indices.get(), k, n) == -1);
  Buffer<float> dense(n, random);
  for (Sparse *x : {&a, &b}) {
    const commhooks_rows row = x->row();
    CHECK(commhooks_cpu_scatter_add(dense.get(), n, &row, 1.0f) == COMMHOOKS_OK);
  }
  uint32_t smallest = 0x7fffffffu;
  int64_t taken = 0;
  for (; taken < k && indices[taken] != COMMHOOKS_PAD; ++taken) {
    CHECK(same(values[taken], dense[indices[taken]]));
    smallest = std::min(smallest, key_of(values[taken]));
    dense[indices[taken]] = 0.0f;
  }
  for (int64_t i = 0; i < n && k > 0; ++i) CHECK(key_of(dense[i]) <= smallest);
  std::vector<int32_t> either;
  std::set_union(a.indices.get(), a.indices.get() + used_a, b.indices.get(), b.indices.get() + used_b,
                 std::back_inserter(either));
  CHECK(taken == std::min(k, static_cast<int64_t>(either.size())));
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
}

void fuzz_write_back(Random &random) {
  const int64_t n = std::max<int64_t>(1, random_size(random));
  const int64_t rows = below(random, 4);
  const int64_t size = below(random, n + 1) + below(random, 3);
  Buffer<float> values(rows * size, random), out(n, random), expected(n, random);
  Buffer<int32_t> indices(rows * size, random);
  for (int64_t r = 0; r < rows; ++r) {
    Sparse row(n, std::min(below(random, size + 1), n), size, random);
    std::copy_n(row.values.get(), size, values.get() + r * size);
    std::copy_n(row.indices.get(), size, indices.get() + r * size);
  }
  for (int64_t j = 0; j < rows * size; ++j) {
    if (indices[j] != COMMHOOKS_PAD) expected[indices[j]] += 0.5f * values[j];
  }
  std::fill_n(out.get(), n, 7.0f);
  const commhooks_rows sparse{values.get(), indices.get(), rows, size, size, size};
  CHECK(commhooks_cpu_write_back(out.get(), COMMHOOKS_F32, n, &sparse, 0.5f,
                                 1 + static_cast<int32_t>(below(random, 4))) == COMMHOOKS_OK);
  for (int64_t i = 0; i < n; ++i) CHECK(same(out[i], expected[i]));
  if (rows != 1) return;
  for (const int32_t dtype : {COMMHOOKS_BF16, COMMHOOKS_F16}) {
    Buffer<uint16_t> half(n, random);
    std::fill_n(half.get(), n, uint16_t{7});
    CHECK(commhooks_cpu_write_back(half.get(), dtype, n, &sparse, 0.5f, 2) == COMMHOOKS_OK);
    // Halves of small integers are exact; what is infinite becomes the largest finite number.
    for (int64_t i = 0; i < n; ++i) {
      if (!std::isinf(expected[i])) CHECK(same(from_half(half[i], dtype), expected[i]));
    }
  }
}

// A large output, so that the streaming stores run too.
void stream_once(Random &random) {
  const int64_t n = (4 << 20) + 77;
  Sparse a(n, 5000, 5000, random);
  Buffer<float> out(n, random);
  const commhooks_rows row = a.row();
  CHECK(commhooks_cpu_write_back(out.get(), COMMHOOKS_F32, n, &row, 1.0f, 3) == COMMHOOKS_OK);
  for (int64_t j = 0; j < 5000; ++j) CHECK(out[a.indices[j]] == a.values[j]);
}

// Indices as a hostile peer may send them: any bits. Every function refuses them, or they happen to be in
// order; nothing outside the buffers is touched, which the sanitizers see.
void fuzz_hostile_indices(Random &random) {
  const int64_t n = 1 + below(random, 300);
  const int64_t size = 1 + below(random, 40);
  Sparse a(n, std::min(n, size), size, random);
  Sparse b(n, std::min(n, size), size, random);
  static const int32_t nasty[] = {-1, INT32_MIN, COMMHOOKS_PAD, COMMHOOKS_PAD - 1, 0};
  for (int64_t turns = 1 + below(random, 3); turns > 0; --turns) {
    const int32_t any = static_cast<int32_t>(random());
    a.indices[below(random, size)] = random() % 2 != 0 ? nasty[below(random, 5)] : any;
  }
  const bool in_order = commhooks_cpu_check_indices(a.indices.get(), size, COMMHOOKS_PAD) == -1;
  const bool in_range = commhooks_cpu_check_indices(a.indices.get(), size, n) == -1;
  const int32_t wanted = in_range ? COMMHOOKS_OK : COMMHOOKS_INVALID;
  Buffer<float> dense(n, random), values(size, random);
  const commhooks_rows row = a.row();
  CHECK(commhooks_cpu_scatter_add(dense.get(), n, &row, 1.0f) == wanted);
  for (int64_t i = 0; !in_range && i < n; ++i) CHECK(dense[i] == 0.0f);
  CHECK(commhooks_cpu_write_back(dense.get(), COMMHOOKS_F32, n, &row, 1.0f, 2) == wanted);
  Operands operands(n, random);
  commhooks_report report{};
  CHECK(commhooks_cpu_select_indices(&operands.fused, a.indices.get(), size, 2, values.get(), &report) == wanted);
  Buffer<int32_t> indices(size, random);
  Buffer<uint8_t> kept_a(size, random), kept_b(size, random);
  const int32_t ordered = in_order ? COMMHOOKS_OK : COMMHOOKS_INVALID;
  CHECK(commhooks_cpu_merge_topk(b.values.get(), b.indices.get(), size, a.values.get(), a.indices.get(), size, size, 1,
                                 values.get(), indices.get(), kept_b.get(), kept_a.get()) == ordered);
  CHECK(commhooks_cpu_contains(b.indices.get(), size, a.indices.get(), size, kept_b.get()) == ordered);
}

// Whether an encoder writes these scales and codes; one element at a time.
bool from_an_encoder(const uint8_t *message, int64_t n, int32_t bits) {
  const int64_t blocks = (n + 255) / 256;
  for (int64_t b = 0; b < blocks; ++b) {
    const float scale = from_half(static_cast<uint16_t>(message[2 * b] | message[2 * b + 1] << 8), COMMHOOKS_BF16);
    if (std::isnan(scale) || (scale == 0.0f && !std::signbit(scale))) continue;
    if (!(scale >= std::ldexp(1.0f, -100) && scale <= std::ldexp(1.0f, 100))) return false;
  }
  for (int64_t i = 0; bits >= 4 && i < n; ++i) {
    const int byte = message[2 * blocks + i * bits / 8];
    if ((bits == 8 ? byte : i % 2 == 0 ? byte & 15 : byte >> 4) == 0) return false;
  }
  return true;
}

// Encodes, and decodes what was encoded and what a hostile peer may send: any bytes, or a few of them changed.
void fuzz_low_bit(Random &random) {
  const int64_t n = random_size(random);
  const int32_t bits = 1 << below(random, 4);
  const int64_t size = 2 * ((n + 255) / 256) + (n * bits + 7) / 8;
  const int32_t threads = 1 + static_cast<int32_t>(below(random, 4));
  Buffer<float> x(n, random), rest(n, random), out(n, random);
  Buffer<uint8_t> bytes(size, random);
  fill(x, random, random() % 2 != 0);
  float *const remainder = random() % 2 != 0 ? rest.get() : nullptr;
  CHECK(commhooks_cpu_low_bit_encode(x.get(), n, bits, threads, bytes.get(), size, remainder) == COMMHOOKS_OK);
  CHECK(from_an_encoder(bytes.get(), n, bits));
  commhooks_messages messages{bytes.get(), 1, size, size, bits};
  CHECK(commhooks_cpu_low_bit_decode(&messages, threads, out.get(), n) == COMMHOOKS_OK);
  for (int64_t i = 0; remainder != nullptr && i < n; ++i) CHECK(same(rest[i], x[i] - out[i]));
  CHECK(commhooks_cpu_low_bit_encode(x.get(), n, bits, threads, bytes.get(), size, x.get()) == COMMHOOKS_OK);
  for (int64_t i = 0; remainder != nullptr && i < n; ++i) CHECK(same(rest[i], x[i]));

  const bool any_bytes = random() % 3 == 0;
  for (int64_t turns = any_bytes ? size : below(random, 4); turns > 0 && size > 0; --turns) {
    bytes[any_bytes ? turns - 1 : below(random, size)] = static_cast<uint8_t>(random());
  }
  messages.rows = below(random, 4);
  messages.stride = 0;
  const bool fine = messages.rows == 0 || from_an_encoder(bytes.get(), n, bits);
  Buffer<float> sum(n, random);
  std::fill_n(sum.get(), n, 7.0f);
  CHECK(commhooks_cpu_low_bit_decode_add(&messages, threads, sum.get(), n) == (fine ? COMMHOOKS_OK : COMMHOOKS_INVALID));
  for (int64_t i = 0; (!fine || messages.rows == 0) && i < n; ++i) CHECK(sum[i] == 7.0f);
  messages.size += random() % 2 != 0 ? 1 : -1;
  CHECK(commhooks_cpu_low_bit_decode_add(&messages, threads, sum.get(), n) == COMMHOOKS_INVALID);
}

void fuzz(uint64_t seed, int rounds) {
  Random random(seed);
  for (int round = 0; round < rounds; ++round) {
    fuzz_topk(random);
    fuzz_other_selections(random);
    fuzz_merge_and_scatter(random);
    fuzz_write_back(random);
    for (int i = 0; i < 20; ++i) fuzz_hostile_indices(random);
    for (int i = 0; i < 8; ++i) fuzz_low_bit(random);
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
  const commhooks_rows row{&x, &index, 1, 1, 1, 1};
  CHECK(commhooks_cpu_scatter_add(&x, 1, &row, 1.0f) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_write_back(&x, 0, 1, &row, 1.0f, 1) == COMMHOOKS_INVALID);
  uint8_t bytes[3] = {};
  commhooks_messages messages{bytes, 1, 3, 3, 8};
  CHECK(commhooks_cpu_low_bit_encode(&x, 1, 8, 1, bytes, 3, nullptr) == COMMHOOKS_OK);
  CHECK(commhooks_cpu_low_bit_decode(&messages, 1, &x, 1) == COMMHOOKS_OK);
  CHECK(commhooks_cpu_low_bit_encode(&x, 1, 3, 1, bytes, 3, nullptr) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_low_bit_encode(&x, 1, 8, 0, bytes, 3, nullptr) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_low_bit_encode(&x, 1, 8, 1, bytes, 4, nullptr) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_low_bit_encode(nullptr, 1, 8, 1, bytes, 3, nullptr) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_low_bit_encode(&x, -1, 8, 1, bytes, 3, nullptr) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_low_bit_decode(nullptr, 1, &x, 1) == COMMHOOKS_INVALID);
  CHECK(commhooks_cpu_low_bit_decode(&messages, 1, nullptr, 1) == COMMHOOKS_INVALID);
  messages.rows = 2;
  CHECK(commhooks_cpu_low_bit_decode(&messages, 1, &x, 1) == COMMHOOKS_INVALID);
  messages.stride = -3;
  CHECK(commhooks_cpu_low_bit_decode_add(&messages, 1, &x, 1) == COMMHOOKS_INVALID);
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
