// Launches: chooses the kernel that was compiled for a pass, starts it on a stream and checks that it started.
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "kernel.h"

namespace zo {

namespace {

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

struct Axpy {
  const Work& work;
  const Coefficients& coefficients;
  int programs;
  cudaStream_t stream;

  template <Distribution Z, DType D, MaskKind M, bool STOCHASTIC, bool DECAY>
  void operator()(Variant<Z, D, M, STOCHASTIC, DECAY>) const {
    axpy_kernel<Z, D, M, STOCHASTIC, DECAY><<<programs, kThreads, 0, stream>>>(work, coefficients);
  }
};

template <DType D>
void record(const void* src, uint8_t* mask, float threshold, int64_t numel, cudaStream_t stream) {
  const int64_t a_block = 8 * kThreads;
  record_kernel<D><<<unsigned((numel + a_block - 1) / a_block), kThreads, 0, stream>>>(src, mask, threshold, numel);
}

}  // namespace

const char* device_error() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  cudaGetLastError();  // clears the error, which the next launch's check would report
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

void launch_axpy(const Kind& kind, const Work& work, const Coefficients& coefficients, int programs, uintptr_t stream) {
  with_variant(kind, Axpy{work, coefficients, programs, reinterpret_cast<cudaStream_t>(stream)});
  check_launch("axpy_kernel");
}

void launch_record(DType dtype, const void* src, uint8_t* mask, float threshold, int64_t numel, uintptr_t stream) {
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32:
      record<DType::kFloat32>(src, mask, threshold, numel, on);
      break;
    case DType::kBFloat16:
      record<DType::kBFloat16>(src, mask, threshold, numel, on);
      break;
    case DType::kFloat16:
      record<DType::kFloat16>(src, mask, threshold, numel, on);
      break;
  }
  check_launch("record_kernel");
}

}  // namespace zo
