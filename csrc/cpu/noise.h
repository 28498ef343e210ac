// noise v1 in vectors, written once for the operations of any instruction set V (avx2.h, avx512.h).
//
// Every 32-bit word of Philox sits in a 64-bit lane, so that a multiplication leaves its low and its high half in the
// same lane: a round of V::kLanes / 2 counters is two multiplications, two shifts and two three-way xors. The words are
// zipped into 32-bit lanes only for Box-Muller. A tile of 2 * V::kLanes elements is one register of radius words and
// one of angle words, and then one of (cos) and one of (sin) results.
#pragma once

#include "job.h"

namespace zo {
namespace {

// U computations side by side, operation by operation: a processor does not look far enough ahead in a single chain.
#define ZO_EACH _Pragma("GCC unroll 4") for (int u = 0; u < U; ++u)

// Bits: the radius words a and the angle words b of U tiles; c[u] are the counters of tile u.
template <class V, int U>
ZO_OP void philox_tiles(const Direction& d, const typename V::I (&c)[U], typename V::I (&a)[U], typename V::I (&b)[U]) {
  using I = typename V::I;
  const I m0 = V::word(kPhiloxM0), m1 = V::word(kPhiloxM1);
  I x[4][U], p0[U], p1[U];
  ZO_EACH {  // rounds 0 to 2: d holds the products that the counters share
    p0[u] = V::mul_wide(c[u], m0);
    p1[u] = V::mul_wide(V::xor2(V::high(p0[u]), V::key(d.k1[0].x)), m1);
    const I c0 = V::xor2(V::high(p1[u]), V::key(d.round1_c0.x));
    const I c2 = V::xor2(p0[u], V::key(d.round1_c2.x));
    const I c1 = p1[u];
    p0[u] = V::mul_wide(c0, m0);
    p1[u] = V::mul_wide(c2, m1);
    x[0][u] = V::xor3(V::high(p1[u]), c1, V::key(d.k0[2].x));
    x[1][u] = p1[u];
    x[2][u] = V::xor2(V::high(p0[u]), V::key(d.round2_c2.x));
    x[3][u] = p0[u];
  }
  constexpr int last = kPhiloxRounds - 1;
  _Pragma("GCC unroll 8") for (int r = 3; r < last; ++r) {
    const I k0 = V::key(d.k0[r].x), k1 = V::key(d.k1[r].x);
    ZO_EACH {
      p0[u] = V::mul_wide(x[0][u], m0);
      p1[u] = V::mul_wide(x[2][u], m1);
      x[0][u] = V::xor3(V::high(p1[u]), x[1][u], k0);
      x[1][u] = p1[u];
      x[2][u] = V::xor3(V::high(p0[u]), x[3][u], k1);
      x[3][u] = p0[u];
    }
  }
  ZO_EACH {  // the second pair's words stay in the upper halves, where the zipped registers need them
    p0[u] = V::mul_wide(x[0][u], m0);
    p1[u] = V::mul_wide(x[2][u], m1);
    const I low = V::xor3(V::high(p1[u]), x[1][u], V::key(d.k0[last].x));
    const I up = V::xor3(p0[u], V::raise(x[3][u]), V::key(d.k1[last].x));
    a[u] = V::zip(low, up);
    b[u] = V::zip(p1[u], V::raise(p0[u]));
  }
}

// Uniform and normal: the normals of U tiles, as box_muller of ../noise.h, operation by operation.
template <class V, int U>
ZO_OP void box_muller_tiles(const typename V::I (&a)[U], const typename V::I (&b)[U], typename V::F (&even)[U],
                            typename V::F (&odd)[U]) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr float log_c[kLogTerms] = ZO_LOG_COEFFICIENTS, cos_c[kCosTerms] = ZO_COS_COEFFICIENTS,
                  sin_c[kSinTerms] = ZO_SIN_COEFFICIENTS;
  F k[U], f[U], p[U], t[U], s[U], c[U];
  I d[U];
  ZO_EACH d[u] = V::as_words(V::from_int(V::and_or(a[u], V::word(0x7FFFFFFFu), V::word(1))));
  ZO_EACH d[u] = V::sub(d[u], V::word(kLogSplitY));
  ZO_EACH t[u] = V::sub(V::as_float(V::and_or(b[u], V::word(0x7FFFFFu), V::word(0x3F800000u))), V::number(1.5f));
  ZO_EACH k[u] = V::from_int(V::and_(d[u], V::word(~0x7FFFFFu)));
  ZO_EACH f[u] = V::as_float(V::add(V::and_(d[u], V::word(0x7FFFFFu)), V::word(kLogSplit)));
  ZO_EACH f[u] = V::sub(f[u], V::number(1.0f));
  ZO_EACH s[u] = V::mul(t[u], t[u]);
  ZO_EACH k[u] = V::fma(k[u], V::number(kLogExponentScale), V::number(kRadiusFloor));
  ZO_EACH p[u] = V::number(log_c[kLogTerms - 1]);
  _Pragma("GCC unroll 8") for (int i = kLogTerms - 2; i >= 0; --i) ZO_EACH p[u] =
      V::fma(p[u], f[u], V::number(log_c[i]));
  ZO_EACH p[u] = V::sqrt(V::fma(p[u], f[u], k[u]));
  static_assert(kSinTerms == kCosTerms, "one loop serves both");
  ZO_EACH c[u] = V::number(cos_c[kCosTerms - 1]);
  ZO_EACH f[u] = V::number(sin_c[kSinTerms - 1]);
  _Pragma("GCC unroll 8") for (int i = kCosTerms - 2; i >= 0; --i) {
    ZO_EACH c[u] = V::fma(c[u], s[u], V::number(cos_c[i]));
    ZO_EACH f[u] = V::fma(f[u], s[u], V::number(sin_c[i]));
  }
  ZO_EACH p[u] = V::as_float(V::and_xor(b[u], V::word(0x80000000u), V::as_words(p[u])));
  ZO_EACH f[u] = V::mul(t[u], f[u]);
  ZO_EACH even[u] = V::mul(p[u], c[u]);
  ZO_EACH odd[u] = V::mul(p[u], f[u]);
}

// The 16 random bits of stochastic rounding, in the low halves.
template <class V>
ZO_OP void rounding_words(typename V::I a, typename V::I b, typename V::I& even, typename V::I& odd) {
  even = V::and_or(V::template shr<15>(b), V::word(0xFF00u), V::and_(b, V::word(0xFFu)));
  odd = V::and_xor(a, V::word(0xFFFFu), even);
}

}  // namespace
}  // namespace zo
