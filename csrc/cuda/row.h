// A row, the 16 bytes of weights that one access moves: loads it, widens it to float32, rounds it back, stores it.
#pragma once

#include "noise.h"

namespace zo {

struct alignas(16) Row {
  uint32_t x[4];
};

ZO_FN Row load_row(const void* p) {
#if defined(__CUDA_ARCH__)
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
#else
  return *static_cast<const Row*>(p);
#endif
}

ZO_FN void store_row(void* p, const Row& row) {
#if defined(__CUDA_ARCH__)
  *static_cast<uint4*>(p) = make_uint4(row.x[0], row.x[1], row.x[2], row.x[3]);
#else
  *static_cast<Row*>(p) = row;
#endif
}

template <DType D>
constexpr int kRowElements = D == DType::kFloat32 ? 4 : 8;

template <DType D>
constexpr int kElementBytes = D == DType::kFloat32 ? 4 : 2;

// A pair of 16-bit floats, the even one in the low half, to float32.
template <DType D>
ZO_FN void widen_pair(uint32_t pair, float& even, float& odd) {
  if (D == DType::kBFloat16) {
    even = from_bits(pair << 16);
    odd = from_bits(pair & 0xFFFF0000u);
  } else {
#if defined(__CUDA_ARCH__)
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(even), "=f"(odd)
        : "r"(pair));
#else
    even = fp16_widen(uint16_t(pair));
    odd = fp16_widen(uint16_t(pair >> 16));
#endif
  }
}

// Rounds two float32 to a pair of 16-bit floats, to nearest, ties to even.
template <DType D>
ZO_FN uint32_t pair_nearest(float even, float odd) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  if (D == DType::kBFloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
  return pair;
#else
  return D == DType::kBFloat16 ? bf16_nearest(even) | bf16_nearest(odd) << 16
                               : fp16_nearest(even) | fp16_nearest(odd) << 16;
#endif
}

// |t| as a float16 with 16 more bits below its last place, at most infinity; a NaN stays above infinity.
ZO_FN uint32_t fp16_scaled(float t) {
  // The product turns float16's subnormals into float32's, and rounds as the addition of 2^-14 in docs/noise.md does.
  const uint32_t x = to_bits(mul32(min_magnitude(t, 65536.0f), 1.925929944387236e-34f));  // 2^-112
  return (x < 0x0FFFDFFFu ? x : 0x0FFFDFFFu) << 3;
}

// Rounds two float32 stochastically. They must be results of an fma: a NaN of the host is then 0x7fc00000, give or take
// its sign.
template <DType D>
ZO_FN uint32_t pair_stochastic(float even, float odd, uint32_t rho_even, uint32_t rho_odd) {
  if (D == DType::kBFloat16) {
    // As signed integers, only NaN of positive sign are larger. A GPU's NaN, 0x7fffffff, would carry into the sign bit.
    const int32_t a = int32_t(to_bits(even)), b = int32_t(to_bits(odd)), most = 0x7FC00000;
    return pick_bytes<0x7632>(uint32_t(a < most ? a : most) + rho_even, uint32_t(b < most ? b : most) + rho_odd);
  }
  const uint32_t magnitudes = pick_bytes<0x7632>(fp16_scaled(even) + rho_even, fp16_scaled(odd) + rho_odd);
  return magnitudes | (pick_bytes<0x7632>(to_bits(even), to_bits(odd)) & 0x80008000u);
}

template <DType D>
ZO_FN void widen_row(const Row& row, float* w) {
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (D == DType::kFloat32)
      w[i] = from_bits(row.x[i]);
    else
      widen_pair<D>(row.x[i], w[2 * i], w[2 * i + 1]);
  }
}

template <DType D, bool STOCHASTIC>
ZO_FN Row round_row(const float* t, const uint32_t* rho) {
  Row row;
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (D == DType::kFloat32)
      row.x[i] = to_bits(t[i]);
    else if (STOCHASTIC)
      row.x[i] = pair_stochastic<D>(t[2 * i], t[2 * i + 1], rho[2 * i], rho[2 * i + 1]);
    else
      row.x[i] = pair_nearest<D>(t[2 * i], t[2 * i + 1]);
  }
  return row;
}

}  // namespace zo
