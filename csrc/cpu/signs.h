// A pass of signs over a range of elements in vectors, for any instruction set V (docs/noise.md, 8).
//
//   dst <- round(decay * src + m * sum_k (+-)scale_k)      in float32, one addition a direction
//
// A word of Philox serves 32 elements. The words of a stretch of elements are made first, for as many directions as fit
// into the L1 cache; then one sweep loads some elements, adds every direction to them in registers, rounds them and
// stores them.
#pragma once

#include "noise.h"
#include "scalar.h"
#include "tile.h"

namespace zo {
namespace {

constexpr int kStretch = 2048;     // elements, of whole counters
constexpr int kMostTogether = 32;  // directions whose words are made before a sweep: 8 KiB, and as much for their keys

struct Stretch {
  alignas(64) uint32_t words[kMostTogether][kStretch / 32];
  alignas(64) uint32_t rounding[kStretch / 2];
  alignas(64) float sums[kStretch];  // so far, if there are more directions
  BlockBits<kStretch> mask;
};

// What is added to an element whose sign bit is 0, and whose is 1.
struct alignas(8) Scale {
  float of_bit[2];
};

// The directions that a sweep adds.
struct Together {
  int n;
  bool first, last;  // whether the first and the last of all directions are among them
  const uint32_t* words[kMostTogether];
  Scale scales[kMostTogether];
};

// A single direction, in registers: stores to dst might change `Together`, as far as a compiler knows.
struct Only {
  const uint32_t* words;
  Scale scale;
};

template <class V, int U>
ZO_OP void words_of_tiles(const Direction& d, uint64_t counter, uint32_t* out) {
  typename V::I c[U], a[U], b[U];
  ZO_EACH c[u] = V::add_counters(V::counters(counter, true), u * V::kLanes / 2);
  philox_tiles<V, U>(d, c, a, b);
  ZO_EACH {
    V::unpack(a[u], b[u]);
    V::store(out + 2 * u * V::kLanes, a[u]);
    V::store(out + (2 * u + 1) * V::kLanes, b[u]);
  }
}

// Writes the four words of each counter in their order, in whole vectors.
template <class V>
ZO_APART void ordered_words(const Direction& d, uint64_t counter, int64_t counters, uint32_t* out) {
  constexpr int n = V::kLanes / 2;  // counters of a tile
  static_assert(kStretch / 128 % (2 * n) == 0, "surplus words are computed and not used");
  int64_t i = 0;
  for (; counters - i > n; i += 2 * n) words_of_tiles<V, 2>(d, counter + uint64_t(i), out + 4 * i);
  if (i < counters) words_of_tiles<V, 1>(d, counter + uint64_t(i), out + 4 * i);
}

// The bit of a word that has the sign of an element: for the registers that hold the
// 32 elements of a word, two for each tile.
template <class V, bool Sequential>
struct Shifts {
  static constexpr int kRegisters = 32 / V::kLanes;
  alignas(64) uint32_t x[kRegisters][V::kLanes];
  constexpr Shifts() : x() {
    for (int r = 0; r < kRegisters; ++r)
      for (int lane = 0; lane < V::kLanes; ++lane) {
        const int i = Sequential ? r * V::kLanes + lane : 2 * (r / 2 * V::kLanes + lane) + r % 2;
        x[r][lane] = uint32_t(i / 2 + 16 * (i % 2));
      }
  }
};

// The 16 random bits of stochastic rounding of a tile, in the low halves.
template <class V, bool Sequential>
ZO_OP void rounding_pairs(const uint32_t* words, typename V::I& a, typename V::I& b) {
  if (Sequential) {
    a = V::load_halves(words);
    b = V::load_halves(words + V::kLanes / 2);
  } else {
    const typename V::I pairs = V::load(words);
    a = V::and_(pairs, V::word(0xFFFFu));
    b = V::template shr<16>(pairs);
  }
}

// Adds directions to the elements of W words, from element i of a stretch on. Plain: one direction, no decay.
template <class V, DType D, bool Stochastic, MaskKind K, bool Plain, int W>
ZO_OP void apply_signs(const Place& at, const Together& together, const Only& only, int64_t i, Stretch& stretch) {
  using Mem = Memory<V, D>;
  using F = typename V::F;
  using I = typename V::I;
  constexpr bool masked = K != MaskKind::kNone;
  constexpr int tile = 2 * V::kLanes, tiles = W * 32 / tile, registers = 32 / V::kLanes;
  static constexpr Shifts<V, Mem::kSequential> shifts;

  const char* src = at.src + i * Mem::kBytes;
  F t[2 * tiles];
  _Pragma("GCC unroll 16") for (int j = 0; j < tiles; ++j) {
    if (Plain || together.first) {
      Mem::read(src + j * tile * Mem::kBytes, t[2 * j], t[2 * j + 1]);
      if (!Plain) {
        t[2 * j] = V::mul(V::number(at.decay), t[2 * j]);
        t[2 * j + 1] = V::mul(V::number(at.decay), t[2 * j + 1]);
      }
    } else {
      t[2 * j] = V::as_float(V::load(stretch.sums + i + j * tile));
      t[2 * j + 1] = V::as_float(V::load(stretch.sums + i + j * tile + V::kLanes));
    }
  }
  const int n = Plain ? 1 : together.n;
  for (int k = 0; k < n; ++k) {
    const uint32_t* words = (Plain ? only.words : together.words[k]) + i / 32;
    const F scale = V::pair(Plain ? only.scale.of_bit : together.scales[k].of_bit);
    _Pragma("GCC unroll 16") for (int r = 0; r < 2 * tiles; ++r) {
      const I bit = V::shrv(V::word(words[r / registers]), V::load(shifts.x[r % registers]));
      t[r] = V::add(t[r], V::of_pair(scale, bit));
    }
  }
  _Pragma("GCC unroll 16") for (int j = 0; j < tiles; ++j) {
    const int64_t first = i + j * tile;
    if (!Plain && !together.last) {
      V::store(stretch.sums + first, V::as_words(t[2 * j]));
      V::store(stretch.sums + first + V::kLanes, V::as_words(t[2 * j + 1]));
      continue;
    }
    const char* const from = src + j * tile * Mem::kBytes;
    I rho_even, rho_odd;
    if (Stochastic) rounding_pairs<V, Mem::kSequential>(stretch.rounding + first / 2, rho_even, rho_odd);
    typename V::M keep_even, keep_odd;
    if (masked) {
      F even, odd;
      Mem::read(from, even, odd);
      masked_out<V, K, Mem::kSequential>(at, first, stretch.mask.bytes() + first / 8, even, odd, keep_even, keep_odd);
    }
    Mem::template write<Stochastic, masked>(at.dst + first * Mem::kBytes, from, t[2 * j], t[2 * j + 1], rho_even,
                                            rho_odd, keep_even, keep_odd);
  }
}

template <class V, DType D, bool Stochastic, MaskKind K, bool Plain>
ZO_APART void sweep_signs(const Place at, const Together& together, int64_t n, Stretch& stretch) {
  constexpr int W = V::kSignWords;
  const Only only{together.words[0], together.scales[0]};
  int64_t i = 0;
  for (; i + 32 * W <= n; i += 32 * W) apply_signs<V, D, Stochastic, K, Plain, W>(at, together, only, i, stretch);
  for (; W > 1 && i < n; i += 32) apply_signs<V, D, Stochastic, K, Plain, 1>(at, together, only, i, stretch);
}

// begin + offset and end + offset are multiples of 32, so that stretches hold whole words.
template <class V, DType D, bool Stochastic, MaskKind K>
void sign_stretches(const Job& job, int64_t begin, int64_t end) {
  constexpr int bytes = Memory<V, D>::kBytes;
  const Entry& e = *job.entry;
  const bool plain = job.n_directions == 1 && job.decay == 1.0f;
  Stretch stretch;
  Together together;
  for (int64_t i = begin, n; i < end; i += n) {
    const int64_t index = e.offset + i, skip = index / 32 % 4;  // words of the first counter
    n = end - i < kStretch - 32 * skip ? end - i : kStretch - 32 * skip;
    const int64_t counters = (skip + n / 32 + 3) / 4;
    const Place at = place_of<K>(job, i, bytes);
    if (K == MaskKind::kBits) stretch.mask.read(e.mask_data, i, n);
    if (Stochastic) ordered_words<V>(*job.rounding, uint64_t(index) >> kSignRoundingShift, n / 8, stretch.rounding);
    for (int first = 0; first < job.n_directions; first += together.n) {
      const Direction* d = job.directions + first;
      const int left = job.n_directions - first;
      together.n = left < kMostTogether ? left : kMostTogether;
      together.first = first == 0;
      together.last = left == together.n;
      for (int k = 0; k < together.n; ++k) {
        const bool again = k > 0 && d[k].seed == d[k - 1].seed;
        if (!again) ordered_words<V>(d[k], uint64_t(index) >> kSignShift, counters, stretch.words[k]);
        together.words[k] = again ? together.words[k - 1] : stretch.words[k] + skip;
        together.scales[k] = {{*d[k].scales, -*d[k].scales}};
      }
      if (plain)
        sweep_signs<V, D, Stochastic, K, true>(at, together, n, stretch);
      else
        sweep_signs<V, D, Stochastic, K, false>(at, together, n, stretch);
    }
    if (K == MaskKind::kRecord) stretch.mask.write(e.mask_data, i, n);
  }
}

}  // namespace
}  // namespace zo
