// What a pass (run.cpp) and the kernels of each instruction set share.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../axpy.h"

namespace zo {

// One direction of a pass over one tensor. The first two rounds of Philox multiply words that every counter of a
// chunk has in common (the parameter id, the high half of the counter); those products are kept here.
struct Direction {
  // A word as AVX2 wants it in memory, to be an operand of an xor: broadcasting it first would be an instruction more.
  struct alignas(32) Word {
    uint32_t x[8];
    Word& operator=(uint32_t value) {
      for (uint32_t& each : x) each = value;
      return *this;
    }
  };
  Word k0[kPhiloxRounds], k1[kPhiloxRounds], round1_c0, round1_c2, round2_c2;
  const float* scales;  // one, or if Job::several one for each of the directions of this seed in a row
  int n_scales;
  uint64_t seed;
};

// A range of one tensor whose counters agree in their high 32 bits.
struct Job {
  const Entry* entry;
  const Direction* directions;
  int n_directions;
  float decay;
  bool stochastic, several;
};

using RangeFn = void (*)(const Job&, int64_t begin, int64_t end);

void range_scalar(const Job& job, int64_t begin, int64_t end);
void range_avx2(const Job& job, int64_t begin, int64_t end);
void range_avx512(const Job& job, int64_t begin, int64_t end);

// Rounding to nearest with subnormals kept, whatever the caller set (torch.set_flush_denormal, say).
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
