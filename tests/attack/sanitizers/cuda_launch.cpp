// In place of csrc/cuda/launch.cu: the extension's launches run on the host, every thread in turn.
#include "cuda/dispatch.h"
#include "cuda/thread.h"

namespace zo {

namespace {

struct Axpy {
  const Work& work;
  const Coefficients& coefficients;
  int programs;

  template <Distribution Z, DType D, MaskKind M, bool STOCHASTIC, bool DECAY>
  void operator()(Variant<Z, D, M, STOCHASTIC, DECAY>) const {
    for (int chunk = 0; chunk < programs; ++chunk)
      for (int thread = 0; thread < kThreads; ++thread)
        axpy_thread<Z, D, M, STOCHASTIC, DECAY>(work, coefficients, chunk, thread);
  }
};

}  // namespace

const char* device_error() { return ""; }

void launch_axpy(const Kind& kind, const Work& work, const Coefficients& coefficients, int programs, uintptr_t) {
  with_variant(kind, Axpy{work, coefficients, programs});
}

void launch_record(DType dtype, const void* src, uint8_t* mask, float threshold, int64_t numel, uintptr_t) {
  for (int64_t byte = 0; 8 * byte < numel; ++byte) {
    if (dtype == DType::kFloat32)
      record_byte<DType::kFloat32>(src, mask, threshold, numel, byte);
    else if (dtype == DType::kBFloat16)
      record_byte<DType::kBFloat16>(src, mask, threshold, numel, byte);
    else
      record_byte<DType::kFloat16>(src, mask, threshold, numel, byte);
  }
}

}  // namespace zo
