// The kernels: each thread of the grid does its part (thread.h).
//
//   dst <- round(decay * src + m * sum_k scale_k * z(seed_k))      in float32, one fma a direction (docs/noise.md)
#pragma once

#include "thread.h"

namespace zo {

// How many thread blocks a multiprocessor shall hold: as many as leave each thread enough registers to spill nothing.
template <Distribution Z, DType D, MaskKind M, bool STOCHASTIC>
constexpr int resident() {
  if (Z == Distribution::kRademacher) return STOCHASTIC ? 5 : 6;
  if (M == MaskKind::kBool && STOCHASTIC) return 5;
  if (M != MaskKind::kNone || STOCHASTIC) return 6;
  return D == DType::kFloat32 ? 7 : 8;
}

template <Distribution Z, DType D, MaskKind M, bool STOCHASTIC, bool DECAY>
__global__ void __launch_bounds__(kThreads, (resident<Z, D, M, STOCHASTIC>()))
    axpy_kernel(Work work, Coefficients coefficients) {
  axpy_thread<Z, D, M, STOCHASTIC, DECAY>(work, coefficients, blockIdx.x, threadIdx.x);
}

template <DType D>
__global__ void __launch_bounds__(kThreads)
    record_kernel(const void* src, uint8_t* mask, float threshold, int64_t numel) {
  const int64_t byte = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (8 * byte < numel) record_byte<D>(global(src), global(mask), threshold, numel, byte);
}

}  // namespace zo
