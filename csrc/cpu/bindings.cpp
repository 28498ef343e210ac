// zo_kernels._native: takes plain addresses and needs no PyTorch.
//
// Level by level: function (zo_kernels/ops.py) -> table (table.h, checks every number) -> launch (run.cpp, chunks and
// threads) -> kernel (kernel.h, compiled by avx512.cpp and avx2.cpp; scalar.h). The sizes of the memory at an address
// cannot be checked here; they are the caller's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "table.h"

namespace py = pybind11;

namespace {

using EntryTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, uint32_t, int, int, int, double, uintptr_t,
                              int64_t, int64_t, int64_t>;

// Shape, strides of dst and strides of src of an entry that is not contiguous.
using StridedTuple = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>>;

std::unique_ptr<zo::Table> make_table(const std::vector<EntryTuple>& tuples,
                                      const std::map<size_t, StridedTuple>& strided) {
  const zo::DefaultFloatMode mode;  // so that a subnormal threshold is not flushed
  std::vector<zo::Given> given;
  given.reserve(tuples.size());
  for (const auto& [dst, src, numel, offset, id, group, dtype, mask, threshold, mask_data, dst_bytes, src_bytes,
                    mask_bytes] : tuples)
    given.push_back({{reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), numel, offset, id, group,
                      zo::DType(dtype), zo::MaskKind(mask), float(threshold), reinterpret_cast<uint8_t*>(mask_data)},
                     {dst_bytes, src_bytes, mask_bytes}});
  for (const auto& [i, each] : strided) {
    if (i >= given.size())
      throw std::invalid_argument("strided: expected indices of the table's " + std::to_string(given.size()) +
                                  " entries, got " + std::to_string(i));
    given[i].strided = {std::get<0>(each), std::get<1>(each), std::get<2>(each)};
  }
  return std::make_unique<zo::Table>(given);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    sets.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back("avx2");
#endif
  sets.push_back("scalar");
  return sets;
}

zo::RangeFn range_of(const std::string& set) {
#if defined(__x86_64__)
  if (set == "avx512") return zo::range_avx512;
  if (set == "avx2") return zo::range_avx2;
#endif
  if (set == "scalar") return zo::range_scalar;
  throw std::invalid_argument("instruction set: expected avx512, avx2 or scalar, got " + set);
}

void run(const zo::Table& table, const std::vector<uint64_t>& seeds, const std::vector<double>& scales,
         const std::vector<double>& decays, int distribution, bool stochastic,
         const std::optional<std::vector<int64_t>>& active, int threads, const std::string& set) {
  const zo::RangeFn range = range_of(set);
  if (distribution < 0 || distribution > int(zo::Distribution::kRademacher))
    throw std::invalid_argument("distribution: expected 0 or 1, got " + std::to_string(distribution));
  const py::gil_scoped_release release;
  table.run(seeds, scales, decays, zo::Distribution(distribution), stochastic, active ? &*active : nullptr, threads,
            range);
}

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key, int rounds) {
  const zo::Words w = zo::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1], rounds);
  return {w.x[0], w.x[1], w.x[2], w.x[3]};
}

// The least and greatest radius of the words first .. last; twice the first NaN if there is one.
std::pair<float, float> radius_range(uint32_t first, uint32_t last) {
  float low = 1e30f, high = -1e30f;
  const py::gil_scoped_release release;
  for (uint64_t w = first; w <= last; ++w) {
    const float r = zo::radius(uint32_t(w));
    if (!(r >= 0.0f)) return {r, r};
    low = r < low ? r : low;
    high = r > high ? r : high;
  }
  return {low, high};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "noise v1 and the fused pass on the CPU";
  py::class_<zo::Table>(m, "Table", py::module_local())
      .def(py::init(&make_table), py::arg("entries"), py::arg("strided") = std::map<size_t, StridedTuple>())
      .def("run", &run);
  m.def("instruction_sets", &instruction_sets, "The instruction sets that this processor has, the fastest first.");
  m.def("philox4x32", &philox, py::arg("counter"), py::arg("key"), py::arg("rounds") = zo::kPhiloxRounds);
  m.def("radius_range", &radius_range,
        "The least and greatest radius of the words first .. last; NaN if one of them gives NaN.");
}
