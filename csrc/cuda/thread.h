// What one thread does in a pass on a GPU.
//
// This compiles for the host too: tests/emulation/cuda.cpp runs it there, thread by thread.
#pragma once

#include "mask.h"
#include "signs.h"

namespace zo {

// t = decay * row, in float32.
template <DType D, bool DECAY>
ZO_FN void widened(const Row& row, float decay, float* t) {
  widen_row<D>(row, t);
  if (DECAY) {
    ZO_UNROLL
    for (int i = 0; i < kRowElements<D>; ++i) t[i] = mul32(decay, t[i]);
  }
}

// t += scale * z for the four elements of a counter.
ZO_FN void add_normals(const Words& x, float scale, float* t) {
  float z[4];
  block_normals(x.x[0], x.x[1], z[0], z[1]);
  block_normals(x.x[2], x.x[3], z[2], z[3]);
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) t[i] = fma32(scale, z[i], t[i]);
}

// A row before the pass changes it: its weights, and its part of a mask that is read.
template <DType D>
struct Loaded {
  Row weights;
  uint32_t mask[D == DType::kFloat32 ? 1 : 2];
};

template <DType D, MaskKind M>
ZO_FN Loaded<D> load(const char* src, const uint8_t* mask, int64_t element) {
  Loaded<D> row = {load_row(src), {}};
  if (M == MaskKind::kBool) {
    row.mask[0] = reinterpret_cast<const uint32_t*>(mask + element)[0];
    if (D != DType::kFloat32) row.mask[kRowElements<D> / 8] = reinterpret_cast<const uint32_t*>(mask + element)[1];
  }
  if (M == MaskKind::kBits) row.mask[0] = mask[element >> 3];
  return row;
}

// Which elements of a row the pass changes.
template <DType D, MaskKind M>
ZO_FN Keep row_keep(const Loaded<D>& row, int64_t element, uint32_t threshold) {
  if (M == MaskKind::kBool) {
    const uint32_t low = nonzero_bytes(row.mask[0]);
    Keep keep;
    if (D == DType::kFloat32) {
      ZO_UNROLL
      for (int i = 0; i < 4; ++i) keep.x[i] = (low >> (8 * i + 7) & 1u) ? ~0u : 0u;
    } else {
      spread(low, keep.x[0], keep.x[1]);
      spread(nonzero_bytes(row.mask[kRowElements<D> / 8]), keep.x[2], keep.x[3]);
    }
    return keep;
  }
  if (M == MaskKind::kBits) return keep_bits<D>(D == DType::kFloat32 ? row.mask[0] >> (element & 4) : row.mask[0]);
  return keep_within<D>(row.weights, threshold);
}

// t = decay * old + the noise of a thread's part of a block, and rho for it.
//
// Args:
//   keys, low: of the first direction, and the thread's first counter.
//   high: the high half of all counters.
template <DType D, MaskKind M, bool STOCHASTIC, bool DECAY>
ZO_FN void with_normals(const Task& task, const Loaded<D>* old, const BlockKeys& keys, float scale, uint32_t low,
                        uint32_t high, float* t, uint32_t* rho) {
  constexpr int kElements = kRowElements<D>, kCounters = kElements / 4, kRows = kPerThread / kElements;
  ZO_UNROLL
  for (int i = 0; i < kRows; ++i) {
    widened<D, DECAY>(old[i].weights, task.decay, t + i * kElements);
    ZO_UNROLL
    for (int j = 0; j < kCounters; ++j) {
      const Words x = block_words(low + uint32_t(row_step<D, M>(i) * kCounters + j), keys);
      const int at = i * kElements + 4 * j;
      add_normals(x, scale, t + at);
      if (STOCHASTIC) {
        block_rounding_bits(x.x[0], x.x[1], rho[at], rho[at + 1]);
        block_rounding_bits(x.x[2], x.x[3], rho[at + 2], rho[at + 3]);
      }
    }
  }
  for (int k = 1; k < task.directions; ++k) {
    const BlockKeys further = block_keys(read(task.seeds + k), task.entry.param_id, high);
    const float by = read(task.scales + k);
    ZO_UNROLL
    for (int i = 0; i < kRows * kCounters; ++i) {
      const uint32_t step = row_step<D, M>(i / kCounters) * kCounters + i % kCounters;
      add_normals(block_words(low + step, further), by, t + 4 * i);
    }
  }
}

// Blocks first .. last - 1 of the chunk that starts at element `begin`; all of them lie whole in the tensor.
template <Distribution Z, DType D, MaskKind M, bool STOCHASTIC, bool DECAY>
ZO_FN void whole_blocks(const Task& task, int64_t begin, int first, int last, int thread) {
  constexpr bool kNormals = Z == Distribution::kNormal;
  constexpr int kElements = kRowElements<D>, kBytes = kElementBytes<D>, kRows = kPerThread / kElements;
  // Signs take little time to hide the loads behind; without a mask, nothing needs the old weights once they are
  // widened.
  constexpr bool kLoadsAtOnce = !kNormals && M == MaskKind::kNone;
  // The words that a thread makes for itself: of the first direction's normals, or of the bits that round under signs.
  constexpr int kShift = kNormals ? kNormalShift : kSignRoundingShift;
  const uint64_t index = uint64_t(begin + task.entry.offset), counter = index >> kShift;
  const uint32_t high = uint32_t(counter >> 32);  // the same in the whole chunk
  // A zero that ptxas takes for a different number in each thread. Otherwise it would keep the keys in uniform
  // registers, which are few, and compute them again for each block.
  const uint64_t zero = thread & task.entry.zero;
  BlockKeys keys;
  if (kNormals || STOCHASTIC)
    keys = pinned(
        block_keys(read(task.seeds) ^ zero, task.entry.param_id, high, kNormals ? kNormalStream : kSignRoundingStream));
  const uint32_t sign_high = uint32_t(index >> kSignShift >> 32);
  LaneKeys own;
  if (!kNormals) own = lane_keys(task, 0, thread % kLanes, sign_high);
  const float scale = read(task.scales);
  const uint32_t threshold = row_threshold<D>(task.entry.threshold);

  int64_t element = begin + int64_t(first) * kBlock + first_row<D, M>(thread) * kElements;
  uint32_t low =
      uint32_t(counter) + uint32_t(first * (kBlock >> kShift) + (first_row<D, M>(thread) * kElements >> kShift));
  const char* src = static_cast<const char*>(task.entry.src) + element * kBytes;
  char* dst = static_cast<char*>(task.entry.dst) + element * kBytes;
  Loaded<D> old[kRows];
  const auto load_all = [&]() {
    ZO_UNROLL
    for (int i = 0; i < kRows; ++i)
      old[i] = load<D, M>(src + row_step<D, M>(i) * 16, task.entry.mask, element + row_step<D, M>(i) * kElements);
  };
  const auto load_next = [&](bool there_is_one) {
    src += kBlock * kBytes;
    element += kBlock;
    if (there_is_one) load_all();
  };
  if (first < last) load_all();
  for (int block = first; block < last; ++block) {
    float t[kPerThread];
    uint32_t rho[kPerThread];
    if constexpr (kNormals) {
      with_normals<D, M, STOCHASTIC, DECAY>(task, old, keys, scale, low, high, t, rho);
    } else {
      ZO_UNROLL
      for (int i = 0; i < kRows; ++i) widened<D, DECAY>(old[i].weights, task.decay, t + i * kElements);
      if (kLoadsAtOnce) load_next(block + 1 < last);
      const uint32_t sign_low = uint32_t(index >> kSignShift) + uint32_t(block * (kBlock >> kSignShift));
      add_signs<D, M>(task, own, sign_low, sign_high, thread, t);
      if (STOCHASTIC) {
        ZO_UNROLL
        for (int i = 0; i < kRows; ++i)
          rounding_bits(block_words(low + uint32_t(row_step<D, M>(i)), keys), rho + i * kElements);
      }
    }
    uint32_t byte = 0;
    Row fresh[kRows];
    ZO_UNROLL
    for (int i = 0; i < kRows; ++i) {
      Row& row = fresh[i];
      row = round_row<D, STOCHASTIC>(t + i * kElements, rho + i * kElements);
      if (M != MaskKind::kNone) {
        const int64_t at = element + row_step<D, M>(i) * kElements;
        const Keep keep = row_keep<D, M>(old[i], at, threshold);
        row = blend<D>(keep, row, old[i].weights);
        if (M == MaskKind::kRecord) {
          const uint32_t bits = bits_of<D>(keep);
          byte = kTwoRows<D, M> && i % 2 ? byte | bits << 4 : bits;
          if (!kTwoRows<D, M> || i % 2) task.entry.mask[at >> 3] = uint8_t(byte);
        }
      }
    }
    // The next block's weights are loaded while its noise is made.
    if (!kLoadsAtOnce) load_next(block + 1 < last);
    ZO_UNROLL
    for (int i = 0; i < kRows; ++i) store_row(dst + row_step<D, M>(i) * 16, fresh[i]);
    dst += kBlock * kBytes;
    low += kBlock >> kShift;
  }
}

// Whether the pass changes element i, whose value is w.
template <MaskKind M>
ZO_FN bool keeps(const TableRow& entry, int64_t i, float w) {
  switch (M) {
    case MaskKind::kNone:
      return true;
    case MaskKind::kBool:
      return entry.mask[i] != 0;
    case MaskKind::kBits:
      return entry.mask[i >> 3] >> (i & 7) & 1;
    default:
      return std::fabs(w) <= entry.threshold;
  }
}

template <DType D>
ZO_FN uint32_t load_bits(const void* p, int64_t i) {
  return D == DType::kFloat32 ? static_cast<const uint32_t*>(p)[i] : static_cast<const uint16_t*>(p)[i];
}

template <DType D>
ZO_FN void store_bits(void* p, int64_t i, uint32_t bits) {
  if (D == DType::kFloat32)
    static_cast<uint32_t*>(p)[i] = bits;
  else
    static_cast<uint16_t*>(p)[i] = uint16_t(bits);
}

template <DType D>
ZO_FN float widen_bits(uint32_t bits) {
  if (D == DType::kFloat32) return from_bits(bits);
  float even, odd;
  widen_pair<D>(bits, even, odd);
  return even;
}

// Rounds, masks and stores elements i and i + 1, of which one may lie outside the tensor. Returns their mask bits.
template <DType D, MaskKind M, bool STOCHASTIC>
ZO_FN uint32_t finish_pair(const TableRow& entry, int64_t i, const float* t, const uint32_t* rho) {
  uint32_t fresh[2] = {to_bits(t[0]), to_bits(t[1])}, kept = 0;
  if (D != DType::kFloat32) {
    const uint32_t pair = STOCHASTIC ? pair_stochastic<D>(t[0], t[1], rho[0], rho[1]) : pair_nearest<D>(t[0], t[1]);
    fresh[0] = pair;
    fresh[1] = pair >> 16;
  }
  ZO_UNROLL
  for (int j = 0; j < 2; ++j) {
    if (i + j < 0 || i + j >= entry.numel) continue;
    const uint32_t old = load_bits<D>(entry.src, i + j);
    const bool keep = keeps<M>(entry, i + j, widen_bits<D>(old));
    store_bits<D>(entry.dst, i + j, keep ? fresh[j] : old);
    kept |= uint32_t(keep) << j;
  }
  return kept;
}

// Eight elements of a block that sticks out of the tensor, or of a tensor that whole rows do not cover. Their mask bits
// fill a byte.
template <Distribution Z, DType D, MaskKind M, bool STOCHASTIC, bool DECAY>
ZO_FN void edge_byte(const Task& task, int64_t element) {
  const TableRow& entry = task.entry;
  if (element + 8 <= 0 || element >= entry.numel) return;
  uint32_t byte = 0;
  for (int half = 0; half < 8; half += 4) {
    const uint64_t index = uint64_t(element + entry.offset) + half;
    float t[4];
    uint32_t rho[4] = {0, 0, 0, 0};
    ZO_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t at = element + half + i;
      t[i] = at < 0 || at >= entry.numel ? 0.0f : widen_bits<D>(load_bits<D>(entry.src, at));
      if (DECAY) t[i] = mul32(task.decay, t[i]);
    }
    for (int k = 0; k < task.directions; ++k) {
      const uint64_t seed = read(task.seeds + k);
      const float scale = read(task.scales + k);
      if (Z == Distribution::kRademacher) {
        add_signs_at(index, seed, entry.param_id, scale, t);
        if (STOCHASTIC && k == 0) rounding_bits_at(index, seed, entry.param_id, rho);
        continue;
      }
      const uint64_t counter = index >> kNormalShift;
      const Words x = block_words(uint32_t(counter), block_keys(seed, entry.param_id, uint32_t(counter >> 32)));
      add_normals(x, scale, t);
      if (STOCHASTIC && k == 0) {
        block_rounding_bits(x.x[0], x.x[1], rho[0], rho[1]);
        block_rounding_bits(x.x[2], x.x[3], rho[2], rho[3]);
      }
    }
    ZO_UNROLL
    for (int i = 0; i < 4; i += 2)
      byte |= finish_pair<D, M, STOCHASTIC>(entry, element + half + i, t + i, rho + i) << (half + i);
  }
  if (M == MaskKind::kRecord) entry.mask[element >> 3] = uint8_t(byte);
}

// Finds the chunk's entry in the table; sets `begin` to where the chunk starts in it, negative if it sticks out.
ZO_FN Task find_task(const Work& work, const Coefficients& c, int chunk, int64_t& begin) {
  int low = 0, high = work.active;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (read(work.first_chunk + middle) <= chunk ? low : high) = middle;
  }
  TableRow entry = work.rows[read(work.ids + low)];
  entry.dst = global(entry.dst);
  entry.src = global(entry.src);
  entry.mask = global(entry.mask);
  const int64_t size = int64_t(kBlock) * work.blocks_per_chunk;  // a power of two
  const int64_t place = chunk - read(work.first_chunk + low);
  begin = place * size - (entry.offset & (size - 1));
  return {entry, c.seeds, c.scales + int64_t(entry.group) * c.directions, c.directions, read(c.decays + entry.group)};
}

// A thread's part of one chunk.
template <Distribution Z, DType D, MaskKind M, bool STOCHASTIC, bool DECAY>
ZO_FN void axpy_thread(const Work& work, const Coefficients& c, int chunk, int thread) {
  int64_t begin;
  const Task task = find_task(work, c, chunk, begin);
  const TableRow& entry = task.entry;
  // first .. last - 1: the blocks that touch the tensor; whole .. whole_end - 1: those that lie whole in it.
  const int64_t room = int64_t(kBlock) * work.blocks_per_chunk;
  const int64_t end = entry.numel - begin < room ? entry.numel - begin : room, skip = begin < 0 ? -begin : 0;
  const int first = int(skip / kBlock), last = int((end + kBlock - 1) / kBlock);
  int whole = int((skip + kBlock - 1) / kBlock), whole_end = int(end / kBlock);
  bool rows = entry.flags & 1;
  if (M == MaskKind::kThreshold || M == MaskKind::kRecord) rows = rows && row_comparable<D>(entry.threshold);
  if (!rows || whole_end < whole) whole = whole_end = last;

  for (int block = first; block < last; ++block) {
    if (block == whole) block = whole_end;
    if (block == last) break;
    for (int i = thread * 8; i < kBlock; i += kThreads * 8)
      edge_byte<Z, D, M, STOCHASTIC, DECAY>(task, begin + int64_t(block) * kBlock + i);
  }
  whole_blocks<Z, D, M, STOCHASTIC, DECAY>(task, begin, whole, whole_end, thread);
}

// Writes one byte of mask bits, for up to eight elements. For tensors whose bytes would be shared by two blocks of a
// pass, so that the bits are written by a launch of their own.
template <DType D>
ZO_FN void record_byte(const void* src, uint8_t* mask, float threshold, int64_t numel, int64_t byte) {
  uint32_t bits = 0;
  for (int i = 0; i < 8 && 8 * byte + i < numel; ++i)
    bits |= uint32_t(std::fabs(widen_bits<D>(load_bits<D>(src, 8 * byte + i))) <= threshold) << i;
  mask[byte] = uint8_t(bits);
}

}  // namespace zo
