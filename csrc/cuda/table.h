// What a pass on a GPU reads from the device's memory. zo_kernels/backends/gpu_table.py writes it.
#pragma once

#include <cstdint>

namespace zo {

struct TableRow {
  void* dst;
  const void* src;
  uint8_t* mask;
  int64_t numel, offset;
  uint32_t param_id;
  int32_t group;  // row of scales and decays
  float threshold;
  uint32_t flags;  // bit 0: whole rows and whole bytes of mask bits cover the tensor
  uint64_t zero;
};
static_assert(sizeof(TableRow) == 64, "gpu_table.py writes eight words");

// The entries that take part in a pass, and how their elements are divided: thread block p works on entry ids[e] with
// first_chunk[e] <= p < first_chunk[e + 1].
struct Work {
  const TableRow* rows;
  const int32_t* ids;          // (active,)
  const int32_t* first_chunk;  // (active + 1,)
  int active;
  int blocks_per_chunk;
};

struct Coefficients {
  const uint64_t* seeds;  // (directions,)
  const float* scales;    // (groups, directions)
  const float* decays;    // (groups,)
  int directions;
};

}  // namespace zo
