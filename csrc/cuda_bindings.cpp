// zo_kernels._cuda: addresses in, no PyTorch. Python (backends/cuda.py) has checked everything it passes.
#include <pybind11/pybind11.h>

#include "cuda.h"
#include "cuda_table.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void axpy(int dtype, int mask, bool stochastic, bool decay, uintptr_t rows, uintptr_t ids, uintptr_t first_chunk,
          int active, int programs, int blocks_per_chunk, uintptr_t seeds, uintptr_t scales, uintptr_t decays,
          int directions, uintptr_t stream) {
  const zo::Kind kind = {zo::DType(dtype), zo::MaskKind(mask), stochastic, decay};
  const zo::Work work = {at<const zo::TableRow>(rows), at<const int32_t>(ids), at<const int32_t>(first_chunk), active,
                         blocks_per_chunk};
  const zo::Coefficients coefficients = {at<const uint64_t>(seeds), at<const float>(scales), at<const float>(decays),
                                         directions};
  zo::launch_axpy(kind, work, coefficients, programs, stream);
}

void record(int dtype, uintptr_t src, uintptr_t mask, double threshold, int64_t numel, uintptr_t stream) {
  zo::launch_record(zo::DType(dtype), at<const void>(src), at<uint8_t>(mask), float(threshold), numel, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The fused pass on NVIDIA GPUs: launches on the current device";
  m.def("device_error", &zo::device_error, "Why this build's CUDA runtime finds no device here, or an empty string.");
  m.def("axpy", &axpy, py::arg("dtype"), py::arg("mask"), py::arg("stochastic"), py::arg("decay"), py::arg("rows"),
        py::arg("ids"), py::arg("first_chunk"), py::arg("active"), py::arg("programs"), py::arg("blocks_per_chunk"),
        py::arg("seeds"), py::arg("scales"), py::arg("decays"), py::arg("directions"), py::arg("stream"));
  m.def("record", &record, py::arg("dtype"), py::arg("src"), py::arg("mask"), py::arg("threshold"), py::arg("numel"),
        py::arg("stream"));
}
