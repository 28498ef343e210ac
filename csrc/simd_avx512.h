// The vector operations that cpu_kernel.h needs, for AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "noise.h"

namespace zo {
namespace {

struct Avx512 {
  using F = __m512;   // 16 floats
  using I = __m512i;  // 16 words, or 8 words in 64-bit lanes
  using M = __mmask16;
  static constexpr int kLanes = 16;

  ZO_OP I word(uint32_t x) { return _mm512_set1_epi32(int(x)); }
  ZO_OP I key(const uint32_t* x) { return _mm512_set1_epi32(int(*x)); }
  ZO_OP F number(float x) { return _mm512_set1_ps(x); }

  // The 8 counters c .. c+7. Sequential order makes unpacklo/unpackhi of (cos, sin) come out in memory order.
  ZO_OP I counters(uint64_t c, bool sequential) {
    const I step = sequential ? _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7) : _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_add_epi64(_mm512_set1_epi64(int64_t(c)), step);
  }
  ZO_OP I next(I c, int by) { return _mm512_add_epi64(c, _mm512_set1_epi64(by)); }
  ZO_OP I mul_wide(I a, I b) { return _mm512_mul_epu32(a, b); }
  ZO_OP I high(I p) { return _mm512_srli_epi64(p, 32); }
  ZO_OP I xor2(I a, I b) { return _mm512_xor_si512(a, b); }
  ZO_OP I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  // Low words of 64-bit lanes: a's to the even 32-bit lanes, b's to the odd.
  ZO_OP I zip(I a, I b) { return _mm512_mask_mov_epi32(a, 0xAAAA, _mm512_slli_epi64(b, 32)); }

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
  ZO_OP I min(I a, I b) { return _mm512_min_epi32(a, b); }
  ZO_OP F from_int(I a) { return _mm512_cvtepi32_ps(a); }
  ZO_OP F as_float(I a) { return _mm512_castsi512_ps(a); }
  ZO_OP I as_words(F a) { return _mm512_castps_si512(a); }
  ZO_OP F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  ZO_OP F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  ZO_OP F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  ZO_OP F sqrt(F a) { return _mm512_sqrt_ps(a); }

  ZO_OP M is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  ZO_OP M greater(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }  // signed
  ZO_OP I select(M m, I yes, I no) { return _mm512_mask_mov_epi32(no, m, yes); }
  ZO_OP M magnitude_at_most(F a, F h) {
    return _mm512_cmp_ps_mask(as_float(and_(as_words(a), word(0x7FFFFFFFu))), h, _CMP_LE_OQ);
  }
  ZO_OP uint32_t bits_of(M m) { return m; }
  // Lane j is true if bit first + stride * j of `bits` is set.
  template <int First, int Stride>
  ZO_OP M mask_of(uint32_t bits) {
    const I lane = _mm512_setr_epi32(
        int(1u << First), int(1u << (First + Stride)), int(1u << (First + 2 * Stride)), int(1u << (First + 3 * Stride)),
        int(1u << (First + 4 * Stride)), int(1u << (First + 5 * Stride)), int(1u << (First + 6 * Stride)),
        int(1u << (First + 7 * Stride)), int(1u << (First + 8 * Stride)), int(1u << (First + 9 * Stride)),
        int(1u << (First + 10 * Stride)), int(1u << (First + 11 * Stride)), int(1u << (First + 12 * Stride)),
        int(1u << (First + 13 * Stride)), int(1u << (First + 14 * Stride)), int(1u << (First + 15 * Stride)));
    return _mm512_test_epi32_mask(word(bits), lane);
  }
  // 32 booleans -> 32 bits.
  ZO_OP uint32_t bits_of_bytes(const uint8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return uint32_t(_mm256_movemask_epi8(_mm256_cmpgt_epi8(bytes, _mm256_setzero_si256())));
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
  ZO_OP I load(const void* p) { return _mm512_loadu_si512(p); }
  ZO_OP void store(void* p, I a) { _mm512_storeu_si512(p, a); }
  ZO_OP F load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  ZO_OP void store_half(void* p, F a) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // The low halves of a's 16 words, then of b's 16.
  ZO_OP I narrow(I a, I b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
  }
};

}  // namespace
}  // namespace zo
