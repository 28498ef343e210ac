// What the launch (run.cpp) hands to a kernel: a job, and the directions in it.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../axpy.h"

namespace zo {

// One direction of a pass over one tensor. The first rounds of Philox multiply words that all counters of a job share
// (the parameter id, the high half of the counter); those products are computed once and kept here.
struct Direction {
  // A word, eight times, so that AVX2 can use it as a memory operand of an xor and saves the broadcast.
  struct alignas(32) Word {
    uint32_t x[8];
    Word& operator=(uint32_t value) {
      for (uint32_t& each : x) each = value;
      return *this;
    }
  };
  Word k0[kPhiloxRounds], k1[kPhiloxRounds], round1_c0, round1_c2, round2_c2;
  const float* scales;  // n_scales of them; more than one if Job::several: consecutive directions of one seed
  int n_scales;
  uint64_t seed;
};

// A range of one tensor. Its counters of one stream agree in their high 32 bits.
struct Job {
  const Entry* entry;
  const Direction* directions;
  int n_directions;
  Distribution distribution;
  const Direction* rounding;  // of signs that are rounded stochastically: the words of their rounding bits
  float decay;
  bool stochastic, several;
};

// A kernel: applies a job to elements begin .. end - 1 of its tensor.
using RangeFn = void (*)(const Job&, int64_t begin, int64_t end);

void range_scalar(const Job& job, int64_t begin, int64_t end);
void range_avx2(const Job& job, int64_t begin, int64_t end);
void range_avx512(const Job& job, int64_t begin, int64_t end);

// While it lives, the thread rounds to nearest and keeps subnormals, whatever the caller has set
// (torch.set_flush_denormal, for example).
class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultFloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace zo
