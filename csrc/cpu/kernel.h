// The kernel: a pass over a range of elements in vectors, for any instruction set V.
//
//   dst <- round(decay * src + m * sum_k scale_k * z(seed_k))      in float32, one fma a direction (docs/noise.md)
//
// A block of tiles takes two sweeps: first the words of Philox, then the normals and the sum. Together they would need
// more registers than AVX2 has; apart, each keeps the multipliers of the processor busy.
#pragma once

#include "noise.h"
#include "scalar.h"
#include "signs.h"
#include "tile.h"

namespace zo {
namespace {

constexpr int kTiles = 24;  // in a block; a multiple of every V::kPhiloxTiles

template <class V>
struct Block {
  static constexpr int kTile = 2 * V::kLanes, kElements = kTiles * kTile;
  typename V::I a[kTiles], b[kTiles];            // words of the first direction, which also give the rounding bits
  typename V::I next_a[kTiles], next_b[kTiles];  // words of another direction
  typename V::F even[kTiles], odd[kTiles];       // sums so far
  BlockBits<kElements> mask;
};

// The radius words a and the angle words b of a block's tiles.
template <class V, bool Sequential>
ZO_APART void words(const Direction& d, uint64_t counter, int64_t tiles, typename V::I* a, typename V::I* b) {
  constexpr int U = V::kPhiloxTiles;
  static_assert(kTiles % U == 0, "surplus tiles are computed and not used");
  typename V::I c[U], x[U], y[U];
  ZO_EACH c[u] = V::add_counters(V::counters(counter, Sequential), u * V::kLanes / 2);
  for (int64_t i = 0; i < tiles; i += U) {
    philox_tiles<V, U>(d, c, x, y);
    ZO_EACH a[i + u] = x[u];
    ZO_EACH b[i + u] = y[u];
    ZO_EACH c[u] = V::add_counters(c[u], U * V::kLanes / 2);
  }
}

// Adds one direction to U tiles of a block, from tile j on. First, Last: whether it is the first or last direction.
// Several: the direction has `more` scales before the last one.
template <class V, DType D, bool Stochastic, MaskKind K, bool Several, bool First, bool Last, int U>
ZO_OP void apply(const Place& at, const float* scales, int more, float scale, int64_t j, Block<V>& block) {
  using Mem = Memory<V, D>;
  using F = typename V::F;
  constexpr bool masked = K != MaskKind::kNone;
  constexpr int n = Block<V>::kTile;

  typename V::I a[U], b[U];
  ZO_EACH a[u] = First ? block.a[j + u] : block.next_a[j + u];
  ZO_EACH b[u] = First ? block.b[j + u] : block.next_b[j + u];
  F even[U], odd[U];
  box_muller_tiles<V, U>(a, b, even, odd);
  ZO_EACH {
    const int64_t i = (j + u) * n;
    const char* src = at.src + i * Mem::kBytes;
    if (Mem::kSequential) V::unpack(even[u], odd[u]);
    F t_even, t_odd;
    if (First) {
      Mem::read(src, t_even, t_odd);
      t_even = V::mul(V::number(at.decay), t_even);
      t_odd = V::mul(V::number(at.decay), t_odd);
    } else {
      t_even = block.even[j + u];
      t_odd = block.odd[j + u];
    }
    for (int r = 0; Several && r < more; ++r) {
      t_even = V::fma(V::number(scales[r]), even[u], t_even);
      t_odd = V::fma(V::number(scales[r]), odd[u], t_odd);
    }
    even[u] = V::fma(V::number(scale), even[u], t_even);
    odd[u] = V::fma(V::number(scale), odd[u], t_odd);
    if (!Last) {
      block.even[j + u] = even[u];
      block.odd[j + u] = odd[u];
      continue;
    }
    typename V::I rho_even, rho_odd;
    if (Stochastic) {
      rounding_words<V>(block.a[j + u], block.b[j + u], rho_even, rho_odd);
      if (Mem::kSequential) V::unpack(rho_even, rho_odd);
    }
    typename V::M keep_even, keep_odd;
    if (masked) {
      F w_even, w_odd;
      Mem::read(src, w_even, w_odd);
      masked_out<V, K, Mem::kSequential>(at, i, block.mask.bytes() + i / 8, w_even, w_odd, keep_even, keep_odd);
    }
    Mem::template write<Stochastic, masked>(at.dst + i * Mem::kBytes, src, even[u], odd[u], rho_even, rho_odd,
                                            keep_even, keep_odd);
  }
}

template <class V, DType D, bool Stochastic, MaskKind K, bool Several, bool First, bool Last>
ZO_APART void sweep(const Place place, const float* scales, int n, int64_t tiles, Block<V>& block) {
  constexpr int U = V::kBoxMullerTiles;
  const int more = Several ? n - 1 : 0;
  const float scale = scales[more];
  int64_t j = 0;
  for (; j + U <= tiles; j += U)
    apply<V, D, Stochastic, K, Several, First, Last, U>(place, scales, more, scale, j, block);
  for (; j < tiles; ++j) apply<V, D, Stochastic, K, Several, First, Last, 1>(place, scales, more, scale, j, block);
}

// begin + offset is a multiple of 4, so that blocks hold whole counters.
template <class V, DType D, bool Stochastic, MaskKind K, bool Several = false>
void blocks(const Job& job, int64_t begin, int64_t end) {
  constexpr bool sequential = Memory<V, D>::kSequential;
  constexpr MaskKind none = MaskKind::kNone;
  constexpr int n = Block<V>::kTile, bytes = Memory<V, D>::kBytes;
  const Entry& e = *job.entry;
  const int last = job.n_directions - 1;
  Block<V> block;
  for (int64_t i = begin; i < end; i += block.kElements) {
    const int64_t tiles = (end - i < block.kElements ? end - i : block.kElements) / n;
    const uint64_t counter = uint64_t(e.offset + i) >> 2;
    const Place place = place_of<K>(job, i, bytes);
    if (K == MaskKind::kBits) block.mask.read(e.mask_data, i, tiles * n);
    // Philox touches no memory, so the weights are fetched while it runs.
    _Pragma("GCC unroll 8") for (int64_t line = 0; line < tiles * n * bytes; line += 64)
        __builtin_prefetch(place.src + line, 1);
    const Direction* d = job.directions;
    const auto scales = [&](int k) { return d[k].scales; };
    const auto n_scales = [&](int k) { return Several ? d[k].n_scales : 1; };
    words<V, sequential>(*d, counter, tiles, block.a, block.b);
    if (last == 0) {
      sweep<V, D, Stochastic, K, Several, true, true>(place, scales(0), n_scales(0), tiles, block);
    } else {
      sweep<V, D, false, none, Several, true, false>(place, scales(0), n_scales(0), tiles, block);
      for (int k = 1; k < last; ++k) {
        words<V, sequential>(d[k], counter, tiles, block.next_a, block.next_b);
        sweep<V, D, false, none, Several, false, false>(place, scales(k), n_scales(k), tiles, block);
      }
      words<V, sequential>(d[last], counter, tiles, block.next_a, block.next_b);
      sweep<V, D, Stochastic, K, Several, false, true>(place, scales(last), n_scales(last), tiles, block);
    }
    if (K == MaskKind::kRecord) block.mask.write(e.mask_data, i, tiles * n);
  }
}

template <class V, DType D, bool Stochastic, MaskKind K, bool Several = false>
void blocks_of(const Job& job, int64_t begin, int64_t end) {
  job.distribution == Distribution::kNormal ? blocks<V, D, Stochastic, K, Several>(job, begin, end)
                                            : sign_stretches<V, D, Stochastic, K>(job, begin, end);
}

template <class V, DType D, bool Stochastic>
void dispatch(const Job& job, int64_t begin, int64_t end) {
  switch (job.entry->mask) {
    case MaskKind::kNone:
      if (D == DType::kFloat32 && job.several)
        return blocks_of<V, D, Stochastic, MaskKind::kNone, true>(job, begin, end);
      return blocks_of<V, D, Stochastic, MaskKind::kNone>(job, begin, end);
    case MaskKind::kThreshold:
      return blocks_of<V, D, Stochastic, MaskKind::kThreshold>(job, begin, end);
    case MaskKind::kBool:
      return blocks_of<V, D, Stochastic, MaskKind::kBool>(job, begin, end);
    case MaskKind::kBits:
      return blocks_of<V, D, Stochastic, MaskKind::kBits>(job, begin, end);
    case MaskKind::kRecord:
      return blocks_of<V, D, Stochastic, MaskKind::kRecord>(job, begin, end);
  }
}

// The whole range: single elements up to the first of a counter, or of a word of signs; whole tiles; and single
// elements to the end.
template <class V>
void range(const Job& job, int64_t begin, int64_t end) {
  const bool signs = job.distribution == Distribution::kRademacher;
  const int64_t head = -(job.entry->offset + begin) & (signs ? 31 : 3);
  const int64_t first = begin + (head < end - begin ? head : end - begin);
  const int64_t past = end - (end - first) % (signs ? 32 : Block<V>::kTile);
  scalar_range(job, begin, first);
  if (first < past) {
    switch (job.entry->dtype) {
      case DType::kFloat32:
        dispatch<V, DType::kFloat32, false>(job, first, past);
        break;
      case DType::kBFloat16:
        job.stochastic ? dispatch<V, DType::kBFloat16, true>(job, first, past)
                       : dispatch<V, DType::kBFloat16, false>(job, first, past);
        break;
      case DType::kFloat16:
        job.stochastic ? dispatch<V, DType::kFloat16, true>(job, first, past)
                       : dispatch<V, DType::kFloat16, false>(job, first, past);
        break;
    }
  }
  scalar_range(job, past, end);
}

}  // namespace
}  // namespace zo
