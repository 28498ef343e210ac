// The vector operations that kernel.h needs, for AVX2 + FMA + F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../noise.h"

namespace zo {
namespace {

struct Avx2 {
  using F = __m256;   // 8 floats
  using I = __m256i;  // 8 words, or 4 words in 64-bit lanes
  using M = __m256i;  // all ones or zeros in each 32-bit lane
  static constexpr int kLanes = 8;
  static constexpr int kPhiloxTiles = 2, kBoxMullerTiles = 2;  // three and four spill registers
  static constexpr int kSignWords = 2, kTurnedWords = 2;       // with all their elements in registers

  ZO_OP I word(uint32_t x) { return _mm256_set1_epi32(int(x)); }
  ZO_OP I key(const uint32_t* x) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(x)); }  // 8 copies
  ZO_OP F number(float x) { return _mm256_set1_ps(x); }

  // The 4 counters c .. c+3. In sequential order, unpacklo and unpackhi of (cos, sin) give memory order.
  ZO_OP I counters(uint64_t c, bool sequential) {
    const I step = sequential ? _mm256_setr_epi64x(0, 2, 1, 3) : _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_add_epi64(_mm256_set1_epi64x(int64_t(c)), step);
  }
  ZO_OP I add_counters(I c, int by) { return _mm256_add_epi64(c, _mm256_set1_epi64x(by)); }
  ZO_OP I mul_wide(I a, I b) { return _mm256_mul_epu32(a, b); }
  ZO_OP I high(I p) { return _mm256_srli_epi64(p, 32); }
  ZO_OP I xor2(I a, I b) { return _mm256_xor_si256(a, b); }
  ZO_OP I xor3(I a, I b, I c) { return xor2(a, xor2(b, c)); }
  ZO_OP I raise(I a) { return _mm256_slli_epi64(a, 32); }
  // The even 32-bit lanes of a and the odd ones of b.
  ZO_OP I zip(I a, I b) { return _mm256_blend_epi32(a, b, 0xAA); }

  ZO_OP I and_(I a, I b) { return _mm256_and_si256(a, b); }
  ZO_OP I or_(I a, I b) { return _mm256_or_si256(a, b); }
  ZO_OP I and_or(I a, I b, I c) { return or_(and_(a, b), c); }
  ZO_OP I and_xor(I a, I b, I c) { return xor2(and_(a, b), c); }
  ZO_OP I add(I a, I b) { return _mm256_add_epi32(a, b); }
  ZO_OP I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  template <int N>
  ZO_OP I shr(I a) {
    return _mm256_srli_epi32(a, N);
  }
  template <int N>
  ZO_OP I shl(I a) {
    return _mm256_slli_epi32(a, N);
  }
  ZO_OP I shrv(I a, I by) { return _mm256_srlv_epi32(a, by); }
  // Of s, s, -s, -s: what `chosen` takes from, so that it is -s in the lanes whose bit 0 is set, or for `quad` bit 1.
  ZO_OP F pair(const float (&x)[4]) {
    double both;  // their bits: nothing is computed with it
    memcpy(&both, x + 1, 8);
    return _mm256_castpd_ps(_mm256_set1_pd(both));
  }
  ZO_OP F quad(const float (&x)[4]) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)); }
  ZO_OP F chosen(F from, I word) { return _mm256_permutevar_ps(from, word); }
  ZO_OP I min(I a, I b) { return _mm256_min_epi32(a, b); }
  ZO_OP F from_int(I a) { return _mm256_cvtepi32_ps(a); }
  ZO_OP F as_float(I a) { return _mm256_castsi256_ps(a); }
  ZO_OP I as_words(F a) { return _mm256_castps_si256(a); }
  ZO_OP F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  ZO_OP F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  ZO_OP F add(F a, F b) { return _mm256_add_ps(a, b); }
  ZO_OP F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  ZO_OP F sqrt(F a) { return _mm256_sqrt_ps(a); }

  ZO_OP M greater(I a, I b) { return _mm256_cmpgt_epi32(a, b); }  // signed
  ZO_OP I select(M m, I yes, I no) { return _mm256_blendv_epi8(no, yes, m); }
  ZO_OP M magnitude_not_at_most(F a, F h) {
    return as_words(_mm256_cmp_ps(as_float(and_(as_words(a), word(0x7FFFFFFFu))), h, _CMP_NLE_UQ));
  }
  // Masks of the 16 elements of a tile: a and b are its halves if Sequential, else its even and odd elements.
  template <bool Sequential>
  ZO_OP void zero_bits(const uint8_t* p, M& a, M& b) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    const I x = _mm256_set1_epi16(int16_t(bits)), low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128),
            even = _mm256_setr_epi32(1, 1 << 2, 1 << 4, 1 << 6, 1 << 8, 1 << 10, 1 << 12, 1 << 14);
    const I in_a = Sequential ? low : even, in_b = _mm256_slli_epi32(in_a, Sequential ? 8 : 1);
    a = zero(and_(x, in_a));
    b = zero(and_(x, in_b));
  }
  template <bool Sequential>
  ZO_OP void false_bools(const uint8_t* p, M& a, M& b) {
    if (Sequential) {
      a = zero(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
      b = zero(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))));
    } else {
      const I x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      a = zero(and_(x, word(0xFF)));
      b = zero(and_(x, word(0xFF00)));
    }
  }
  ZO_OP M zero(I a) { return _mm256_cmpeq_epi32(a, _mm256_setzero_si256()); }
  template <bool Sequential>
  ZO_OP void write_zero_bits(M a, M b, uint8_t* p) {
    if (Sequential) {
      p[0] = uint8_t(~_mm256_movemask_ps(as_float(a)));
      p[1] = uint8_t(~_mm256_movemask_ps(as_float(b)));
    } else {
      const I x = merge_pairs(a, b);
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
      const uint16_t bits = uint16_t(~_mm_movemask_epi8(bytes));
      memcpy(p, &bits, 2);
    }
  }
  // The even 16-bit lanes of a and the odd ones of b.
  ZO_OP I merge_pairs(I a, I b) { return _mm256_blend_epi16(a, b, 0xAA); }
  // 16-bit lanes of yes or no; masks of the even and of the odd ones, or of the first and of the second half.
  ZO_OP I select_pairs(M even, M odd, I yes, I no) { return select(merge_pairs(even, odd), yes, no); }
  ZO_OP I select_halves(M a, M b, I yes, I no) {
    return select(_mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8), yes, no);
  }

  ZO_OP void unpack(I& a, I& b) {
    const I low = _mm256_unpacklo_epi32(a, b);
    b = _mm256_unpackhi_epi32(a, b);
    a = low;
  }
  ZO_OP void unpack(F& a, F& b) {
    const F low = _mm256_unpacklo_ps(a, b);
    b = _mm256_unpackhi_ps(a, b);
    a = low;
  }
  // Mixes a and b: their even lanes, then their odd ones; unpack undoes it.
  ZO_OP void mix(F& a, F& b) {
    const F even = _mm256_shuffle_ps(a, b, 0x88);
    b = _mm256_shuffle_ps(a, b, 0xDD);
    a = even;
  }
  // The same of lanes in pairs; it undoes itself.
  ZO_OP void mix_pairs(F& a, F& b) {
    const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
    a = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
    b = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
  }
  ZO_OP I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  ZO_OP void store(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  // 8 unsigned halves, each in a word.
  ZO_OP I load_halves(const void* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  ZO_OP F load_half(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  ZO_OP I to_half(F a, F b) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm256_set_m128i(_mm256_cvtps_ph(b, nearest), _mm256_cvtps_ph(a, nearest));
  }
  // The low halves of a's 8 words, then of b's 8.
  ZO_OP I narrow(I a, I b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8); }
};

}  // namespace
}  // namespace zo
