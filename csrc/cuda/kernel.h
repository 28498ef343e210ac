// The kernels: a thread's work, for every thread of a grid.
#pragma once

#include "thread.h"

namespace zo {

// How many thread blocks a processor is to hold: as many as leave registers enough that nothing is spilled.
template <DType D, MaskKind M, bool STOCHASTIC>
constexpr int resident() {
  if (M == MaskKind::kBool && STOCHASTIC) return 5;
  if (M != MaskKind::kNone || STOCHASTIC) return 6;
  return D == DType::kFloat32 ? 7 : 8;
}

template <DType D, MaskKind M, bool STOCHASTIC, bool DECAY>
__global__ void __launch_bounds__(kThreads, (resident<D, M, STOCHASTIC>()))
    axpy_kernel(Work work, Coefficients coefficients) {
  axpy_thread<D, M, STOCHASTIC, DECAY>(work, coefficients, blockIdx.x, threadIdx.x);
}

template <DType D>
__global__ void __launch_bounds__(kThreads)
    record_kernel(const void* src, uint8_t* mask, float threshold, int64_t numel) {
  const int64_t byte = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (8 * byte < numel) record_byte<D>(global(src), global(mask), threshold, numel, byte);
}

}  // namespace zo
