// Which elements of a row a pass changes.
#pragma once

#include "row.h"

namespace zo {

// A row's mask: all ones where an element changes, zero where it keeps its bits. One word an element for float32, one
// half for 16-bit floats.
struct Keep {
  uint32_t x[4];
};

// The threshold as rows are compared with it: its bits for float32; for 16-bit floats the largest one that is not above
// it, in both halves.
template <DType D>
ZO_FN uint32_t row_threshold(float threshold) {
  if (D == DType::kFloat32) return to_bits(threshold);
  const uint32_t m = to_bits(threshold) & 0x7FFFFFFFu;
  uint32_t h;
  if (!(threshold >= 0.0f))
    h = 0x7FFFu;  // a NaN, which nothing is within
  else if (D == DType::kBFloat16)
    h = m >> 16;
  else if (m >= 0x47800000u)  // 65536
    h = m == 0x7F800000u ? 0x7C00u : 0x7BFFu;
  else
    h = m >= 0x38800000u ? (m >> 13) - 0x1C000u : uint32_t(mul32(from_bits(m), 16777216.0f));
  return h | h << 16;
}

// Whether whole rows may be compared with the threshold. sm_80 has no comparison of bfloat16 pairs, so they are
// compared as if they were float16; the order is the same below the bits of float16's infinity.
template <DType D>
ZO_FN bool row_comparable(float threshold) {
  return D != DType::kBFloat16 || !(threshold >= 2.658455991569832e36f);  // 2^121
}

template <DType D>
ZO_FN Keep keep_within(const Row& row, uint32_t threshold) {
  Keep keep;
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (D == DType::kFloat32)
      keep.x[i] = std::fabs(from_bits(row.x[i])) <= from_bits(threshold) ? ~0u : 0u;
    else
      keep.x[i] = halves_within(row.x[i], threshold);
  }
  return keep;
}

// Spreads the high bits of the four bytes of `four` to four halves: two words of all ones or zeros.
ZO_FN void spread(uint32_t four, uint32_t& even, uint32_t& odd) {
  even = pick_bytes<0x9988>(four, 0u);
  odd = pick_bytes<0xBBAA>(four, 0u);
}

// A mask from its bits; a row of float32 has the low four of `bits`.
template <DType D>
ZO_FN Keep keep_bits(uint32_t bits) {
  Keep keep;
  if (D == DType::kFloat32) {
    ZO_UNROLL
    for (int i = 0; i < 4; ++i) keep.x[i] = (bits >> i & 1u) ? ~0u : 0u;
  } else {
    spread((bits & 15u) * 0x10204080u, keep.x[0], keep.x[1]);
    spread((bits >> 4) * 0x10204080u, keep.x[2], keep.x[3]);
  }
  return keep;
}

// Sets the high bit of each byte that is not zero.
ZO_FN uint32_t nonzero_bytes(uint32_t four) { return ((four & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | four; }

// A row's mask as bits.
template <DType D>
ZO_FN uint32_t bits_of(const Keep& keep) {
  uint32_t bits = 0;
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (D == DType::kFloat32)
      bits |= keep.x[i] & 1u << i;
    else
      bits |= keep.x[i] & (1u << (2 * i) | 1u << (2 * i + 17));
  }
  return D == DType::kFloat32 ? bits : (bits | bits >> 16) & 0xFFu;
}

template <DType D>
ZO_FN Row blend(const Keep& keep, const Row& yes, const Row& no) {
  Row row;
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (D == DType::kFloat32)
      row.x[i] = keep.x[i] ? yes.x[i] : no.x[i];
    else
      row.x[i] = (yes.x[i] & keep.x[i]) | (no.x[i] & ~keep.x[i]);
  }
  return row;
}

}  // namespace zo
