// The GPU kernels on the host: every thread of a launch in turn.
#include <cstdint>

#include "cuda/dispatch.h"
#include "cuda/thread.h"

namespace {

struct Axpy {
  const zo::Work& work;
  const zo::Coefficients& coefficients;
  int programs;

  template <zo::Distribution Z, zo::DType D, zo::MaskKind M, bool STOCHASTIC, bool DECAY>
  void operator()(zo::Variant<Z, D, M, STOCHASTIC, DECAY>) const {
    for (int chunk = 0; chunk < programs; ++chunk)
      for (int thread = 0; thread < zo::kThreads; ++thread)
        zo::axpy_thread<Z, D, M, STOCHASTIC, DECAY>(work, coefficients, chunk, thread);
  }
};

}  // namespace

extern "C" void axpy(int distribution, int dtype, int mask, int stochastic, int decay, const zo::TableRow* rows,
                     const int32_t* ids, const int32_t* first_chunk, int active, int programs, int blocks_per_chunk,
                     const uint64_t* seeds, const float* scales, const float* decays, int directions, void*) {
  const zo::Work work = {rows, ids, first_chunk, active, blocks_per_chunk};
  const zo::Coefficients coefficients = {seeds, scales, decays, directions};
  const zo::Kind kind = {zo::Distribution(distribution), zo::DType(dtype), zo::MaskKind(mask), stochastic != 0,
                         decay != 0};
  zo::with_variant(kind, Axpy{work, coefficients, programs});
}

extern "C" void record(int dtype, const void* src, uint8_t* mask, double threshold, int64_t numel, void*) {
  for (int64_t byte = 0; 8 * byte < numel; ++byte) {
    if (dtype == 0)
      zo::record_byte<zo::DType::kFloat32>(src, mask, float(threshold), numel, byte);
    else if (dtype == 1)
      zo::record_byte<zo::DType::kBFloat16>(src, mask, float(threshold), numel, byte);
    else
      zo::record_byte<zo::DType::kFloat16>(src, mask, float(threshold), numel, byte);
  }
}

// Two float32, given by their bits, rounded stochastically to 16-bit floats.
extern "C" uint32_t round_pair(int dtype, uint32_t even, uint32_t odd, uint32_t rho_even, uint32_t rho_odd) {
  const float t[2] = {zo::from_bits(even), zo::from_bits(odd)};
  return dtype == 1 ? zo::pair_stochastic<zo::DType::kBFloat16>(t[0], t[1], rho_even, rho_odd)
                    : zo::pair_stochastic<zo::DType::kFloat16>(t[0], t[1], rho_even, rho_odd);
}
