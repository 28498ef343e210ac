// The vector operations that cpu_kernel.h needs, for AVX2 + FMA + F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "noise.h"

namespace zo {
namespace {

struct Avx2 {
  using F = __m256;   // 8 floats
  using I = __m256i;  // 8 words, or 4 words in 64-bit lanes
  using M = __m256i;  // all ones or zeros in each 32-bit lane
  static constexpr int kLanes = 8;

  ZO_OP I word(uint32_t x) { return _mm256_set1_epi32(int(x)); }
  ZO_OP I key(const uint32_t* x) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(x)); }  // 8 copies
  ZO_OP F number(float x) { return _mm256_set1_ps(x); }

  // The 4 counters c .. c+3. Sequential order makes unpacklo/unpackhi of (cos, sin) come out in memory order.
  ZO_OP I counters(uint64_t c, bool sequential) {
    const I step = sequential ? _mm256_setr_epi64x(0, 2, 1, 3) : _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_add_epi64(_mm256_set1_epi64x(int64_t(c)), step);
  }
  ZO_OP I next(I c, int by) { return _mm256_add_epi64(c, _mm256_set1_epi64x(by)); }
  ZO_OP I mul_wide(I a, I b) { return _mm256_mul_epu32(a, b); }
  ZO_OP I high(I p) { return _mm256_srli_epi64(p, 32); }
  ZO_OP I xor2(I a, I b) { return _mm256_xor_si256(a, b); }
  ZO_OP I xor3(I a, I b, I c) { return xor2(a, xor2(b, c)); }
  // Low words of 64-bit lanes: a's to the even 32-bit lanes, b's to the odd.
  ZO_OP I zip(I a, I b) { return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA); }

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
  ZO_OP I min(I a, I b) { return _mm256_min_epi32(a, b); }
  ZO_OP F from_int(I a) { return _mm256_cvtepi32_ps(a); }
  ZO_OP F as_float(I a) { return _mm256_castsi256_ps(a); }
  ZO_OP I as_words(F a) { return _mm256_castps_si256(a); }
  ZO_OP F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  ZO_OP F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  ZO_OP F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  ZO_OP F sqrt(F a) { return _mm256_sqrt_ps(a); }

  ZO_OP M is_nan(F a) { return as_words(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
  ZO_OP M greater(I a, I b) { return _mm256_cmpgt_epi32(a, b); }  // signed
  ZO_OP I select(M m, I yes, I no) { return _mm256_blendv_epi8(no, yes, m); }
  ZO_OP M magnitude_at_most(F a, F h) {
    return as_words(_mm256_cmp_ps(as_float(and_(as_words(a), word(0x7FFFFFFFu))), h, _CMP_LE_OQ));
  }
  ZO_OP uint32_t bits_of(M m) { return uint32_t(_mm256_movemask_ps(as_float(m))); }
  // Lane j is true if bit first + stride * j of `bits` is set.
  template <int First, int Stride>
  ZO_OP M mask_of(uint32_t bits) {
    const I lane = _mm256_setr_epi32(1 << First, 1 << (First + Stride), 1 << (First + 2 * Stride),
                                     1 << (First + 3 * Stride), 1 << (First + 4 * Stride), 1 << (First + 5 * Stride),
                                     1 << (First + 6 * Stride), 1 << (First + 7 * Stride));
    return _mm256_cmpeq_epi32(and_(word(bits), lane), lane);
  }
  // 16 booleans -> 16 bits.
  ZO_OP uint32_t bits_of_bytes(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return uint32_t(_mm_movemask_epi8(_mm_cmpgt_epi8(bytes, _mm_setzero_si128())));
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
  ZO_OP I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  ZO_OP void store(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  ZO_OP F load_half(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  ZO_OP void store_half(void* p, F a) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // The low halves of a's 8 words, then of b's 8.
  ZO_OP I narrow(I a, I b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8); }
};

}  // namespace
}  // namespace zo
