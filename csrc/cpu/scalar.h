// The kernel in plain C++: whole ranges on processors without vector kernels, the ragged ends of ranges on the others.
#pragma once

#include "job.h"

namespace zo {
namespace {

// Whether the pass changes element i, whose value is w; a recording mask also writes its bit.
inline bool mask_at(const Entry& e, int64_t i, float w) {
  switch (e.mask) {
    case MaskKind::kNone:
      return true;
    case MaskKind::kBool:
      return e.mask_data[i] != 0;
    case MaskKind::kBits:
      return (e.mask_data[i >> 3] >> (i & 7)) & 1;
    default:
      break;
  }
  const bool m = std::fabs(w) <= e.threshold;
  if (m && e.mask == MaskKind::kRecord) e.mask_data[i >> 3] |= uint8_t(1u << (i & 7));
  return m;
}

// Rounds, masks and stores element i.
inline void finish(const Job& job, int64_t i, float t, uint32_t rho) {
  const Entry& e = *job.entry;
  if (mask_at(e, i, load_element(e.src, i, e.dtype)))
    store_element(e.dst, i, e.dtype, t, job.stochastic, rho);
  else
    copy_element(e.dst, e.src, i, e.dtype);
}

inline void scalar_normals(const Job& job, int64_t begin, int64_t end) {
  const Entry& e = *job.entry;
  while (begin < end) {
    const int64_t index = e.offset + begin, first = index & 3;
    const int64_t count = end - begin < 4 - first ? end - begin : 4 - first;
    const uint64_t c = uint64_t(index) >> 2;

    float t[4];
    for (int64_t j = 0; j < count; ++j) t[first + j] = mul32(job.decay, load_element(e.src, begin + j, e.dtype));
    uint32_t rho[4];
    for (int k = 0; k < job.n_directions; ++k) {
      const Direction& d = job.directions[k];
      const Words x = noise_words(c, e.param_id, d.seed);
      if (k == 0) {
        rounding_bits(x.x[0], x.x[1], rho[0], rho[1]);
        rounding_bits(x.x[2], x.x[3], rho[2], rho[3]);
      }
      float z[4];
      box_muller(x.x[0], x.x[1], z[0], z[1]);
      box_muller(x.x[2], x.x[3], z[2], z[3]);
      for (int r = 0; r < d.n_scales; ++r)
        for (int64_t j = first; j < first + count; ++j) t[j] = fma32(d.scales[r], z[j], t[j]);
    }
    for (int64_t j = 0; j < count; ++j) finish(job, begin + j, t[first + j], rho[first + j]);
    begin += count;
  }
}

// The elements of a counter at a time.
inline void scalar_signs(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t most = 1 << kSignShift;
  const Entry& e = *job.entry;
  const bool stochastic = job.stochastic && e.dtype != DType::kFloat32;
  while (begin < end) {
    const int64_t index = e.offset + begin, left = most - index % most, count = end - begin < left ? end - begin : left;
    float t[most];
    for (int64_t j = 0; j < count; ++j) t[j] = mul32(job.decay, load_element(e.src, begin + j, e.dtype));
    for (int k = 0; k < job.n_directions; ++k) {
      const Direction& d = job.directions[k];
      const Words x = noise_words(uint64_t(index) >> kSignShift, e.param_id, d.seed, kSignStream);
      for (int r = 0; r < d.n_scales; ++r)
        for (int64_t j = 0; j < count; ++j) {
          const int64_t i = index + j;
          t[j] += from_bits(to_bits(d.scales[r]) ^ sign_bit(x.x[i / 32 % 4], i));
        }
    }
    Words y = {};
    for (int64_t j = 0; j < count; ++j) {
      const int64_t i = index + j;
      if (stochastic && (j == 0 || i % 8 == 0))
        y = noise_words(uint64_t(i) >> kSignRoundingShift, e.param_id, job.directions->seed, kSignRoundingStream);
      finish(job, begin + j, t[j], sign_rounding_bits(y.x[i / 2 % 4], i));
    }
    begin += count;
  }
}

inline void scalar_range(const Job& job, int64_t begin, int64_t end) {
  job.distribution == Distribution::kNormal ? scalar_normals(job, begin, end) : scalar_signs(job, begin, end);
}

}  // namespace
}  // namespace zo
