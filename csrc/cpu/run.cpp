// Launches a pass: cuts it into chunks, hands them to threads, and calls the kernel of one instruction set on each.
#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <memory>
#include <thread>

#include "table.h"

#if defined(_OPENMP) && !defined(_WIN32)
#include <unistd.h>
#endif

namespace zo {
namespace {

// Elements of a chunk. A multiple of 8, so that no two chunks share a byte of mask bits; small enough to balance the
// threads, large enough to make the cost of taking one negligible.
constexpr int64_t kChunk = 1 << 15;
constexpr int64_t kMostStaged = 1 << 20;  // at most so many elements in a chunk that is not contiguous
// The counters of elements i and j have equal high halves if i >> 34 == j >> 34: those of normals, and so those of
// signs.
constexpr int64_t kOneHigh = int64_t(1) << (kNormalShift + 32);
constexpr size_t kMostAtWork = 1024;  // threads
constexpr size_t kApart = 64;         // floats between the memory of two threads, which must not share cache lines

struct Chunk {
  const Entry* entry;
  const Layout* layout;  // null if the entry is contiguous
  int64_t begin, end;
};

// How many seeds from k on are equal. Replaying in-place steps of float32 weights repeats each seed three times: its
// noise is made once and added three times.
size_t repeats(const std::vector<uint64_t>& seeds, size_t k) {
  size_t n = 1;
  while (k + n < seeds.size() && seeds[k + n] == seeds[k]) ++n;
  return n;
}

// To float32; NaNs become the one that has a single bit set below its exponent (see bf16_high_half in tile.h).
float number(double x) { return x == x ? float(x) : std::numeric_limits<float>::quiet_NaN(); }

// A thread's own memory. It is allocated before the threads begin, so that nothing can fail once weights have changed,
// and not initialised, so that each thread is the first to touch its pages.
struct Workspace {
  std::unique_ptr<Direction[]> directions;  // and one for rounding bits
  std::unique_ptr<float[]> scales;
  std::unique_ptr<uint32_t[]> elements;  // a chunk that is not contiguous, copied
  Workspace(size_t n, int64_t staged)
      : directions(new Direction[n + 1]),
        scales(new float[n + kApart]),
        elements(staged ? new uint32_t[size_t(staged)] : nullptr) {}
};

void gather(const Layout& layout, const Entry& e, uint32_t* to, int64_t begin, int64_t end) {
  if (e.dtype == DType::kFloat32)
    copy_range(layout, &Dim::src, static_cast<const uint32_t*>(e.src), to, begin, end);
  else
    copy_range(layout, &Dim::src, static_cast<const uint16_t*>(e.src), reinterpret_cast<uint16_t*>(to), begin, end);
}

void scatter(const Layout& layout, const Entry& e, const uint32_t* from, int64_t begin, int64_t end) {
  if (e.dtype == DType::kFloat32)
    copy_range(layout, &Dim::dst, static_cast<uint32_t*>(e.dst), from, begin, end);
  else
    copy_range(layout, &Dim::dst, static_cast<uint16_t*>(e.dst), reinterpret_cast<const uint16_t*>(from), begin, end);
}

// A chunk of an entry as an entry of its own, in contiguous memory.
Entry chunk_of(const Entry& e, uint32_t* memory, int64_t begin, int64_t end) {
  Entry part = e;
  part.dst = memory;
  part.src = memory;
  part.numel = end - begin;
  part.offset += begin;
  if (e.mask_data) part.mask_data += e.mask == MaskKind::kBool ? begin : begin / 8;
  return part;
}

// Fills d with the keys of a seed and the products of the first rounds (see Direction). The counter of an element is
// its index >> shift.
void prepare(Direction& d, uint64_t seed, const float* scales, size_t n, uint32_t param_id, int64_t index, int shift,
             uint32_t stream) {
  const uint32_t counter_high = uint32_t(index >> shift >> 32);
  d.seed = seed;
  d.scales = scales;
  d.n_scales = int(n);
  for (int r = 0; r < kPhiloxRounds; ++r) {
    d.k0[r] = uint32_t(seed) + uint32_t(r) * kPhiloxW0;
    d.k1[r] = uint32_t(seed >> 32) + uint32_t(r) * kPhiloxW1;
  }
  const uint64_t p1 = uint64_t(kPhiloxM1) * param_id;
  const uint64_t p0 = uint64_t(kPhiloxM0) * (uint32_t(p1 >> 32) ^ counter_high ^ d.k0[0].x[0]);
  for (uint32_t& each : d.k1[0].x) each ^= stream;  // the last word of the counter
  d.round1_c0 = uint32_t(p1) ^ d.k0[1].x[0];
  d.round1_c2 = uint32_t(p0 >> 32) ^ d.k1[1].x[0];
  d.round2_c2 = uint32_t(p0) ^ d.k1[2].x[0];
}

// A forked child has none of its parent's OpenMP threads, and GNU's OpenMP would wait for them for ever.
#if defined(_OPENMP) && !defined(_WIN32)
const pid_t loaded_by = getpid();
bool forked() { return getpid() != loaded_by; }
#elif defined(_OPENMP)
bool forked() { return false; }
#endif

}  // namespace

void Table::run(const std::vector<uint64_t>& seeds, const std::vector<double>& scales,
                const std::vector<double>& decays, Distribution distribution, bool stochastic,
                const std::vector<int64_t>* active, int threads, RangeFn range) const {
  check(seeds.size(), scales.size(), decays.size(), active, threads);
  std::vector<Chunk> chunks;
  int64_t staged = 0;
  const auto add = [&](size_t at) {
    const Entry& e = entries_[at];
    const Layout* layout = layouts_[at].empty() ? nullptr : &layouts_[at];
    int64_t size = kChunk;
    if (layout) {
      size = std::min(std::max(size, kRows * std::min(layout->front().size, kMostStaged)), kMostStaged);
      staged = std::max(staged, std::min(size, e.numel));
    }
    for (int64_t i = 0; i < e.numel; i += size) chunks.push_back({&e, layout, i, std::min(i + size, e.numel)});
  };
  if (active)
    for (const int64_t i : *active) add(size_t(i));
  else
    for (size_t i = 0; i < entries_.size(); ++i) add(i);
  if (chunks.empty()) return;
  const size_t wanted = std::min({size_t(threads), chunks.size(), kMostAtWork});
  std::vector<Workspace> workspaces;
  workspaces.reserve(wanted);
  for (size_t i = 0; i < wanted; ++i) workspaces.emplace_back(seeds.size(), staged);
  const UnderWay under_way(*this);
  const bool signs = distribution == Distribution::kRademacher;

  alignas(64) std::atomic<size_t> next{0};  // in a cache line of its own
  alignas(64) std::atomic<size_t> started{0};
  const auto work = [&]() noexcept {
    const DefaultFloatMode mode;
    const Workspace& own = workspaces[started.fetch_add(1, std::memory_order_relaxed)];
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks.size();) {
      Chunk chunk = chunks[i];
      Entry part;
      if (chunk.layout) {
        gather(*chunk.layout, *chunk.entry, own.elements.get(), chunk.begin, chunk.end);
        part = chunk_of(*chunk.entry, own.elements.get(), chunk.begin, chunk.end);
        chunk = {&part, nullptr, 0, part.numel};
      }
      const Entry& e = *chunk.entry;
      const double* row = scales.data() + size_t(e.group) * seeds.size();
      bool several = e.dtype == DType::kFloat32 && e.mask == MaskKind::kNone;
      for (size_t k = 0; k < seeds.size(); ++k) {
        own.scales[k] = number(row[k]);
        several &= !signs || own.scales[k] != 0.0f;  // signs.h: an element that is turned may not stay zero
      }
      Direction& rounding = own.directions[seeds.size()];
      const float decay = number(decays[size_t(e.group)]);
      Job job{&e, own.directions.get(), 0, distribution, &rounding, decay, stochastic, false};
      if (e.mask == MaskKind::kRecord)
        memset(e.mask_data + chunk.begin / 8, 0, size_t((chunk.end - chunk.begin + 7) / 8));
      for (int64_t begin = chunk.begin; begin < chunk.end;) {
        const int64_t index = e.offset + begin, left = kOneHigh - (index & (kOneHigh - 1));
        const int64_t end = begin + std::min(chunk.end - begin, left);
        job.n_directions = 0;
        for (size_t k = 0, n; k < seeds.size(); k += n) {
          n = several ? repeats(seeds, k) : 1;
          job.several |= n > 1;
          prepare(own.directions[size_t(job.n_directions++)], seeds[k], own.scales.get() + k, n, e.param_id, index,
                  signs ? kSignShift : kNormalShift, signs ? kSignStream : kNormalStream);
        }
        if (signs && stochastic && e.dtype != DType::kFloat32)
          prepare(rounding, seeds[0], nullptr, 0, e.param_id, index, kSignRoundingShift, kSignRoundingStream);
        range(job, begin, end);
        begin = end;
      }
      if (chunks[i].layout)
        scatter(*chunks[i].layout, *chunks[i].entry, own.elements.get(), chunks[i].begin, chunks[i].end);
    }
  };

#if defined(_OPENMP)
  // PyTorch has loaded this runtime already. Its threads still spin after a forward pass, and threads of our own would
  // share the cores with them.
  if (!forked()) {
#pragma omp parallel num_threads(int(wanted)) if (wanted > 1)
    work();
    return;
  }
#endif
  std::vector<std::thread> helpers;
  helpers.reserve(wanted);
  try {
    for (size_t i = 1; i < wanted; ++i) helpers.emplace_back(work);
  } catch (const std::exception&) {  // no more threads can be started: the ones that run do all of the work
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace zo
