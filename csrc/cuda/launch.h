// Launches of the GPU kernels on the current device.
#pragma once

#include <cstdint>

#include "../axpy.h"

namespace zo {

struct Work;
struct Coefficients;

// The template arguments of a pass over a group of entries.
struct Kind {
  Distribution distribution;
  DType dtype;
  MaskKind mask;
  bool stochastic;
  bool decay;  // false if all decays are 1
};

// Why the CUDA runtime in this extension finds no device here, or an empty string.
const char* device_error();

// Applies a pass to the entries of `work`: one thread block for each of its `programs` chunks.
// Throws std::runtime_error with CUDA's reason if the launch fails.
void launch_axpy(const Kind& kind, const Work& work, const Coefficients& coefficients, int programs, uintptr_t stream);

// Writes the mask bits of one tensor: bit i % 8 of mask[i / 8] is |src[i]| <= threshold, for each i < numel.
void launch_record(DType dtype, const void* src, uint8_t* mask, float threshold, int64_t numel, uintptr_t stream);

}  // namespace zo
