// Launches of the GPU kernels, on the current device. launch.cu has them.
#pragma once

#include <cstdint>

#include "../axpy.h"

namespace zo {

struct Work;
struct Coefficients;

// What is known at compile time of a pass over a group.
struct Kind {
  DType dtype;
  MaskKind mask;
  bool stochastic;
  bool decay;  // whether a decay may be other than 1
};

// Why the runtime that this was built with finds no device here, or an empty string.
const char* device_error();

// Throws std::runtime_error with CUDA's reason if the launch fails.
void launch_axpy(const Kind& kind, const Work& work, const Coefficients& coefficients, int programs, uintptr_t stream);

// Writes bit i % 8 of mask[i / 8] for each i < numel: |src[i]| <= threshold.
void launch_record(DType dtype, const void* src, uint8_t* mask, float threshold, int64_t numel, uintptr_t stream);

}  // namespace zo
