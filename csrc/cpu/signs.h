// A pass of signs over a range of elements in vectors, for any instruction set V (docs/noise.md, 8).
//
//   dst <- round(decay * src + m * sum_k (+-)scale_k)      in float32, one addition a direction
//
// A word of Philox serves 32 elements. The words of a stretch of elements are made first, for as many directions as fit
// into the L1 cache; then one sweep loads some elements, adds every direction to them in registers, rounds them and
// stores them. A direction costs a register a shift, a choice between scale and -scale, and an addition. Where there
// are many, two things save some of that:
//
// - A choice may look at bit 0 or at bit 1. So registers are mixed, two and two, such that the signs of the second one
//   are the next bits of the first one's, and one shift serves both.
// - Several scales s of one seed: t + s z = z (z t + s). The elements are turned by their signs, each s is added as it
//   is, and they are turned back; in one with the turn of the next seed, by the difference of the signs.
#pragma once

#include "noise.h"
#include "scalar.h"
#include "tile.h"

namespace zo {
namespace {

constexpr int kStretch = 2048;     // elements, of whole counters
constexpr int kMostTogether = 32;  // directions whose words are made before a sweep: 8 KiB, and as much for their keys
constexpr int kAhead = 4096;       // bytes by which weights are fetched before they are needed

struct Stretch {
  alignas(64) uint32_t words[kMostTogether][kStretch / 32];
  alignas(64) uint32_t back[kStretch / 32];  // see Way::kTurned
  alignas(64) uint32_t rounding[kStretch / 2];
  alignas(64) float sums[kStretch];  // so far, if there are more directions
  BlockBits<kStretch> mask;
};

// A scale s for V::pair and V::quad, which V::chosen takes s or -s from.
struct alignas(16) Scale {
  float x[4];
  explicit Scale(float s = 0.0f) : x{s, s, -s, -s} {}
};

// How a sweep adds directions: a single one without a decay; some; so many that mixing registers pays; or some scales
// of each seed.
enum class Way { kPlain, kFew, kMany, kTurned };
constexpr int kManyDirections = 4;

// The directions that a sweep adds.
struct Together {
  int n;
  bool first, last;  // whether the first and the last of all directions are among them
  const uint32_t* words[kMostTogether];
  Scale scales[kMostTogether];
  // Way::kTurned: `words` are the differences to the words before; these are the last ones. The scales are in `turned`.
  const uint32_t* back;
  const Direction* turned;
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

// The bit of a word that has the sign of an element: for the registers that hold the 32 elements of a word, two for
// each tile; and for the first of each two registers that are mixed, whose second one has the next bit.
template <class V, bool Sequential>
struct Shifts {
  static constexpr int kRegisters = 32 / V::kLanes;
  alignas(64) uint32_t x[kRegisters][V::kLanes];
  alignas(64) uint32_t mixed[kRegisters / 2][V::kLanes];
  constexpr Shifts() : x(), mixed() {
    constexpr int n = V::kLanes;
    for (int r = 0; r < kRegisters; ++r)
      for (int lane = 0; lane < n; ++lane) x[r][lane] = bit(Sequential ? r * n + lane : 2 * (r / 2 * n + lane) + r % 2);
    for (int r = 0; r < kRegisters / 2; ++r)
      for (int lane = 0; lane < n; ++lane) {
        const int second = lane / 2 % 2 ? n : 0;  // from the second register
        mixed[r][lane] = Sequential ? bit(2 * r * n + lane / 4 * 4 + lane % 2 + second)
                                    : bit(2 * (lane / 4 * 4 + lane % 2 * 2 + second) + r);
      }
  }
  static constexpr uint32_t bit(int i) { return uint32_t(i / 2 + 16 * (i % 2)); }
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

// Adds directions to the elements of W words, from element i of a stretch on.
template <class V, DType D, bool Stochastic, MaskKind K, Way How, int W>
ZO_OP void apply_signs(const Place& at, const Together& together, const Only& only, int64_t i, Stretch& stretch) {
  using Mem = Memory<V, D>;
  using F = typename V::F;
  using I = typename V::I;
  constexpr bool masked = K != MaskKind::kNone, plain = How == Way::kPlain;
  constexpr int tile = 2 * V::kLanes, tiles = W * 32 / tile, registers = 32 / V::kLanes;
  // Registers p and p + apart are mixed: the two of a tile, or the even or the odd elements of two tiles.
  constexpr bool mixed = (How == Way::kMany || How == Way::kTurned) && (Mem::kSequential || registers == 4);
  constexpr int apart = Mem::kSequential ? 1 : 2;
  const auto first_of = [](int r) { return Mem::kSequential ? 2 * r : r / 2 * 4 + r % 2; };
  static constexpr Shifts<V, Mem::kSequential> shifts;

  const char* src = at.src + i * Mem::kBytes;
  // With so little to compute, the weights must be on their way; if there is more, those of the next stretch.
  constexpr int ahead = plain || How == Way::kFew ? kAhead : kStretch * Mem::kBytes;
  if (W > 1 && (plain || together.first))
    _Pragma("GCC unroll 8") for (int line = 0; line < W * 32 * Mem::kBytes; line += 64)
        __builtin_prefetch(src + ahead + line, 1);
  F t[2 * tiles];
  _Pragma("GCC unroll 16") for (int j = 0; j < tiles; ++j) {
    if (plain || together.first) {
      Mem::read(src + j * tile * Mem::kBytes, t[2 * j], t[2 * j + 1]);
      if (!plain) {
        t[2 * j] = V::mul(V::number(at.decay), t[2 * j]);
        t[2 * j + 1] = V::mul(V::number(at.decay), t[2 * j + 1]);
      }
    } else {
      t[2 * j] = V::as_float(V::load(stretch.sums + i + j * tile));
      t[2 * j + 1] = V::as_float(V::load(stretch.sums + i + j * tile + V::kLanes));
    }
  }
  // Calls add(register, word, next) for each register: its signs are bits 0 of `word`, or bits 1 if `next`.
  const auto each = [&](const uint32_t* words, const auto& add) {
    if constexpr (mixed) {
      _Pragma("GCC unroll 16") for (int r = 0; r < tiles; ++r) {
        const I word = V::shrv(V::word(words[2 * r / registers]), V::load(shifts.mixed[r % (registers / 2)]));
        add(t[first_of(r)], word, false);
        add(t[first_of(r) + apart], word, true);
      }
    } else {
      _Pragma("GCC unroll 16") for (int r = 0; r < 2 * tiles; ++r)
          add(t[r], V::shrv(V::word(words[r / registers]), V::load(shifts.x[r % registers])), false);
    }
  };
  if constexpr (mixed) {
    if (together.first)
      _Pragma("GCC unroll 16") for (int r = 0; r < tiles; ++r) Mem::kSequential
          ? V::mix_pairs(t[2 * r], t[2 * r + 1])
          : V::mix(t[first_of(r)], t[first_of(r) + apart]);
  }
  if (How == Way::kTurned) {
    const Scale sign(0.0f);
    const F by_0 = V::pair(sign.x), by_1 = V::quad(sign.x);
    const auto turned = [&](F& x, I word, bool next) {
      x = V::as_float(V::xor2(V::as_words(x), V::as_words(V::chosen(next ? by_1 : by_0, word))));
    };
    for (int k = 0; k < together.n; ++k) {
      each(together.words[k] + i / 32, turned);
      const Direction& d = together.turned[k];
      for (int s = 0; s < d.n_scales; ++s) {
        const F scale = V::number(d.scales[s]);
        _Pragma("GCC unroll 16") for (int r = 0; r < 2 * tiles; ++r) t[r] = V::add(t[r], scale);
      }
    }
    each(together.back + i / 32, turned);
  } else {
    for (int k = 0; k < (plain ? 1 : together.n); ++k) {
      const Scale& scale = plain ? only.scale : together.scales[k];
      const F by_0 = V::pair(scale.x), by_1 = mixed ? V::quad(scale.x) : by_0;
      each((plain ? only.words : together.words[k]) + i / 32,
           [&](F& x, I word, bool next) { x = V::add(x, V::chosen(next ? by_1 : by_0, word)); });
    }
  }
  if constexpr (mixed) {
    if (together.last)
      _Pragma("GCC unroll 16") for (int r = 0; r < tiles; ++r) Mem::kSequential
          ? V::mix_pairs(t[2 * r], t[2 * r + 1])
          : V::unpack(t[first_of(r)], t[first_of(r) + apart]);
  }
  _Pragma("GCC unroll 16") for (int j = 0; j < tiles; ++j) {
    const int64_t first = i + j * tile;
    if (!plain && !together.last) {
      V::store(stretch.sums + first, V::as_words(t[2 * j]));
      V::store(stretch.sums + first + V::kLanes, V::as_words(t[2 * j + 1]));
      continue;
    }
    if (How == Way::kTurned) {  // a sum of zero is +0, which a turn makes -0
      t[2 * j] = V::add(t[2 * j], V::number(0.0f));
      t[2 * j + 1] = V::add(t[2 * j + 1], V::number(0.0f));
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

template <class V, DType D, bool Stochastic, MaskKind K, Way How>
ZO_APART void sweep_signs(const Place at, const Together& together, int64_t n, Stretch& stretch) {
  // A turned element waits for each of its additions, so more of them are under way.
  constexpr int W = How == Way::kTurned ? V::kTurnedWords : V::kSignWords;
  const Only only{together.words[0], together.scales[0]};
  int64_t i = 0;
  for (; i + 32 * W <= n; i += 32 * W) apply_signs<V, D, Stochastic, K, How, W>(at, together, only, i, stretch);
  for (; W > 1 && i < n; i += 32) apply_signs<V, D, Stochastic, K, How, 1>(at, together, only, i, stretch);
}

// Replaces the words of each of n directions by their differences to those before, and keeps the last ones.
inline void differences(Stretch& stretch, int n) {
  memcpy(stretch.back, stretch.words[n - 1], sizeof(stretch.back));
  for (int k = n - 1; k > 0; --k)
    for (int j = 0; j < kStretch / 32; ++j) stretch.words[k][j] ^= stretch.words[k - 1][j];
}

// begin + offset and end + offset are multiples of 32, so that stretches hold whole words.
template <class V, DType D, bool Stochastic, MaskKind K>
void sign_stretches(const Job& job, int64_t begin, int64_t end) {
  constexpr int bytes = Memory<V, D>::kBytes;
  const Entry& e = *job.entry;
  constexpr bool may_turn = D == DType::kFloat32 && K == MaskKind::kNone;
  const bool plain = job.n_directions == 1 && job.decay == 1.0f && !job.several;
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
        together.scales[k] = Scale(*d[k].scales);
      }
      if (plain) {
        sweep_signs<V, D, Stochastic, K, Way::kPlain>(at, together, n, stretch);
      } else if (may_turn && job.several) {
        together.turned = d;
        together.back = stretch.back + skip;
        differences(stretch, together.n);
        sweep_signs<V, D, Stochastic, K, may_turn ? Way::kTurned : Way::kFew>(at, together, n, stretch);
      } else if (job.n_directions < kManyDirections) {
        sweep_signs<V, D, Stochastic, K, Way::kFew>(at, together, n, stretch);
      } else {
        sweep_signs<V, D, Stochastic, K, Way::kMany>(at, together, n, stretch);
      }
    }
    if (K == MaskKind::kRecord) stretch.mask.write(e.mask_data, i, n);
  }
}

}  // namespace
}  // namespace zo
