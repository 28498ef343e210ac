// Stands in for the compiler's <immintrin.h> when csrc/cpu/avx512.h is built for a processor without AVX-512: SIMDe's
// portable versions, and the few that its Debian package lacks.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>

using __mmask16 = simde__mmask16;
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC

static inline simde__m512 _mm512_cvtepi32_ps(simde__m512i a) {
  simde__m512_private r;
  const simde__m512i_private x = simde__m512i_to_private(a);
  for (int i = 0; i < 16; ++i) r.f32[i] = float(x.i32[i]);
  return simde__m512_from_private(r);
}

static inline simde__m256i _mm512_cvtepi32_epi16(simde__m512i a) {
  simde__m256i_private r;
  const simde__m512i_private x = simde__m512i_to_private(a);
  for (int i = 0; i < 16; ++i) r.i16[i] = int16_t(x.i32[i]);
  return simde__m256i_from_private(r);
}

static inline simde__m512i _mm512_cvtepu8_epi32(simde__m128i a) {
  simde__m512i_private r;
  const simde__m128i_private x = simde__m128i_to_private(a);
  for (int i = 0; i < 16; ++i) r.u32[i] = x.u8[i];
  return simde__m512i_from_private(r);
}

static inline simde__m512i _mm512_cvtepu16_epi32(simde__m256i a) {
  simde__m512i_private r;
  const simde__m256i_private x = simde__m256i_to_private(a);
  for (int i = 0; i < 16; ++i) r.u32[i] = x.u16[i];
  return simde__m512i_from_private(r);
}

static inline simde__m512 _mm512_cvtph_ps(simde__m256i a) {
  simde__m512_private r;
  const simde__m256i_private x = simde__m256i_to_private(a);
  for (int i = 0; i < 16; ++i) r.f32[i] = zo::fp16_widen(x.u16[i]);
  return simde__m512_from_private(r);
}

static inline simde__m256i _mm512_cvtps_ph(simde__m512 a, int) {
  simde__m256i_private r;
  const simde__m512_private x = simde__m512_to_private(a);
  for (int i = 0; i < 16; ++i) r.u16[i] = uint16_t(zo::fp16_nearest(x.f32[i]));
  return simde__m256i_from_private(r);
}

static inline simde__m512 _mm512_permutevar_ps(simde__m512 a, simde__m512i which) {
  simde__m512_private r;
  const simde__m512_private x = simde__m512_to_private(a);
  const simde__m512i_private w = simde__m512i_to_private(which);
  for (int i = 0; i < 16; ++i) r.f32[i] = x.f32[i / 4 * 4 + (w.u32[i] & 3)];
  return simde__m512_from_private(r);
}

// SIMDe's fmadd may be a multiplication and an addition.
#undef _mm512_fmadd_ps
static inline simde__m512 _mm512_fmadd_ps(simde__m512 a, simde__m512 b, simde__m512 c) {
  simde__m512_private r;
  const simde__m512_private x = simde__m512_to_private(a), y = simde__m512_to_private(b), z = simde__m512_to_private(c);
  for (int i = 0; i < 16; ++i) r.f32[i] = std::fma(x.f32[i], y.f32[i], z.f32[i]);
  return simde__m512_from_private(r);
}
