#include "operations/sample.h"

#include <algorithm>
#include <cmath>

#include "commhooks_cpu.h"
#include "simd/dispatch.h"
#include "simd/half.h"
#include "support/mix.h"
#include "support/pool.h"
#include "support/scratch.h"

namespace commhooks {
namespace {

constexpr int64_t kMaxSamples = 204800;
// Pieces whose cache lines are asked for before they are needed.
constexpr int64_t kAhead = 16;

// Draws pieces [first, last) of `pieces`: piece j at a random place in the j-th of equal strata of
// plan.active. The place depends on j alone, so the sample is the same for any number of tasks.
class Pieces {
 public:
  Pieces(const Plan &plan, int64_t pieces, uint64_t seed) : plan_(plan), pieces_(pieces), seed_(mix(seed + 1)) {}

  // Start of piece j; pieces must be asked for in ascending order.
  Range place(int64_t j) {
    const int64_t from = position(j);
    const uint64_t width = static_cast<uint64_t>(std::max<int64_t>(position(j + 1) - from, 1));
    const int64_t at = from + static_cast<int64_t>(((mix(seed_ + static_cast<uint64_t>(j)) >> 32) * width) >> 32);
    while (at - before_ >= length(range_)) before_ += length(range_++);
    const Range &range = plan_.active[range_];
    const int64_t begin = range.begin + (at - before_);
    // At the end of a range the piece begins earlier, or is shorter.
    const int64_t shifted = std::max(range.begin, std::min(begin & ~(kPiece - 1), range.end - kPiece));
    return {shifted, std::min(range.end, shifted + kPiece), range.rescale};
  }

 private:
  int64_t position(int64_t j) const {
    return static_cast<int64_t>(static_cast<double>(plan_.numel) * static_cast<double>(j) /
                                static_cast<double>(pieces_));
  }
  int64_t length(size_t range) const { return plan_.active[range].end - plan_.active[range].begin; }

  const Plan &plan_;
  int64_t pieces_;
  uint64_t seed_;
  size_t range_ = 0;
  int64_t before_ = 0;  // active elements before range_
};

void prefetch(const FuseArgs &args, int64_t i) {
  const int64_t size = args.dtype == COMMHOOKS_F32 ? 4 : 2;
  __builtin_prefetch(static_cast<const char *>(args.grad) + i * size);
  __builtin_prefetch(args.residual + i);
  if (args.velocity != nullptr) __builtin_prefetch(args.velocity + i);
}

// The operands whose sum is the new residual, which holds the corrected gradient once the pass is over.
FuseArgs passed_args(const Plan &plan) {
  FuseArgs args = plan.args;
  args.grad = args.residual_out;
  args.residual = args.residual_out;
  args.dtype = COMMHOOKS_F32;
  args.velocity = nullptr;
  args.factor = 0.0f;
  return args;
}

int64_t draw(const Plan &plan, bool passed, int64_t pieces, int64_t first, int64_t last, uint64_t seed, float *out) {
  FuseArgs args = passed ? passed_args(plan) : plan.args;
  const Kernels &kernel = kernels();
  Pieces places(plan, pieces, seed);
  Range ahead[kAhead];
  int64_t drawn = 0;
  for (int64_t j = first; j < last + kAhead; ++j) {
    Range &slot = ahead[(j - first) % kAhead];
    if (j >= first + kAhead) {
      args.rescale = passed ? 1.0f : slot.rescale;
      kernel.sample(args, slot.begin, slot.end - slot.begin, out + drawn);
      drawn += slot.end - slot.begin;
    }
    if (j < last) {
      slot = places.place(j);
      prefetch(args, slot.begin);
    } else {
      slot = {0, 0};
    }
  }
  return drawn;
}

}  // namespace

Guess plan_guess(int64_t numel, int64_t k, int64_t effort) {
  int64_t samples = std::max(std::min(numel / 256, kMaxSamples), 24 * (numel / k));
  samples = std::min(samples * effort, numel / 16);
  samples = std::max<int64_t>(samples / kPiece, 16) * kPiece;
  const double expected = static_cast<double>(samples) * static_cast<double>(k) / static_cast<double>(numel);
  const double rank = expected + 8.0 * std::sqrt(expected) + 8.0;
  // Clusters can double what the guess lets through.
  const double through = static_cast<double>(numel) * rank / static_cast<double>(samples);
  const int64_t capacity = std::max(3 * k, static_cast<int64_t>(2.0 * through)) + 4096;
  return {samples, std::min(static_cast<int64_t>(rank), samples), std::min(capacity, numel)};
}

int64_t samples_per_task(int64_t samples, int64_t tasks) { return (samples / kPiece / tasks + 1) * kPiece; }

uint32_t guess_key(const Plan &plan, bool passed, const Guess &guess, uint64_t seed,
                   const std::vector<float *> &rooms, uint32_t *bins) {
  const int64_t tasks = static_cast<int64_t>(rooms.size());
  const int64_t pieces = guess.samples / kPiece;
  std::vector<List> lists(rooms.size());
  parallel(static_cast<int>(tasks), static_cast<int>(tasks), [&](int t) {
    const size_t at = static_cast<size_t>(t);
    float *spare = rooms[at] + samples_per_task(guess.samples, tasks) + kAppendSlack;
    lists[at] = {rooms[at], nullptr, 0, spare};
    lists[at].size = draw(plan, passed, pieces, pieces * t / tasks, pieces * (t + 1) / tasks, seed, rooms[at]);
  });
  int64_t drawn = 0;
  for (const List &list : lists) drawn += list.size;
  if (drawn == 0) return 0;
  return kth_largest_key(lists, std::min(guess.rank, drawn), bins, static_cast<int>(tasks));
}

}  // namespace commhooks

extern "C" int32_t commhooks_cpu_sample_threshold(const commhooks_fused *fused, int64_t k, uint64_t seed,
                                                  float *threshold) {
  using namespace commhooks;
  if (threshold == nullptr || !valid(fused, 1) || k < 0 || k > fused->numel) return COMMHOOKS_INVALID;
  *threshold = 0.0f;
  if (k == 0) return COMMHOOKS_OK;
  try {
    commhooks_fused unmarked = *fused;
    unmarked.active = nullptr;
    const Plan plan(unmarked, 1, true);
    Guess guess = plan_guess(plan.numel, k, 1);
    guess.rank = std::max<int64_t>(1, std::llround(static_cast<double>(guess.samples) * static_cast<double>(k) /
                                                   static_cast<double>(plan.numel)));
    const int64_t room = 2 * (samples_per_task(guess.samples, 1) + kAppendSlack);
    Scratch &scratch = Scratch::of_this_thread();
    if (!scratch.reserve(Scratch::bytes_for<float>(room) + Scratch::bytes_for<uint32_t>(kBins))) {
      return COMMHOOKS_NO_MEMORY;
    }
    float *samples = scratch.take<float>(room);
    uint32_t *bins = scratch.take<uint32_t>(kBins);
    *threshold = float_of(guess_key(plan, false, guess, seed, {samples}, bins));
  } catch (...) {
    return COMMHOOKS_NO_MEMORY;
  }
  return COMMHOOKS_OK;
}
