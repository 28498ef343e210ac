// The table in device memory, which every launch reads. zo_kernels/backends/gpu_table.py writes it.
#pragma once

#include <cstdint>

namespace zo {

// One tensor.
struct TableRow {
  void* dst;
  const void* src;
  uint8_t* mask;
  int64_t numel, offset;
  uint32_t param_id;
  int32_t group;  // which row of scales and decays applies
  float threshold;
  uint32_t flags;  // bit 0: whole rows, and whole bytes of mask bits, cover the tensor
  uint64_t zero;   // always 0: see whole_blocks in thread.h
};
static_assert(sizeof(TableRow) == 64, "gpu_table.py writes eight words");

// The entries of a launch and how their elements are divided into chunks: thread block p works on the entry ids[e] with
// first_chunk[e] <= p < first_chunk[e + 1].
struct Work {
  const TableRow* rows;
  const int32_t* ids;          // (active,)
  const int32_t* first_chunk;  // (active + 1,)
  int active;
  int blocks_per_chunk;
};

// The numbers of a pass.
struct Coefficients {
  const uint64_t* seeds;  // (directions,)
  const float* scales;    // (groups, directions)
  const float* decays;    // (groups,)
  int directions;
};

}  // namespace zo
