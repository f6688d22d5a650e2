// Scratch memory that a calling thread keeps between calls, so that its pages are mapped only once.
#ifndef COMMHOOKS_CPU_SCRATCH_H
#define COMMHOOKS_CPU_SCRATCH_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

namespace commhooks {

class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { free(block_); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;

  // Room for `bytes` from the start, contents undefined; false when there is none. Invalidates what was
  // handed out.
  bool reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    free(block_);
    block_ = static_cast<char *>(malloc(bytes));
    size_ = block_ != nullptr ? bytes : 0;
    return block_ != nullptr;
  }

  // Hands out the next `count` elements of what was reserved.
  template <class T>
  T *take(int64_t count) {
    T *place = reinterpret_cast<T *>(block_ + used_);
    used_ += bytes_for<T>(count);
    return place;
  }

  // What `take` uses up: rounded to cache lines.
  template <class T>
  static size_t bytes_for(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
  }

  static Scratch &of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }

 private:
  char *block_ = nullptr;
  size_t size_ = 0;
  size_t used_ = 0;
};

}  // namespace commhooks
#endif
