// The vector kernel, written once over the operations of an instruction set V (simd_avx2.h, simd_avx512.h).
//
// Every 32-bit word of Philox sits in a 64-bit lane, so that a multiplication leaves its low and its high half in the
// same lane: a round of V::kLanes / 2 counters is two multiplications, two shifts and two three-way xors. The words are
// zipped into 32-bit lanes only for Box-Muller. A tile of 2 * V::kLanes elements is one register of (cos) and one
// of (sin) results; bf16 stores them as they are, since two neighbours share a 32-bit word of memory.
#pragma once

#include "cpu_scalar.h"

namespace zo {
namespace {

template <class V, int U>
struct Tile {
  typename V::F even[U], odd[U];  // of each pair; low and high half of the tile once unpacked
};

template <class V, int U>
struct Bits {
  typename V::I even[U], odd[U];
};

#define ZO_EACH _Pragma("GCC unroll 4") for (int u = 0; u < U; ++u)

template <class V, int U>
ZO_OP void philox(const Direction& d, const typename V::I (&c)[U], typename V::I (&x)[4][U]) {
  using I = typename V::I;
  const I m0 = V::word(kPhiloxM0), m1 = V::word(kPhiloxM1);
  I p0[U], p1[U];
  ZO_EACH {  // rounds 0 to 2: what the counters have in common is already in d
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
  _Pragma("GCC unroll 10") for (int r = 3; r < kPhiloxRounds; ++r) {
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
}

// U pairs of words side by side, operation by operation: one chain is longer than what a processor looks ahead.
template <class V, int U>
ZO_OP void box_muller(const typename V::I (&a)[U], const typename V::I (&b)[U], typename V::F (&even)[U],
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
  ZO_EACH k[u] = V::mul(k[u], V::number(kLogExponentScale));
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

template <class V, bool Sequential, bool Stochastic, int U>
ZO_OP void noise(const Direction& d, uint64_t counter, Tile<V, U>& z, Bits<V, U>& rho) {
  using I = typename V::I;
  I c[U], x[4][U];
  ZO_EACH c[u] = u == 0 ? V::counters(counter, Sequential) : V::next(c[0], u * V::kLanes / 2);
  philox<V, U>(d, c, x);
  I a[U], b[U];
  ZO_EACH {
    a[u] = V::zip(x[0][u], x[2][u]);
    b[u] = V::zip(x[1][u], x[3][u]);
  }
  box_muller<V, U>(a, b, z.even, z.odd);
  ZO_EACH {
    if (Sequential) V::unpack(z.even[u], z.odd[u]);
    if (Stochastic) {
      const I h = V::and_or(V::template shr<15>(b[u]), V::word(0xFF00u), V::and_(b[u], V::word(0xFFu)));
      rho.even[u] = h;
      rho.odd[u] = V::and_xor(a[u], V::word(0xFFFFu), h);
      if (Sequential) V::unpack(rho.even[u], rho.odd[u]);
    }
  }
}

template <class V>
ZO_OP typename V::I bf16_high_half(typename V::F t, bool stochastic, typename V::I rho) {
  using I = typename V::I;
  const I bits = V::as_words(t);
  const I bump = stochastic ? rho : V::add(V::and_(V::template shr<16>(bits), V::word(1)), V::word(0x7FFFu));
  return V::select(V::is_nan(t), V::or_(bits, V::word(0x400000u)), V::add(bits, bump));
}

template <class V>
ZO_OP typename V::I fp16_stochastic(typename V::F t, typename V::I rho) {
  using I = typename V::I;
  const I bits = V::as_words(t), m = V::and_(bits, V::word(0x7FFFFFFFu)), bump = V::template shr<3>(rho);
  const I normal = V::min(V::sub(V::template shr<13>(V::add(m, bump)), V::word(0x1C000u)), V::word(0x7C00u));
  const I scaled = V::sub(V::as_words(V::sub(V::as_float(m), V::number(-6.103515625e-05f))), V::word(0x38800000u));
  const I subnormal = V::template shr<13>(V::add(scaled, bump));
  I h = V::select(V::greater(m, V::word(0x387FFFFFu)), normal, subnormal);
  h = V::select(V::greater(m, V::word(0x7F800000u)), V::word(0x7E00u), h);
  return V::and_or(V::template shr<16>(bits), V::word(0x8000u), h);
}

// A tile in memory: `words` keeps what was read, so that masked-out elements can be written back bit for bit.
template <class V, DType D>
struct Memory {
  static constexpr bool kSequential = D != DType::kBFloat16;
  static constexpr int kWords = D == DType::kFloat32 ? 2 : 1;

  ZO_OP void read(const void* src, int64_t i, typename V::I (&words)[2], typename V::F& a, typename V::F& b) {
    if (D == DType::kFloat32) {
      const float* p = static_cast<const float*>(src) + i;
      words[0] = V::load(p);
      words[1] = V::load(p + V::kLanes);
      a = V::as_float(words[0]);
      b = V::as_float(words[1]);
      return;
    }
    const uint16_t* p = static_cast<const uint16_t*>(src) + i;
    words[0] = V::load(p);
    if (D == DType::kBFloat16) {
      a = V::as_float(V::template shl<16>(words[0]));
      b = V::as_float(V::and_(words[0], V::word(0xFFFF0000u)));
    } else {
      a = V::load_half(p);
      b = V::load_half(p + V::kLanes);
    }
  }

  template <bool Stochastic, bool Masked>
  ZO_OP void write(void* dst, int64_t i, const void* src, typename V::F a, typename V::F b, typename V::I rho_a,
                   typename V::I rho_b, typename V::M mask_a, typename V::M mask_b) {
    using I = typename V::I;
    if (D == DType::kFloat32) {
      float* p = static_cast<float*>(dst) + i;
      const float* q = static_cast<const float*>(src) + i;
      I x = V::as_words(a), y = V::as_words(b);
      if (Masked) {
        x = V::select(mask_a, x, V::load(q));
        y = V::select(mask_b, y, V::load(q + V::kLanes));
      }
      V::store(p, x);
      V::store(p + V::kLanes, y);
      return;
    }
    uint16_t* p = static_cast<uint16_t*>(dst) + i;
    const uint16_t* q = static_cast<const uint16_t*>(src) + i;
    if (D == DType::kBFloat16) {
      I x = bf16_high_half<V>(a, Stochastic, rho_a), y = bf16_high_half<V>(b, Stochastic, rho_b);
      if (Masked) {
        const I old = V::load(q);
        x = V::select(mask_a, x, V::template shl<16>(old));
        y = V::select(mask_b, y, old);
      }
      V::store(p, V::and_or(y, V::word(0xFFFF0000u), V::template shr<16>(x)));
      return;
    }
    // fp16: a masked-out element was widened from fp16, so either rounding gives its bits back (but for a NaN's
    // payload).
    if (Masked) {
      a = V::as_float(V::select(mask_a, V::as_words(a), V::as_words(V::load_half(q))));
      b = V::as_float(V::select(mask_b, V::as_words(b), V::as_words(V::load_half(q + V::kLanes))));
      if (Stochastic) {
        rho_a = V::select(mask_a, rho_a, V::word(0));
        rho_b = V::select(mask_b, rho_b, V::word(0));
      }
    }
    if (Stochastic) {
      V::store(p, V::narrow(fp16_stochastic<V>(a, rho_a), fp16_stochastic<V>(b, rho_b)));
    } else {
      V::store_half(p, a);
      V::store_half(p + V::kLanes, b);
    }
  }
};

// Bit j to bit 2j.
inline uint32_t spread(uint32_t x) {
  x = (x | (x << 8)) & 0x00FF00FFu;
  x = (x | (x << 4)) & 0x0F0F0F0Fu;
  x = (x | (x << 2)) & 0x33333333u;
  return (x | (x << 1)) & 0x55555555u;
}

// N bits (16 or 32) that start at bit i; no byte that holds none of them is touched. Copies of a fixed size are moves.
template <int N>
inline uint32_t read_bits(const uint8_t* p, int64_t i) {
  uint64_t x = 0;
  const int shift = int(i & 7);
  if (shift == 0)
    memcpy(&x, p + (i >> 3), N / 8);
  else
    memcpy(&x, p + (i >> 3), N / 8 + 1);
  return uint32_t(x >> shift);
}

template <int N>
inline void or_bits(uint8_t* p, int64_t i, uint32_t bits) {
  uint64_t x = 0;
  const int shift = int(i & 7);
  p += i >> 3;
  if (shift == 0) {
    memcpy(&x, p, N / 8);
    x |= bits;
    memcpy(p, &x, N / 8);
  } else {
    memcpy(&x, p, N / 8 + 1);
    x |= uint64_t(bits) << shift;
    memcpy(p, &x, N / 8 + 1);
  }
}

template <class V, bool Sequential>
ZO_OP void masks(const Entry& e, int64_t i, typename V::F a, typename V::F b, typename V::M& mask_a,
                 typename V::M& mask_b) {
  constexpr int n = 2 * V::kLanes;
  if (e.mask == MaskKind::kBool || e.mask == MaskKind::kBits) {
    const uint32_t bits = e.mask == MaskKind::kBool ? V::bits_of_bytes(e.mask_data + i) : read_bits<n>(e.mask_data, i);
    mask_a = V::template mask_of<0, Sequential ? 1 : 2>(bits);
    mask_b = Sequential ? V::template mask_of<0, 1>(bits >> V::kLanes) : V::template mask_of<1, 2>(bits);
    return;
  }
  const typename V::F h = V::number(e.threshold);
  mask_a = V::magnitude_at_most(a, h);
  mask_b = V::magnitude_at_most(b, h);
  if (e.mask == MaskKind::kRecord) {
    const uint32_t x = V::bits_of(mask_a), y = V::bits_of(mask_b);
    or_bits<n>(e.mask_data, i, Sequential ? x | (y << V::kLanes) : spread(x) | (spread(y) << 1));
  }
}

// U tiles that start at local element i, whose index in the parameter is a multiple of 4.
template <class V, DType D, bool Stochastic, bool Masked, int U>
ZO_OP void tiles(const Job& job, int64_t i) {
  using Mem = Memory<V, D>;
  const Entry& e = *job.entry;
  const uint64_t counter = uint64_t(e.offset + i) >> 2;
  constexpr int n = 2 * V::kLanes;

  Tile<V, U> t, z;
  Bits<V, U> rho, unused;
  typename V::M mask_a[U], mask_b[U];
  const typename V::F decay = V::number(job.decay);

  noise<V, Mem::kSequential, Stochastic, U>(job.directions[0], counter, z, rho);
  const typename V::F scale0 = V::number(job.directions[0].scale);
  ZO_EACH {
    typename V::I words[2];
    Mem::read(e.src, i + u * n, words, t.even[u], t.odd[u]);
    if (Masked) masks<V, Mem::kSequential>(e, i + u * n, t.even[u], t.odd[u], mask_a[u], mask_b[u]);
    t.even[u] = V::fma(scale0, z.even[u], V::mul(decay, t.even[u]));
    t.odd[u] = V::fma(scale0, z.odd[u], V::mul(decay, t.odd[u]));
  }
  for (int k = 1; k < job.n_directions; ++k) {
    const typename V::F scale = V::number(job.directions[k].scale);
    noise<V, Mem::kSequential, false, U>(job.directions[k], counter, z, unused);
    ZO_EACH {
      t.even[u] = V::fma(scale, z.even[u], t.even[u]);
      t.odd[u] = V::fma(scale, z.odd[u], t.odd[u]);
    }
  }
  ZO_EACH Mem::template write<Stochastic, Masked>(e.dst, i + u * n, e.src, t.even[u], t.odd[u], rho.even[u], rho.odd[u],
                                                  mask_a[u], mask_b[u]);
}

template <class V, DType D, bool Stochastic, bool Masked, int U>
void vector_range(const Job& job, int64_t begin, int64_t end) {
  constexpr int n = 2 * V::kLanes;
  const int64_t head = -(job.entry->offset + begin) & 3;
  int64_t i = begin + (head < end - begin ? head : end - begin);
  scalar_range(job, begin, i);
  for (; i + U * n <= end; i += U * n) tiles<V, D, Stochastic, Masked, U>(job, i);
  for (; i + n <= end; i += n) tiles<V, D, Stochastic, Masked, 1>(job, i);
  scalar_range(job, i, end);
}

template <class V, DType D, int U>
void dispatch(const Job& job, int64_t begin, int64_t end) {
  const bool masked = job.entry->mask != MaskKind::kNone;
  if (job.stochastic && D != DType::kFloat32)
    masked ? vector_range<V, D, true, true, U>(job, begin, end) : vector_range<V, D, true, false, U>(job, begin, end);
  else
    masked ? vector_range<V, D, false, true, U>(job, begin, end) : vector_range<V, D, false, false, U>(job, begin, end);
}

// U: how many tiles are computed at once, to hide the latency of the multiplications.
template <class V, int U>
void range(const Job& job, int64_t begin, int64_t end) {
  switch (job.entry->dtype) {
    case DType::kFloat32:
      return dispatch<V, DType::kFloat32, U>(job, begin, end);
    case DType::kBFloat16:
      return dispatch<V, DType::kBFloat16, U>(job, begin, end);
    case DType::kFloat16:
      return dispatch<V, DType::kFloat16, U>(job, begin, end);
  }
}

}  // namespace
}  // namespace zo
