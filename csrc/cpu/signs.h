// Random signs in vectors: the sweep of kernel.h, for z that is -1 or +1 (docs/noise.md, 8).
//
// A stretch takes two steps. First Philox fills a buffer in L1 with the words of all its directions, 32 signs each.
// Then one sweep keeps some weights in registers while it adds every direction to them, so that a further direction
// costs a shift, a mask and an addition, and no memory but its words.
#pragma once

#include "noise.h"
#include "scalar.h"
#include "tile.h"

namespace zo {
namespace {

constexpr int kWordSigns = 32;

// How far a word is shifted right so that bit 0 is the sign of its element i; and so that bits 0 and 16 are those of
// its pair p, two 16-bit weights in 32 bits.
struct alignas(64) SignShifts {
  uint32_t element[kWordSigns], pair[kWordSigns / 2];
};
static constexpr SignShifts kSignShifts = {{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31},
                                           {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};

template <class V>
struct SignStretch {
  static constexpr int kPhilox = 2;                       // tiles of Philox side by side
  static constexpr int kWords = kPhilox * 2 * V::kLanes;  // of a direction
  static constexpr int kElements = kWords * kWordSigns;   // 1024 or 2048
  static constexpr int kDirections = 64;  // so many share the buffer; further ones follow in a second sweep
  static constexpr int kTiles = kWordSigns / (2 * V::kLanes);  // of weights, for a word
  alignas(64) uint32_t words[kDirections][kWords];
  alignas(64) uint32_t rho[kElements / 2];  // bits for stochastic rounding, two elements a word
  alignas(64) float sums[kElements];        // between two sweeps; a tile's registers one after the other
  BlockBits<kElements> mask;
};

// The words of consecutive counters, in order: 2 * V::kLanes * 2 of them in each of `n` turns.
template <class V>
ZO_APART void ordered_words(const Direction& d, uint64_t counter, int64_t n, uint32_t* to) {
  constexpr int U = SignStretch<V>::kPhilox;
  typename V::I c[U], a[U], b[U];
  ZO_EACH c[u] = V::add_counters(V::counters(counter, true), u * V::kLanes / 2);
  for (int64_t i = 0; i < n; ++i) {
    philox_tiles<V, U>(d, c, a, b);
    ZO_EACH {
      V::unpack(a[u], b[u]);
      V::store(to + 2 * V::kLanes * u, a[u]);
      V::store(to + 2 * V::kLanes * u + V::kLanes, b[u]);
      c[u] = V::add_counters(c[u], U * V::kLanes / 2);
    }
    to += U * 2 * V::kLanes;
  }
}

// Adds directions to U words' weights, from word j of the stretch on, which are `at.src` and on. First, Last: whether
// they are the first or last directions of the pass.
template <class V, DType D, bool Stochastic, MaskKind K, bool Several, bool First, bool Last, int U>
ZO_OP void add_signs(const Place& at, const Direction* d, int n, int64_t skipped, int64_t j, SignStretch<V>& stretch) {
  using Mem = Memory<V, D>;
  using F = typename V::F;
  using I = typename V::I;
  constexpr int T = SignStretch<V>::kTiles, tile = 2 * V::kLanes;
  constexpr bool masked = K != MaskKind::kNone;
  F a[U][T], b[U][T];
  for (int u = 0; u < U; ++u)
    for (int i = 0; i < T; ++i) {
      const int64_t first = (j + u) * kWordSigns + i * tile;
      if (First) {
        Mem::read(at.src + first * Mem::kBytes, a[u][i], b[u][i]);
        if (at.decay != 1.0f) {
          a[u][i] = V::mul(V::number(at.decay), a[u][i]);
          b[u][i] = V::mul(V::number(at.decay), b[u][i]);
        }
      } else {
        a[u][i] = V::as_float(V::load(stretch.sums + first));
        b[u][i] = V::as_float(V::load(stretch.sums + first + V::kLanes));
      }
    }
  const uint32_t* words = &stretch.words[0][0] + skipped + j;
  for (int k = 0; k < n; ++k, words += SignStretch<V>::kWords) {
    const float* scales = d[k].scales;
    for (int u = 0; u < U; ++u) {
      const I word = V::word(words[u]);
      for (int i = 0; i < T; ++i) {
        I x, y;
        if (Mem::kSequential) {
          x = V::shrv(word, V::load(kSignShifts.element + i * tile));
          y = V::shrv(word, V::load(kSignShifts.element + i * tile + V::kLanes));
        } else {
          x = V::shrv(word, V::load(kSignShifts.pair + i * V::kLanes));
          y = V::template shr<16>(x);
        }
        for (int r = 0; r < (Several ? d[k].n_scales : 1); ++r) {
          const F scale = V::pairs(scales + 2 * r);
          a[u][i] = V::add(a[u][i], V::pick(scale, x));
          b[u][i] = V::add(b[u][i], V::pick(scale, y));
        }
      }
    }
  }
  for (int u = 0; u < U; ++u)
    for (int i = 0; i < T; ++i) {
      const int64_t first = (j + u) * kWordSigns + i * tile;
      if (!Last) {
        V::store(stretch.sums + first, V::as_words(a[u][i]));
        V::store(stretch.sums + first + V::kLanes, V::as_words(b[u][i]));
        continue;
      }
      const char* src = at.src + first * Mem::kBytes;
      I rho_a, rho_b;
      if (Stochastic && Mem::kSequential) {
        const uint16_t* rho = reinterpret_cast<const uint16_t*>(stretch.rho) + first;
        rho_a = V::load_halves(rho);
        rho_b = V::load_halves(rho + V::kLanes);
      } else if (Stochastic) {
        const I rho = V::load(stretch.rho + first / 2);
        rho_a = V::and_(rho, V::word(0xFFFFu));
        rho_b = V::template shr<16>(rho);
      }
      typename V::M keep_a, keep_b;
      if (masked) {
        F old_a, old_b;
        Mem::read(src, old_a, old_b);
        masked_out<V, K, Mem::kSequential>(at, first, stretch.mask.bytes() + first / 8, old_a, old_b, keep_a, keep_b);
      }
      Mem::template write<Stochastic, masked>(at.dst + first * Mem::kBytes, src, a[u][i], b[u][i], rho_a, rho_b, keep_a,
                                              keep_b);
    }
}

template <class V, DType D, bool Stochastic, MaskKind K, bool Several, bool First, bool Last>
ZO_APART void sign_sweep(const Place at, const Direction* d, int n, int64_t skipped, int64_t words,
                         SignStretch<V>& stretch) {
  constexpr int U = V::kSignWords;
  int64_t j = 0;
  for (; j + U <= words; j += U) add_signs<V, D, Stochastic, K, Several, First, Last, U>(at, d, n, skipped, j, stretch);
  for (; j < words; ++j) add_signs<V, D, Stochastic, K, Several, First, Last, 1>(at, d, n, skipped, j, stretch);
}

// Elements begin .. end - 1, whose first has an index that is a multiple of 32, as is their number.
template <class V, DType D, bool Stochastic, MaskKind K, bool Several>
ZO_APART void sign_stretches(const Job& job, int64_t begin, int64_t end) {
  using Stretch = SignStretch<V>;
  constexpr int bytes = Memory<V, D>::kBytes;
  constexpr MaskKind none = MaskKind::kNone;
  const Entry& e = *job.entry;
  Stretch stretch;
  for (int64_t i = begin, elements; i < end; i += elements) {
    const uint64_t index = uint64_t(e.offset + i), counter = index >> kSignShift;
    const int64_t skipped = int64_t(index / kWordSigns) & 3;  // words of the first counter
    const int64_t most = (Stretch::kWords - skipped) * kWordSigns;
    elements = end - i < most ? end - i : most;
    const int64_t words = elements / kWordSigns;
    const Place at{static_cast<const char*>(e.src) + i * bytes, static_cast<char*>(e.dst) + i * bytes,
                   K == MaskKind::kBool ? e.mask_data + i : nullptr, e.threshold, job.decay};
    if (K == MaskKind::kBits) stretch.mask.read(e.mask_data, i, elements);
    if (Stochastic) {
      constexpr int64_t turn = 2 * Stretch::kPhilox * 2 * V::kLanes;  // elements
      ordered_words<V>(*job.rounding, index >> kSignRoundingShift, (elements + turn - 1) / turn, stretch.rho);
    }
    for (int k = 0; k < job.n_directions; k += Stretch::kDirections) {
      const int left = job.n_directions - k, n = left < Stretch::kDirections ? left : Stretch::kDirections;
      const Direction* d = job.directions + k;
      for (int w = 0; w < n; ++w) ordered_words<V>(d[w], counter, 1, stretch.words[w]);
      if (k == 0 && n == left)
        sign_sweep<V, D, Stochastic, K, Several, true, true>(at, d, n, skipped, words, stretch);
      else if (k == 0)
        sign_sweep<V, D, false, none, Several, true, false>(at, d, n, skipped, words, stretch);
      else if (n < left)
        sign_sweep<V, D, false, none, Several, false, false>(at, d, n, skipped, words, stretch);
      else
        sign_sweep<V, D, Stochastic, K, Several, false, true>(at, d, n, skipped, words, stretch);
    }
    if (K == MaskKind::kRecord) stretch.mask.write(e.mask_data, i, elements);
  }
}

}  // namespace
}  // namespace zo
