// Operations that a GPU does in one instruction, each with the same in plain C++ for the host.
#pragma once

#include "../axpy.h"

#if defined(__CUDACC__)
#define ZO_UNROLL _Pragma("unroll")
#define ZO_NO_UNROLL _Pragma("unroll 1")
#else
#define ZO_UNROLL
#define ZO_NO_UNROLL
#endif

namespace zo {

// (x & AND) | OR, for which ptxas would use two instructions.
template <uint32_t AND, uint32_t OR>
ZO_FN uint32_t and_or(uint32_t x) {
#if defined(__CUDA_ARCH__)
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "n"(AND), "n"(OR));
  return y;
#else
  return (x & AND) | OR;
#endif
}

// Byte i of the result is byte (SELECTOR >> 4i) % 8 of the eight in (y, x); if that nibble's high bit is set, it is the
// sign bit of that byte, repeated eight times.
template <uint32_t SELECTOR>
ZO_FN uint32_t pick_bytes(uint32_t x, uint32_t y) {
#if defined(__CUDA_ARCH__)
  uint32_t picked;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(x), "r"(y), "n"(SELECTOR));
  return picked;
#else
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = SELECTOR >> (4 * i) & 15, byte = uint32_t(both >> (8 * (nibble & 7))) & 0xFFu;
    picked |= (nibble < 8 ? byte : (byte >> 7) * 0xFFu) << (8 * i);
  }
  return picked;
#endif
}

// a + b, rounded once; no product is contracted into it.
ZO_FN float add32(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// x rotated to the left by n bits, of which the low five count.
ZO_FN uint32_t rotated(uint32_t x, int n) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_l(x, x, n);
#else
  return x << (n & 31) | x >> (-n & 31);
#endif
}

// The correctly rounded square root of x, which must be 2^-100 or lie in [2^-25, 2^6]: the sequence that ptxas uses,
// without its branch for other x.
ZO_FN float sqrt_in_range(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float root = __fmul_rn(x, y);
  return __fmaf_rn(__fmaf_rn(-root, root, x), __fmul_rn(y, 0.5f), root);
#else
  return std::sqrt(x);
#endif
}

// The smaller of |x| and y > 0; NaN if x is NaN.
ZO_FN float min_magnitude(float x, float y) {
#if defined(__CUDA_ARCH__)
  float m;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(fabsf(x)), "f"(y));
  return m;
#else
  return std::fabs(x) > y ? y : std::fabs(x);
#endif
}

// For each float16 half of w: all ones where |half| <= the same half of h, else zero.
ZO_FN uint32_t halves_within(uint32_t w, uint32_t h) {
#if defined(__CUDA_ARCH__)
  uint32_t m;
  asm("{.reg .b32 a; abs.f16x2 a, %1; set.le.u32.f16x2 %0, a, %2;}" : "=r"(m) : "r"(w), "r"(h));
  return m;
#else
  const bool low = std::fabs(fp16_widen(uint16_t(w))) <= fp16_widen(uint16_t(h));
  const bool high = std::fabs(fp16_widen(uint16_t(w >> 16))) <= fp16_widen(uint16_t(h >> 16));
  return (low ? 0x0000FFFFu : 0u) | (high ? 0xFFFF0000u : 0u);
#endif
}

}  // namespace zo
