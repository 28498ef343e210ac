// Signs for the threads of a block: the words of a warp's counters are made once, and shared.
//
// A warp has 512 elements of a block, so four counters of signs for each direction. Each of its 32 lanes makes the
// words of one counter of one of eight directions, and puts them where all of them can read; without that, 16 lanes
// would make the same words.
#pragma once

#include "block.h"

namespace zo {

constexpr int kLanes = 32;                                        // of a warp
constexpr int kWarpCounters = kLanes * kPerThread >> kSignShift;  // of a warp and direction
constexpr int kTogether = kLanes / kWarpCounters;                 // directions whose words are shared
static_assert(kWarpCounters * kTogether == kLanes, "each lane makes the words of one counter");

// Of the elements that a thread has in a block, so many stand side by side: a span. Span s of thread t begins at
// element (t + kThreads * s) * kSpan of the block; so a warp's span covers kSpanCounters counters.
template <DType D, MaskKind M>
constexpr int kSpan = D == DType::kFloat32 && !kTwoRows<D, M> ? 4 : 8;
template <DType D, MaskKind M>
constexpr int kSpanCounters = kLanes * kSpan<D, M> >> kSignShift;
template <DType D, MaskKind M>
constexpr int kSpans = kPerThread / kSpan<D, M>;

// What a warp shares. Word w of direction j is x[j][w], for its counters side by side as a lane needs them. Lanes write
// at the same time: with rows of 20 words, to different banks.
struct alignas(16) Shared {
  uint32_t x[kTogether][5][kWarpCounters];
  float scales[kTogether];
};

// What a lane makes words with: the keys and the scale of its one of directions k .. k + kTogether - 1.
struct LaneKeys {
  BlockKeys keys;
  float scale;
};

// `high` is the high half of the chunk's counters.
ZO_FN LaneKeys lane_keys(const Task& task, int k, int lane, uint32_t high) {
  const int own = k + lane / kWarpCounters, last = task.directions - 1;
  const int direction = own < last ? own : last;  // what is made for those beyond the last one is not used
  const uint64_t seed = read(task.seeds + direction);
  return {pinned(block_keys(seed, task.entry.param_id, high, kSignStream)), read(task.scales + direction)};
}

// Makes what a lane shares; `low` is the low half of the block's first counter.
template <DType D, MaskKind M>
ZO_FN void put_words(Shared& shared, const LaneKeys& own, uint32_t low, int warp, int lane) {
  const int which = lane / kWarpCounters, place = lane % kWarpCounters;
  const int span = place % kSpans<D, M>, part = place / kSpans<D, M>;
  const int counter = (span * (kThreads / kLanes) + warp) * kSpanCounters<D, M> + part;  // of the block
  const Words x = block_words(low + uint32_t(counter), own.keys);
  ZO_UNROLL
  for (int w = 0; w < 4; ++w) shared.x[which][w][place] = x.x[w];
  shared.scales[which] = own.scale;
}

// Lets the lanes of a warp make the words of directions k .. k + kTogether - 1, each with its `own` keys.
template <DType D, MaskKind M>
ZO_FN void share_words(Shared& shared, const Task& task, int k, const LaneKeys& own, uint32_t low, uint32_t high,
                       int warp, int lane) {
#if defined(__CUDA_ARCH__)
  __syncwarp();  // all have read the words before
  put_words<D, M>(shared, own, low, warp, lane);
  __syncwarp();
#else
  for (int i = 0; i < kLanes; ++i) put_words<D, M>(shared, i == lane ? own : lane_keys(task, k, i, high), low, warp, i);
#endif
}

// t += scale * z of one direction, from a lane's words of it, one a span. `shift` brings the bits of a span's even
// elements to bit 8 and those of the odd ones to bit 24: bits in order from there a GPU moves to predicates together.
template <DType D, MaskKind M>
ZO_FN void add_direction(const uint32_t* words, int shift, float scale, float* t) {
  ZO_UNROLL
  for (int span = 0; span < kSpans<D, M>; ++span) {
    const uint32_t x = rotated(words[span], shift);
    ZO_UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      ZO_UNROLL
      for (int i = 0; i < kSpan<D, M> / 2; ++i) {
        float& to = t[span * kSpan<D, M> + 2 * i + odd];
        to = add32(to, x & 1u << (8 + 16 * odd + i) ? -scale : scale);
      }
    }
  }
}

// t += sum_k scale_k * z_k for a thread's part of a block. All threads of the warp come here together.
//
// Args:
//   keys: of the thread's lane and k = 0.
//   low, high: the halves of the block's first counter.
template <DType D, MaskKind M>
ZO_FN void add_signs(const Task& task, const LaneKeys& keys, uint32_t low, uint32_t high, int thread, float* t) {
  const int warp = thread / kLanes, lane = thread % kLanes;
#if defined(__CUDA_ARCH__)
  __shared__ Shared of_warps[kThreads / kLanes];
  Shared& shared = of_warps[warp];
#else
  Shared shared;
#endif
  // The lane's first element, counted from where its part of a counter's elements begins.
  const int first = lane * kSpan<D, M>, at = first % (1 << kSignShift), shift = 8 - at % 32 / 2;
  const uint32_t* words = &shared.x[0][at / 32][(first >> kSignShift) * kSpans<D, M>];
  constexpr int kStride = sizeof(shared.x[0]) / 4;
  share_words<D, M>(shared, task, 0, keys, low, high, warp, lane);
  for (int k = 0;;) {
    const int count = task.directions - k;
    if (count >= kTogether) {  // nothing but the work itself: a further direction costs the least here
      ZO_UNROLL
      for (int j = 0; j < kTogether; ++j) add_direction<D, M>(words + j * kStride, shift, shared.scales[j], t);
    } else {
      ZO_NO_UNROLL
      for (int j = 0; j < count; ++j) add_direction<D, M>(words + j * kStride, shift, shared.scales[j], t);
    }
    if ((k += kTogether) >= task.directions) break;
    share_words<D, M>(shared, task, k, lane_keys(task, k, lane, high), low, high, warp, lane);
  }
}

// rho of the eight elements of a counter, from its words.
ZO_FN void rounding_bits(const Words& x, uint32_t* rho) {
  ZO_UNROLL
  for (int i = 0; i < 8; ++i) rho[i] = sign_rounding_bits(x.x[i / 2], i);
}

// Word `which` % 4.
ZO_FN uint32_t word_of(const Words& x, uint64_t which) {
  return which & 2 ? (which & 1 ? x.x[3] : x.x[2]) : (which & 1 ? x.x[1] : x.x[0]);
}

// t += scale * z for the four elements from `index` on, a multiple of four.
ZO_FN void add_signs_at(uint64_t index, uint64_t seed, uint32_t param_id, float scale, float* t) {
  const uint32_t x = word_of(noise_words(index >> kSignShift, param_id, seed, kSignStream), index >> 5);
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) t[i] = add32(t[i], from_bits(to_bits(scale) ^ sign_bit(x, int64_t(index) + i)));
}

// rho of the four elements from `index` on, a multiple of four.
ZO_FN void rounding_bits_at(uint64_t index, uint64_t seed, uint32_t param_id, uint32_t* rho) {
  const Words x = noise_words(index >> kSignRoundingShift, param_id, seed, kSignRoundingStream);
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) rho[i] = sign_rounding_bits(word_of(x, (index + i) >> 1), i);
}

}  // namespace zo
