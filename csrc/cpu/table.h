// A table of tensors, checked once, over which many passes run.
#pragma once

#include <cstddef>
#include <vector>

#include "job.h"
#include "layout.h"

namespace zo {

// The sizes of the memory at an entry's addresses.
struct Room {
  int64_t dst, src, mask;  // bytes
};

// The addresses begin .. end - 1.
struct Span {
  uintptr_t begin, end;
};

// The layout of an entry that is not contiguous; empty for one that is.
struct Strided {
  std::vector<int64_t> shape, dst, src;  // strides, in elements
};

// An entry as the caller describes it, before any check.
struct Given {
  Entry entry;
  Room room;
  Strided strided = {};
};

// The caller guarantees that the addresses are valid, have the sizes that `Room` gives, and stay valid while the table
// is in use. Everything else is checked.
class Table {
 public:
  // Throws std::invalid_argument if an entry's numbers do not fit, or one entry writes where another reads or writes.
  explicit Table(const std::vector<Given>& given);

  // Applies a pass. scales: a row of seeds.size() numbers for each decay. active: indices of entries, null for all.
  //
  // Throws, before anything is changed: std::invalid_argument if the numbers do not fit the table, std::runtime_error
  // if a running pass of another thread shares memory with this one and either writes it; and std::bad_alloc.
  void run(const std::vector<uint64_t>& seeds, const std::vector<double>& scales, const std::vector<double>& decays,
           Distribution distribution, bool stochastic, const std::vector<int64_t>* active, int threads,
           RangeFn range) const;

 private:
  friend class UnderWay;

  void check(size_t seeds, size_t scales, size_t decays, const std::vector<int64_t>* active, int threads) const;

  std::vector<Entry> entries_;
  std::vector<Layout> layouts_;       // one for each entry
  size_t groups_ = 0;                 // a pass needs at least so many decays
  std::vector<Span> written_, read_;  // memory of a pass; sorted, without overlaps
};

// Registers a pass as running for as long as it lives.
class UnderWay {
 public:
  explicit UnderWay(const Table& table);  // throws std::runtime_error: see Table::run
  ~UnderWay();
  UnderWay(const UnderWay&) = delete;
  UnderWay& operator=(const UnderWay&) = delete;

 private:
  const Table& table_;
};

}  // namespace zo
