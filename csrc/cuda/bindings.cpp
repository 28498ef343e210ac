// zo_kernels._cuda: takes addresses and needs no PyTorch.
//
// Level by level: function (zo_kernels/ops.py) -> table (zo_kernels/backends/gpu_table.py, in device memory) -> launch
// (launch.cu) -> kernel (kernel.h, the work of a thread in thread.h). The arguments of a call are checked here; the
// contents of device memory were checked before they were written there (zo_kernels/backends/fits.py).
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "table.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr int64_t kMostPrograms = INT32_MAX;  // in a launch
constexpr int64_t kRecordedByProgram = 1024;  // elements, with 128 threads of 8 (launch.cu)
// So that sums and products fit 32 bits.
constexpr int kMostActive = 1 << 30, kMostDirections = 1 << 30, kMostBlocks = 1 << 16;

void between(const char* name, int64_t low, int64_t high, int64_t value) {
  if (value < low || value > high)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(low) + " to " +
                                std::to_string(high) + ", got " + std::to_string(value));
}

void given(const char* name, uintptr_t address, uintptr_t alignment) {
  if (!address || address % alignment)
    throw std::invalid_argument(std::string(name) + ": expected an address that is a multiple of " +
                                std::to_string(alignment) + ", got " + std::to_string(address));
}

void axpy(int distribution, int dtype, int mask, bool stochastic, bool decay, uintptr_t rows, uintptr_t ids,
          uintptr_t first_chunk, int active, int programs, int blocks_per_chunk, uintptr_t seeds, uintptr_t scales,
          uintptr_t decays, int directions, uintptr_t stream) {
  between("distribution", 0, 1, distribution);
  between("dtype", 0, 2, dtype);
  between("mask", 0, 4, mask);
  between("active", 1, kMostActive, active);
  between("programs", 1, kMostPrograms, programs);
  between("blocks_per_chunk", 1, kMostBlocks, blocks_per_chunk);
  if (blocks_per_chunk & (blocks_per_chunk - 1))
    throw std::invalid_argument("blocks_per_chunk: expected a power of two, got " + std::to_string(blocks_per_chunk));
  between("directions", 1, kMostDirections, directions);
  given("rows", rows, alignof(zo::TableRow));
  given("ids", ids, 4);
  given("first_chunk", first_chunk, 4);
  given("seeds", seeds, 8);
  given("scales", scales, 4);
  given("decays", decays, 4);
  const zo::Kind kind = {zo::Distribution(distribution), zo::DType(dtype), zo::MaskKind(mask), stochastic, decay};
  const zo::Work work = {at<const zo::TableRow>(rows), at<const int32_t>(ids), at<const int32_t>(first_chunk), active,
                         blocks_per_chunk};
  const zo::Coefficients coefficients = {at<const uint64_t>(seeds), at<const float>(scales), at<const float>(decays),
                                         directions};
  zo::launch_axpy(kind, work, coefficients, programs, stream);
}

void record(int dtype, uintptr_t src, uintptr_t mask, double threshold, int64_t numel, uintptr_t stream) {
  between("dtype", 0, 2, dtype);
  between("numel", 1, kMostPrograms * kRecordedByProgram, numel);
  given("src", src, dtype == 0 ? 4 : 2);
  given("mask", mask, 1);
  zo::launch_record(zo::DType(dtype), at<const void>(src), at<uint8_t>(mask), float(threshold), numel, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The fused pass on NVIDIA GPUs: launches on the current device";
  m.def("device_error", &zo::device_error, "Why this build's CUDA runtime finds no device here, or an empty string.");
  m.def("axpy", &axpy, py::arg("distribution"), py::arg("dtype"), py::arg("mask"), py::arg("stochastic"),
        py::arg("decay"), py::arg("rows"), py::arg("ids"), py::arg("first_chunk"), py::arg("active"),
        py::arg("programs"), py::arg("blocks_per_chunk"), py::arg("seeds"), py::arg("scales"), py::arg("decays"),
        py::arg("directions"), py::arg("stream"));
  m.def("record", &record, py::arg("dtype"), py::arg("src"), py::arg("mask"), py::arg("threshold"), py::arg("numel"),
        py::arg("stream"));
}
