// From sparse to dense: scatter_add, and write_back, which never reads what it overwrites.
#include <string.h>

#include <algorithm>
#include <vector>

#include "commhooks_cpu.h"
#include "simd/dispatch.h"
#include "simd/half.h"
#include "support/fence.h"
#include "support/indices.h"
#include "support/plan.h"
#include "support/pool.h"

namespace commhooks {
namespace {

// A block is put together in the first-level cache and streamed out.
constexpr int64_t kBlockBytes = 16384;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 18;

struct Rows {
  const commhooks_rows &given;
  float scale;

  int64_t count() const { return given.k == 0 ? 0 : given.rows; }
  int64_t k() const { return given.k; }
  const float *values(int64_t row) const { return given.values + row * given.values_stride; }
  const int32_t *indices(int64_t row) const { return given.indices + row * given.indices_stride; }
};

// Whether the rows may be read and all their indices are in order and below `numel`.
bool valid_rows(const commhooks_rows *rows, int64_t numel) {
  if (rows == nullptr || rows->rows < 0 || rows->k < 0) return false;
  if (rows->rows == 0 || rows->k == 0) return true;
  if (rows->values == nullptr || rows->indices == nullptr) return false;
  if (rows->rows > 1 && (rows->values_stride < 0 || rows->indices_stride < 0)) return false;
  for (int64_t r = 0; r < rows->rows; ++r) {
    if (!valid_indices(rows->indices + r * rows->indices_stride, rows->k, numel)) return false;
    if (rows->indices_stride == 0) return true;  // all rows share their indices
  }
  return true;
}

int64_t element_bytes(int32_t dtype) { return dtype == COMMHOOKS_F32 ? 4 : 2; }

void add_entry(char *block, int32_t dtype, int64_t at, float product) {
  if (dtype == COMMHOOKS_F32) {
    reinterpret_cast<float *>(block)[at] += product;
    return;
  }
  // One row: the place still holds 0. Adding it first gives +0 for a product of -0.
  const float sum = 0.0f + product;
  reinterpret_cast<uint16_t *>(block)[at] = dtype == COMMHOOKS_BF16 ? float_to_bf16(sum) : float_to_f16(sum);
}

// Writes elements [begin, end) of `out`.
class BlockWriter {
 public:
  BlockWriter(const Rows &rows, int32_t dtype, char *out, bool stream)
      : rows_(rows), dtype_(dtype), out_(out), stream_(stream), next_(static_cast<size_t>(rows.count())) {}

  void write(int64_t begin, int64_t end) {
    for (size_t r = 0; r < next_.size(); ++r) {
      const int32_t *row = rows_.indices(static_cast<int64_t>(r));
      next_[r] = std::lower_bound(row, row + rows_.k(), begin) - row;
    }
    const int64_t size = element_bytes(dtype_);
    // A first short block brings the address to a cache line (if it is a multiple of the element at all).
    const int64_t odd = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out_ + begin * size) & 63u);
    const bool alignable = odd % size == 0;
    const int64_t head = alignable ? std::min(end, begin + (64 - odd) % 64 / size) : begin;
    alignas(64) char buffer[kBlockBytes] = {};
    if (head > begin) block(begin, head, false, buffer);
    for (int64_t from = head; from < end; from += kBlockBytes / size) {
      block(from, std::min(end, from + kBlockBytes / size), alignable, buffer);
    }
    finish_streams();
  }

 private:
  // Whether a row has an entry below `to`.
  bool any_below(int64_t to) const {
    for (size_t r = 0; r < next_.size(); ++r) {
      if (next_[r] < rows_.k() && rows_.indices(static_cast<int64_t>(r))[next_[r]] < to) return true;
    }
    return false;
  }

  void add_below(int64_t from, int64_t to, char *block) {
    for (size_t r = 0; r < next_.size(); ++r) {
      const float *values = rows_.values(static_cast<int64_t>(r));
      const int32_t *indices = rows_.indices(static_cast<int64_t>(r));
      int64_t &j = next_[r];
      for (; j < rows_.k() && indices[j] < to; ++j) {
        add_entry(block, dtype_, indices[j] - from, values[j] * rows_.scale);
      }
    }
  }

  // Zeroes again what was added from `from` on: few elements, where memset would write the whole block.
  void clear_from(int64_t from, char *block) const {
    const int64_t size = element_bytes(dtype_);
    for (size_t r = 0; r < next_.size(); ++r) {
      const int32_t *row = rows_.indices(static_cast<int64_t>(r));
      for (int64_t j = next_[r] - 1; j >= 0 && row[j] >= from; --j) {
        memset(block + (row[j] - from) * size, 0, static_cast<size_t>(size));
      }
    }
  }

  // `buffer`: kBlockBytes of zeros, which it is again afterwards.
  void block(int64_t from, int64_t to, bool aligned, char *buffer) {
    const int64_t size = element_bytes(dtype_);
    const int64_t bytes = (to - from) * size;
    char *target = out_ + from * size;
    const int64_t lines = stream_ && aligned ? bytes / 64 * 64 : 0;
    if (lines == 0) {
      memset(target, 0, static_cast<size_t>(bytes));
      add_below(from, to, target);
    } else if (!any_below(to)) {
      kernels().stream(target, nullptr, lines);
      memset(target + lines, 0, static_cast<size_t>(bytes - lines));
    } else {
      add_below(from, to, buffer);
      kernels().stream(target, buffer, lines);
      memcpy(target + lines, buffer + lines, static_cast<size_t>(bytes - lines));
      clear_from(from, buffer);
    }
  }

  const Rows &rows_;
  int32_t dtype_;
  char *out_;
  bool stream_;
  std::vector<int64_t> next_;
};

}  // namespace
}  // namespace commhooks

extern "C" int32_t commhooks_cpu_scatter_add(float *dense, int64_t numel, const commhooks_rows *rows, float scale) {
  using namespace commhooks;
  if (numel < 0 || numel >= COMMHOOKS_PAD || !valid_rows(rows, numel)) return COMMHOOKS_INVALID;
  if (numel > 0 && dense == nullptr) return COMMHOOKS_INVALID;
  const Rows sparse{*rows, scale};
  constexpr int64_t kAhead = 32;
  for (int64_t r = 0; r < sparse.count(); ++r) {
    const float *values = sparse.values(r);
    const int32_t *indices = sparse.indices(r);
    const int64_t used = used_indices(indices, sparse.k());
    for (int64_t j = 0; j < used; ++j) {
      if (j + kAhead < used) __builtin_prefetch(dense + indices[j + kAhead], 1);
      const float product = values[j] * scale;
      dense[indices[j]] += product;
    }
  }
  return COMMHOOKS_OK;
}

extern "C" int32_t commhooks_cpu_write_back(void *out, int32_t dtype, int64_t numel, const commhooks_rows *rows,
                                            float scale, int32_t threads) {
  using namespace commhooks;
  if (numel < 0 || numel >= COMMHOOKS_PAD || threads < 1 || !valid_rows(rows, numel)) return COMMHOOKS_INVALID;
  if (dtype < COMMHOOKS_F32 || dtype > COMMHOOKS_F16) return COMMHOOKS_INVALID;
  if ((dtype != COMMHOOKS_F32 && rows->rows > 1) || (numel > 0 && out == nullptr)) return COMMHOOKS_INVALID;
  try {
    const Rows sparse{*rows, scale};
    const bool stream = numel * element_bytes(dtype) >= kStreamBytes;
    const int used = static_cast<int>(std::clamp<int64_t>(numel / kElementsPerThread, 1, threads));
    const int tasks = share_count(numel, used);
    std::vector<BlockWriter> writers(static_cast<size_t>(tasks),
                                     BlockWriter(sparse, dtype, static_cast<char *>(out), stream));
    parallel(used, tasks, [&](int t) {
      const int64_t begin = (numel * t / tasks) & ~int64_t{63};
      const int64_t end = t + 1 == tasks ? numel : (numel * (t + 1) / tasks) & ~int64_t{63};
      writers[static_cast<size_t>(t)].write(begin, end);
    });
  } catch (...) {
    return COMMHOOKS_NO_MEMORY;
  }
  return COMMHOOKS_OK;
}
