// Reads a tile of 2 * V::kLanes elements from memory, rounds it, masks it and writes it.
//
// The two registers of a tile hold its first and second half for fp32 and fp16, and its even and odd elements for bf16,
// where two neighbours share a 32-bit word.
#pragma once

#include "job.h"

namespace zo {
namespace {

// A function whose loops get a register allocation of their own.
#define ZO_APART static __attribute__((noinline))

// Of a NaN with more bits set than a bf16 has, the sum could carry into the sign. There is none: NaNs of scales and
// decays have one bit (run.cpp), those of weights are bf16's, and arithmetic passes on the bits of one of its operands.
template <class V>
ZO_OP typename V::I bf16_high_half(typename V::F t, bool stochastic, typename V::I rho) {
  const typename V::I bits = V::as_words(t);
  return V::add(bits, stochastic ? rho : V::add(V::and_(V::template shr<16>(bits), V::word(1)), V::word(0x7FFFu)));
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

template <class V, DType D>
struct Memory {
  using F = typename V::F;
  using I = typename V::I;
  using M = typename V::M;
  static constexpr bool kSequential = D != DType::kBFloat16;
  static constexpr int kBytes = D == DType::kFloat32 ? 4 : 2;

  ZO_OP void read(const char* p, F& a, F& b) {
    if (D == DType::kFloat32) {
      a = V::as_float(V::load(p));
      b = V::as_float(V::load(p + 4 * V::kLanes));
    } else if (D == DType::kBFloat16) {
      const I words = V::load(p);
      a = V::as_float(V::template shl<16>(words));
      b = V::as_float(V::and_(words, V::word(0xFFFF0000u)));
    } else {
      a = V::load_half(p);
      b = V::load_half(p + 2 * V::kLanes);
    }
  }

  // keep_a, keep_b: the masked-out elements, which get the bits of src.
  template <bool Stochastic, bool Masked>
  ZO_OP void write(char* p, const char* src, F a, F b, I rho_a, I rho_b, M keep_a, M keep_b) {
    if (D == DType::kFloat32) {
      I x = V::as_words(a), y = V::as_words(b);
      if (Masked) {
        x = V::select(keep_a, V::load(src), x);
        y = V::select(keep_b, V::load(src + 4 * V::kLanes), y);
      }
      V::store(p, x);
      V::store(p + 4 * V::kLanes, y);
    } else if (D == DType::kBFloat16) {
      I x = bf16_high_half<V>(a, Stochastic, rho_a), y = bf16_high_half<V>(b, Stochastic, rho_b);
      I words = V::merge_pairs(V::template shr<16>(x), y);
      if (Masked) words = V::select_pairs(keep_a, keep_b, V::load(src), words);
      V::store(p, words);
    } else {
      I words = Stochastic ? V::narrow(fp16_stochastic<V>(a, rho_a), fp16_stochastic<V>(b, rho_b)) : V::to_half(a, b);
      if (Masked) words = V::select_halves(keep_a, keep_b, V::load(src), words);
      V::store(p, words);
    }
  }
};

// Where the first element is, of a block or stretch.
struct Place {
  const char* src;
  char* dst;
  const uint8_t* bools;
  float threshold, decay;
};

template <MaskKind K>
ZO_OP Place place_of(const Job& job, int64_t i, int bytes) {
  const Entry& e = *job.entry;
  return {static_cast<const char*>(e.src) + i * bytes, static_cast<char*>(e.dst) + i * bytes,
          K == MaskKind::kBool ? e.mask_data + i : nullptr, e.threshold, job.decay};
}

// Which elements of a tile are masked out and keep their bits.
template <class V, MaskKind K, bool Sequential>
ZO_OP void masked_out(const Place& at, int64_t i, uint8_t* bits, typename V::F a, typename V::F b,
                      typename V::M& keep_a, typename V::M& keep_b) {
  if (K == MaskKind::kBool) V::template false_bools<Sequential>(at.bools + i, keep_a, keep_b);
  if (K == MaskKind::kBits) V::template zero_bits<Sequential>(bits, keep_a, keep_b);
  if (K == MaskKind::kThreshold || K == MaskKind::kRecord) {
    const typename V::F h = V::number(at.threshold);
    keep_a = V::magnitude_not_at_most(a, h);
    keep_b = V::magnitude_not_at_most(b, h);
    if (K == MaskKind::kRecord) V::template write_zero_bits<Sequential>(keep_a, keep_b, bits);
  }
}

// The mask bits of one block, shifted so that the first is bit 0.
template <int N>
struct BlockBits {
  static_assert(N % 64 == 0, "whole words");
  uint64_t words[N / 64];

  uint8_t* bytes() { return reinterpret_cast<uint8_t*>(words); }

  // Reads n bits, a multiple of 8, from bit i of p on; touches no other byte.
  void read(const uint8_t* p, int64_t i, int64_t n) {
    const int shift = int(i & 7);
    p += i >> 3;
    if (shift == 0) {
      memcpy(words, p, size_t(n / 8));
      return;
    }
    uint64_t from[N / 64 + 1];
    memcpy(from, p, size_t(n / 8 + 1));
    for (int j = 0; j < N / 64; ++j) words[j] = from[j] >> shift | from[j + 1] << (64 - shift);
  }

  // Writes n bits to p from bit i on, where p must hold zeros.
  void write(uint8_t* p, int64_t i, int64_t n) {
    const int shift = int(i & 7);
    p += i >> 3;
    if (shift == 0) {
      memcpy(p, words, size_t(n / 8));
      return;
    }
    memset(bytes() + n / 8, 0, size_t(N / 8 - n / 8));
    uint64_t to[N / 64 + 1];
    to[0] = words[0] << shift | p[0];
    for (int j = 1; j < N / 64; ++j) to[j] = words[j] << shift | words[j - 1] >> (64 - shift);
    to[N / 64] = words[N / 64 - 1] >> (64 - shift);
    memcpy(p, to, size_t(n / 8 + 1));
  }
};

}  // namespace
}  // namespace zo
