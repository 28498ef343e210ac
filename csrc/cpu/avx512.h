// The vector operations that kernel.h needs, for AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../noise.h"

namespace zo {
namespace {

struct Avx512 {
  using F = __m512;   // 16 floats
  using I = __m512i;  // 16 words, or 8 words in 64-bit lanes
  using M = __mmask16;
  static constexpr int kLanes = 16;
  static constexpr int kPhiloxTiles = 4, kBoxMullerTiles = 4;
  static constexpr int kSignWords = 2, kTurnedWords = 4;  // with all their elements in registers

  ZO_OP I word(uint32_t x) { return _mm512_set1_epi32(int(x)); }
  ZO_OP I key(const uint32_t* x) { return _mm512_set1_epi32(int(*x)); }
  ZO_OP F number(float x) { return _mm512_set1_ps(x); }

  // The 8 counters c .. c+7. In sequential order, unpacklo and unpackhi of (cos, sin) give memory order.
  ZO_OP I counters(uint64_t c, bool sequential) {
    const I step = sequential ? _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7) : _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_add_epi64(_mm512_set1_epi64(int64_t(c)), step);
  }
  ZO_OP I add_counters(I c, int by) { return _mm512_add_epi64(c, _mm512_set1_epi64(by)); }
  ZO_OP I mul_wide(I a, I b) { return _mm512_mul_epu32(a, b); }
  ZO_OP I high(I p) { return _mm512_srli_epi64(p, 32); }
  ZO_OP I xor2(I a, I b) { return _mm512_xor_si512(a, b); }
  ZO_OP I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  ZO_OP I raise(I a) { return _mm512_slli_epi64(a, 32); }
  // The even 32-bit lanes of a and the odd ones of b.
  ZO_OP I zip(I a, I b) { return _mm512_mask_mov_epi32(a, 0xAAAA, b); }

  ZO_OP I and_(I a, I b) { return _mm512_and_si512(a, b); }
  ZO_OP I or_(I a, I b) { return _mm512_or_si512(a, b); }
  ZO_OP I and_or(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0xEA); }
  ZO_OP I and_xor(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x6A); }
  ZO_OP I add(I a, I b) { return _mm512_add_epi32(a, b); }
  ZO_OP I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  template <int N>
  ZO_OP I shr(I a) {
    return _mm512_srli_epi32(a, N);
  }
  template <int N>
  ZO_OP I shl(I a) {
    return _mm512_slli_epi32(a, N);
  }
  ZO_OP I shrv(I a, I by) { return _mm512_srlv_epi32(a, by); }
  // Of s, s, -s, -s: what `chosen` takes from, so that it is -s in the lanes whose bit 0 is set, or for `quad` bit 1.
  ZO_OP F pair(const float (&x)[4]) {
    double both;  // their bits: nothing is computed with it
    memcpy(&both, x + 1, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
  }
  ZO_OP F quad(const float (&x)[4]) { return _mm512_broadcast_f32x4(_mm_load_ps(x)); }
  ZO_OP F chosen(F from, I word) { return _mm512_permutevar_ps(from, word); }
  ZO_OP I min(I a, I b) { return _mm512_min_epi32(a, b); }
  ZO_OP F from_int(I a) { return _mm512_cvtepi32_ps(a); }
  ZO_OP F as_float(I a) { return _mm512_castsi512_ps(a); }
  ZO_OP I as_words(F a) { return _mm512_castps_si512(a); }
  ZO_OP F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  ZO_OP F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  ZO_OP F add(F a, F b) { return _mm512_add_ps(a, b); }
  ZO_OP F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  ZO_OP F sqrt(F a) { return _mm512_sqrt_ps(a); }

  ZO_OP M greater(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }  // signed
  ZO_OP I select(M m, I yes, I no) { return _mm512_mask_mov_epi32(no, m, yes); }
  ZO_OP M magnitude_not_at_most(F a, F h) {
    return _mm512_cmp_ps_mask(as_float(and_(as_words(a), word(0x7FFFFFFFu))), h, _CMP_NLE_UQ);
  }
  // Masks of the 32 elements of a tile: a and b are its halves if Sequential, else its even and odd elements.
  template <bool Sequential>
  ZO_OP void zero_bits(const uint8_t* p, M& a, M& b) {
    uint32_t bits;
    memcpy(&bits, p, 4);
    bits = ~bits;
    if (Sequential) {
      a = M(bits);
      b = M(bits >> 16);
    } else {
      const I even = _mm512_setr_epi32(1, 1 << 2, 1 << 4, 1 << 6, 1 << 8, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18,
                                       1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28, 1 << 30);
      a = _mm512_test_epi32_mask(word(bits), even);
      b = _mm512_test_epi32_mask(word(bits >> 1), even);
    }
  }
  template <bool Sequential>
  ZO_OP void false_bools(const uint8_t* p, M& a, M& b) {
    if (Sequential) {
      a = zero(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
      b = zero(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16))));
    } else {
      const I x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      a = zero(and_(x, word(0xFF)));
      b = zero(and_(x, word(0xFF00)));
    }
  }
  ZO_OP M zero(I a) { return _mm512_cmpeq_epi32_mask(a, _mm512_setzero_si512()); }
  template <bool Sequential>
  ZO_OP void write_zero_bits(M a, M b, uint8_t* p) {
    uint32_t bits = uint32_t(a) | uint32_t(b) << 16;
    if (!Sequential) bits = _mm512_movepi16_mask(merge_pairs(_mm512_movm_epi32(a), _mm512_movm_epi32(b)));
    bits = ~bits;
    memcpy(p, &bits, 4);
  }
  // The even 16-bit lanes of a and the odd ones of b.
  ZO_OP I merge_pairs(I a, I b) { return _mm512_mask_mov_epi16(a, 0xAAAAAAAAu, b); }
  // 16-bit lanes of yes or no; masks of the even and of the odd ones, or of the first and of the second half.
  ZO_OP I select_pairs(M even, M odd, I yes, I no) { return merge_pairs(select(even, yes, no), select(odd, yes, no)); }
  ZO_OP I select_halves(M a, M b, I yes, I no) {
    return _mm512_mask_mov_epi16(no, uint32_t(a) | uint32_t(b) << 16, yes);
  }

  ZO_OP void unpack(I& a, I& b) {
    const I low = _mm512_unpacklo_epi32(a, b);
    b = _mm512_unpackhi_epi32(a, b);
    a = low;
  }
  ZO_OP void unpack(F& a, F& b) {
    const F low = _mm512_unpacklo_ps(a, b);
    b = _mm512_unpackhi_ps(a, b);
    a = low;
  }
  // Mixes a and b: their even lanes, then their odd ones; unpack undoes it.
  ZO_OP void mix(F& a, F& b) {
    const F even = _mm512_shuffle_ps(a, b, 0x88);
    b = _mm512_shuffle_ps(a, b, 0xDD);
    a = even;
  }
  // The same of lanes in pairs; it undoes itself.
  ZO_OP void mix_pairs(F& a, F& b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    a = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
    b = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
  }
  ZO_OP I load(const void* p) { return _mm512_loadu_si512(p); }
  ZO_OP void store(void* p, I a) { _mm512_storeu_si512(p, a); }
  // 16 unsigned halves, each in a word.
  ZO_OP I load_halves(const void* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  ZO_OP F load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  ZO_OP I to_half(F a, F b) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(a, nearest)), _mm512_cvtps_ph(b, nearest), 1);
  }
  // The low halves of a's 16 words, then of b's 16.
  ZO_OP I narrow(I a, I b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
  }
};

}  // namespace
}  // namespace zo
