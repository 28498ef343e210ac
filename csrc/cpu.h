// What the dispatcher (cpu.cpp) and the kernels of each instruction set share.
#pragma once

#include <vector>

#include "axpy.h"

namespace zo {

// One direction of a pass over one tensor. The first two rounds of Philox multiply words that every counter of a
// chunk has in common (the parameter id, the high half of the counter); those products are kept here.
struct Direction {
  float scale;
  uint64_t seed;
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  uint32_t round1_c0, round1_c2, round2_c2;
};

// A range of one tensor whose counters agree in their high 32 bits.
struct Job {
  const Entry* entry;
  const Direction* directions;
  int n_directions;
  float decay;
  bool stochastic;
};

using RangeFn = void (*)(const Job&, int64_t begin, int64_t end);

void range_scalar(const Job& job, int64_t begin, int64_t end);
void range_avx2(const Job& job, int64_t begin, int64_t end);
void range_avx512(const Job& job, int64_t begin, int64_t end);

// A whole pass, described once and run many times. Pointers must outlive it.
class Table {
 public:
  explicit Table(std::vector<Entry> entries) : entries_(std::move(entries)) {}

  // scales: n_groups rows of seeds.size() numbers. active: indices of entries, or null for all of them.
  void run(const std::vector<uint64_t>& seeds, const std::vector<float>& scales, const std::vector<float>& decays,
           bool stochastic, const std::vector<int64_t>* active, int threads, RangeFn range) const;

  const std::vector<Entry>& entries() const { return entries_; }

 private:
  std::vector<Entry> entries_;
};

}  // namespace zo
