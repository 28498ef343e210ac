// noise v1 for the counters of a chunk; the work that they share is done once, in block_keys.
#pragma once

#include "instructions.h"

namespace zo {

// All counters of a chunk share three of their four words, so the first two and a half rounds of Philox on those words
// are computed once.
struct BlockKeys {
  uint32_t first;                    // round 1, word 2
  uint32_t second_even, second_odd;  // round 2, words 0 and 2
  uint32_t third_even, third_odd;
  uint32_t even[kPhiloxRounds - 3], odd[kPhiloxRounds - 3];
};

ZO_FN BlockKeys block_keys(uint64_t seed, uint32_t param_id, uint32_t counter_high, uint32_t stream = kNormalStream) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  const uint64_t id = uint64_t(kPhiloxM1) * param_id;
  const uint64_t word = uint64_t(kPhiloxM0) * (uint32_t(id >> 32) ^ counter_high ^ k0);
  BlockKeys keys;
  keys.first = k1 ^ stream;
  keys.second_even = uint32_t(id) ^ (k0 + kPhiloxW0);
  keys.second_odd = uint32_t(word >> 32) ^ (k1 + kPhiloxW1);
  keys.third_even = k0 + 2 * kPhiloxW0;
  keys.third_odd = uint32_t(word) ^ (k1 + 2 * kPhiloxW1);
  for (int i = 0; i < kPhiloxRounds - 3; ++i) {
    keys.even[i] = k0 + (i + 3) * kPhiloxW0;
    keys.odd[i] = k1 + (i + 3) * kPhiloxW1;
  }
  return keys;
}

// The same keys, kept in registers from here on: the compiler would compute them again in each turn of a loop.
ZO_FN BlockKeys pinned(BlockKeys keys) {
#if defined(__CUDA_ARCH__)
  uint32_t* words = reinterpret_cast<uint32_t*>(&keys);
  ZO_UNROLL
  for (size_t i = 0; i < sizeof(keys) / 4; ++i) asm volatile("" : "+r"(words[i]));
#endif
  return keys;
}

// Bits: the four words of the counter whose low word is given.
ZO_FN Words block_words(uint32_t counter, const BlockKeys& keys) {
  uint64_t p0 = uint64_t(kPhiloxM0) * counter;
  uint64_t p1 = uint64_t(kPhiloxM1) * (uint32_t(p0 >> 32) ^ keys.first);
  Words x = {{uint32_t(p1 >> 32) ^ keys.second_even, uint32_t(p1), uint32_t(p0) ^ keys.second_odd, 0u}};
  p0 = uint64_t(kPhiloxM0) * x.x[0];
  p1 = uint64_t(kPhiloxM1) * x.x[2];
  x = {
      {uint32_t(p1 >> 32) ^ x.x[1] ^ keys.third_even, uint32_t(p1), uint32_t(p0 >> 32) ^ keys.third_odd, uint32_t(p0)}};
  ZO_UNROLL
  for (int i = 0; i < kPhiloxRounds - 3; ++i) {
    p0 = uint64_t(kPhiloxM0) * x.x[0];
    p1 = uint64_t(kPhiloxM1) * x.x[2];
    x = {{uint32_t(p1 >> 32) ^ x.x[1] ^ keys.even[i], uint32_t(p1), uint32_t(p0 >> 32) ^ x.x[3] ^ keys.odd[i],
          uint32_t(p0)}};
  }
  return x;
}

// Uniform and normal: box_muller of ../noise.h in fewer instructions. The float operations are the same, the integer
// ones are rearranged.
ZO_FN void block_normals(uint32_t a, uint32_t b, float& even, float& odd) {
  const float p[kLogTerms] = ZO_LOG_COEFFICIENTS, c[kCosTerms] = ZO_COS_COEFFICIENTS,
              s[kSinTerms] = ZO_SIN_COEFFICIENTS;
  const uint32_t y = to_bits(float(int32_t(and_or<0x7FFFFFFFu, 1u>(a))));
  const uint32_t k = (y - kLogSplitY) & ~0x7FFFFFu;
  // With d = y - kLogSplitY, this is (d mod 2^23) + kLogSplit of docs/noise.md as one sum of three terms.
  const float f = from_bits(y - k - (kLogSplitY - kLogSplit)) - 1.0f;
  const float r = sqrt_in_range(fma32(horner(p, f), f, fma32(float(int32_t(k)), kLogExponentScale, kRadiusFloor)));
  const float signed_r = from_bits(to_bits(r) | (b & 0x80000000u));  // r > 0
  const float t = from_bits(and_or<0x7FFFFFu, 0x3F800000u>(b)) - 1.5f, t2 = mul32(t, t);
  even = mul32(signed_r, horner(c, t2));
  odd = mul32(signed_r, mul32(t, horner(s, t2)));
}

// The bits that stochastic rounding adds to the two elements of a pair.
ZO_FN void block_rounding_bits(uint32_t a, uint32_t b, uint32_t& even, uint32_t& odd) {
  even = pick_bytes<0x7750>(b, b >> 15);  // byte 3 of b >> 15 is zero
  odd = even ^ (a & 0xFFFFu);
}

}  // namespace zo
