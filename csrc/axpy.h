// The primitive for one element, on host and device, and the plain structs that describe it.
//
//   dst <- round(decay * src + m * sum_k scale_k * z(seed_k))
//
// All arithmetic is float32: t = decay * src, then t = fma(scale_k, z_k, t) for each direction in order, then one
// rounding to the dtype of dst, to nearest or stochastic (docs/noise.md, 4 and 5). rho is the 16 random bits that
// stochastic rounding adds below the last place.
#pragma once

#include "noise.h"

namespace zo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Distribution : int { kNormal = 0, kRademacher = 1 };
enum class MaskKind : int { kNone = 0, kThreshold = 1, kBool = 2, kBits = 3, kRecord = 4 };

// One tensor of a table. zo_kernels/backends/types.py describes the fields.
struct Entry {
  void* dst;
  const void* src;
  int64_t numel;
  int64_t offset;  // index of the first element in the whole parameter
  uint32_t param_id;
  int group;  // which row of scales and decays applies
  DType dtype;
  MaskKind mask;
  float threshold;
  uint8_t* mask_data;
};

ZO_FN uint32_t bf16_nearest(float t) {
  const uint32_t bits = to_bits(t);
  // A NaN of all ones would carry into the sign bit.
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (bits >> 16) | 0x40u;
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

ZO_FN uint32_t bf16_stochastic(float t, uint32_t rho) {
  const uint32_t bits = to_bits(t);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (bits >> 16) | 0x40u;
  return (bits + rho) >> 16;  // no carry into the sign: infinity + 0xffff stays below it
}

ZO_FN float fp16_widen(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  if (magnitude >= 0x7C00u) return from_bits(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  if (magnitude >= 0x400u) return from_bits(sign | ((magnitude + 0x1C000u) << 13));
  return from_bits(sign | to_bits(mul32(float(int32_t(magnitude)), 5.9604644775390625e-08f)));  // * 2^-24
}

ZO_FN uint32_t fp16_nearest(float t) {
  const uint32_t bits = to_bits(t), sign = (bits >> 16) & 0x8000u, m = bits & 0x7FFFFFFFu;
  if (m > 0x7F800000u) return sign | 0x7E00u;
  if (m >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and above round to infinity
  if (m >= 0x38800000u) return sign | (((m + 0xFFFu + ((m >> 13) & 1u)) >> 13) - 0x1C000u);
  return sign | (to_bits(from_bits(m) + 0.5f) - 0x3F000000u);  // the ulp of 0.5 is fp16's smallest subnormal
}

ZO_FN uint32_t fp16_stochastic(float t, uint32_t rho) {
  const uint32_t bits = to_bits(t), sign = (bits >> 16) & 0x8000u, m = bits & 0x7FFFFFFFu;
  if (m > 0x7F800000u) return sign | 0x7E00u;
  if (m >= 0x38800000u) {
    const uint32_t rounded = ((m + (rho >> 3)) >> 13) - 0x1C000u;
    return sign | (rounded < 0x7C00u ? rounded : 0x7C00u);
  }
  return sign | ((to_bits(from_bits(m) + 6.103515625e-05f) - 0x38800000u + (rho >> 3)) >> 13);  // |t| + 2^-14
}

ZO_FN float load_element(const void* p, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == DType::kBFloat16 ? from_bits(uint32_t(h) << 16) : fp16_widen(h);
}

ZO_FN void store_element(void* p, int64_t i, DType dtype, float t, bool stochastic, uint32_t rho) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(p)[i] = t;
    return;
  }
  const uint32_t h = dtype == DType::kBFloat16 ? (stochastic ? bf16_stochastic(t, rho) : bf16_nearest(t))
                                               : (stochastic ? fp16_stochastic(t, rho) : fp16_nearest(t));
  static_cast<uint16_t*>(p)[i] = uint16_t(h);
}

// Copies the bits of a masked-out element.
ZO_FN void copy_element(void* dst, const void* src, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32)
    static_cast<uint32_t*>(dst)[i] = static_cast<const uint32_t*>(src)[i];
  else
    static_cast<uint16_t*>(dst)[i] = static_cast<const uint16_t*>(src)[i];
}

}  // namespace zo
