// A whole pass over many tensors, described once and run many times.
#pragma once

#include <cstddef>
#include <vector>

#include "job.h"
#include "layout.h"

namespace zo {

// How much memory there is at an entry's addresses.
struct Room {
  int64_t dst, src, mask;  // bytes
};

// The addresses begin .. end - 1.
struct Span {
  uintptr_t begin, end;
};

// How an entry lies in memory that is not contiguous; empty for one that is.
struct Strided {
  std::vector<int64_t> shape, dst, src;  // strides, in elements
};

// What an entry is, as whoever describes it gives it: nothing has been looked at.
struct Given {
  Entry entry;
  Room room;
  Strided strided = {};
};

// What memory cannot tell is believed: that the addresses are this process's, as long as the rooms say, and stay so
// while the table is in use. Everything else is checked.
class Table {
 public:
  // Throws std::invalid_argument if an entry's numbers do not fit, or one entry writes where another reads or writes.
  explicit Table(const std::vector<Given>& given);

  // scales: rows of seeds.size() numbers, as many as there are decays. active: indices of entries, or null for all.
  //
  // Throws, before anything is changed: std::invalid_argument if the numbers do not fit the table, std::runtime_error
  // if a pass in another thread has memory that this one writes, or writes what it reads; and std::bad_alloc.
  void run(const std::vector<uint64_t>& seeds, const std::vector<double>& scales, const std::vector<double>& decays,
           bool stochastic, const std::vector<int64_t>* active, int threads, RangeFn range) const;

 private:
  friend class UnderWay;

  void check(size_t seeds, size_t scales, size_t decays, const std::vector<int64_t>* active, int threads) const;

  std::vector<Entry> entries_;
  std::vector<Layout> layouts_;       // of each entry
  size_t groups_ = 0;                 // at least so many decays are needed
  std::vector<Span> written_, read_;  // by a pass; sorted, and those of a list do not overlap
};

// A pass that is under way: it lives as long as the pass runs.
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
