// noise v1 for one counter at a time, on host and device. docs/noise.md is the specification.
//
// Normals have three layers: bits (philox4x32, Salmon et al., SC 2011), uniform (the radius and angle words, in
// `radius` and `box_muller`), normal (`box_muller`). All arithmetic is float32 with every rounding written out. Signs
// are bits of other words.
//
// Every function is `static`: each instruction set compiles its own copy. Were they shared, the linker could keep the
// copy made for AVX-512 and an older CPU would run it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ZO_FN static __host__ __device__ __forceinline__
#else
#define ZO_FN static inline
#endif
// For the small functions of the CPU kernels: inlined always, so that their values stay in registers.
#define ZO_OP static inline __attribute__((always_inline))

namespace zo {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

constexpr uint32_t kLogSplit = 0x3F3504F3u;  // bits of sqrt(1/2)
constexpr uint32_t kLogSplitY = kLogSplit + (31u << 23);
constexpr float kLogExponentScale = -1.6525917e-07f;    // -2 ln 2 / 2^23, bits 0xb4317218
constexpr float kRadiusFloor = 7.888609052210118e-31f;  // 2^-100 keeps the square of the radius above zero
constexpr int kLogTerms = 7, kSinTerms = 5, kCosTerms = 5;
#define ZO_LOG_COEFFICIENTS                                                                 \
  {-2.00000262260437f,    1.000045895576477f,   -0.6662205457687378f, 0.49748367071151733f, \
   -0.41031843423843384f, 0.37863919138908386f, -0.24240337312221527f}
#define ZO_SIN_COEFFICIENTS \
  {3.141592502593994f, -5.1677069664001465f, 2.5500314235687256f, -0.5980451703071594f, 0.0772201269865036f}
#define ZO_COS_COEFFICIENTS {1.0f, -4.934795379638672f, 4.058451175689697f, -1.3320938348770142f, 0.2200806587934494f}

struct Words {
  uint32_t x[4];
};

ZO_FN float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

ZO_FN uint32_t to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// a * b + c, rounded once. The compiler neither splits it nor contracts other products into one.
ZO_FN float fma32(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

ZO_FN float mul32(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

ZO_FN float sqrt32(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

// Bits: Philox4x32 of a 128-bit counter and a 64-bit key.
ZO_FN Words philox4x32(Words c, uint32_t k0, uint32_t k1, int rounds = kPhiloxRounds) {
  for (int i = 0; i < rounds; ++i) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c.x[0], p1 = uint64_t(kPhiloxM1) * c.x[2];
    c = {{uint32_t(p1 >> 32) ^ c.x[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.x[3] ^ k1, uint32_t(p0)}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// What words are for: the last word of a counter.
constexpr uint32_t kNormalStream = 0, kSignStream = 1, kSignRoundingStream = 2;
// The counter of element i is i >> shift.
constexpr int kNormalShift = 2, kSignShift = 7, kSignRoundingShift = 3;

// The four words of a counter.
ZO_FN Words noise_words(uint64_t counter, uint32_t param_id, uint64_t seed, uint32_t stream = kNormalStream) {
  return philox4x32({{uint32_t(counter), uint32_t(counter >> 32), param_id, stream}}, uint32_t(seed),
                    uint32_t(seed >> 32));
}

template <int N>
ZO_FN float horner(const float (&c)[N], float x) {
  float y = c[N - 1];
  for (int i = N - 2; i >= 0; --i) y = fma32(y, x, c[i]);
  return y;
}

// sqrt(-2 ln u) of the uniform u = ((word mod 2^31) | 1) / 2^31, which is never 0.
ZO_FN float radius(uint32_t word) {
  const float p[kLogTerms] = ZO_LOG_COEFFICIENTS;
  const float y = float(int32_t((word & 0x7FFFFFFFu) | 1u));
  const uint32_t d = to_bits(y) - kLogSplitY;
  const float k = float(int32_t(d & ~0x7FFFFFu));
  const float f = from_bits((d & 0x7FFFFFu) + kLogSplit) - 1.0f;
  return sqrt32(fma32(horner(p, f), f, fma32(k, kLogExponentScale, kRadiusFloor)));
}

// Normal: two of them from a radius word a and an angle word b (Box and Muller, 1958).
ZO_FN void box_muller(uint32_t a, uint32_t b, float& even, float& odd) {
  const float c[kCosTerms] = ZO_COS_COEFFICIENTS, s[kSinTerms] = ZO_SIN_COEFFICIENTS;
  const float r = from_bits(to_bits(radius(a)) ^ (b & 0x80000000u));
  const float t = from_bits((b & 0x7FFFFFu) | 0x3F800000u) - 1.5f;
  const float t2 = mul32(t, t);
  even = mul32(r, horner(c, t2));
  odd = mul32(r, mul32(t, horner(s, t2)));
}

// The 16 random bits that stochastic rounding adds to the two elements of a pair.
ZO_FN void rounding_bits(uint32_t a, uint32_t b, uint32_t& even, uint32_t& odd) {
  even = ((b >> 15) & 0xFF00u) | (b & 0xFFu);
  odd = even ^ (a & 0xFFFFu);
}

// The sign of element `index`: bit 31 is set if it is -1, the others are zero. `word` is word index / 32 % 4 of its
// counter in kSignStream.
ZO_FN uint32_t sign_bit(uint32_t word, int64_t index) {
  const int i = int(index & 31);
  return word << (31 - i / 2 - 16 * (i & 1)) & 0x80000000u;
}

// The 16 random bits that stochastic rounding adds to element `index` under signs. `word` is word index / 2 % 4 of its
// counter in kSignRoundingStream.
ZO_FN uint32_t sign_rounding_bits(uint32_t word, int64_t index) { return word >> 16 * int(index & 1) & 0xFFFFu; }

}  // namespace zo
