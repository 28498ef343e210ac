// A block, which a thread block works on at a time: how its threads divide it, and what they are told.
#pragma once

#include "row.h"
#include "table.h"

namespace zo {

constexpr int kThreads = 128;
constexpr int kBlock = 2048;  // elements
constexpr int kPerThread = kBlock / kThreads;

// Reads through the read-only cache: memory that does not change while the pass runs.
template <typename T>
ZO_FN T read(const T* p) {
#if defined(__CUDA_ARCH__)
  return __ldg(p);
#else
  return *p;
#endif
}

ZO_FN uint64_t read(const uint64_t* p) {
#if defined(__CUDA_ARCH__)
  return __ldg(reinterpret_cast<const unsigned long long*>(p));
#else
  return *p;
#endif
}

// Tells the compiler that a pointer read from memory points to global memory.
template <typename T>
ZO_FN T* global(T* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// A thread's tensor, and the numbers of the pass for it.
struct Task {
  TableRow entry;
  const uint64_t* seeds;
  const float* scales;
  int directions;
  float decay;
};

// How the threads divide a block that lies whole in a tensor: thread t takes rows t + kThreads * i, so that a warp's
// accesses are contiguous. Where it writes mask bits of float32, it takes two rows side by side, which fill a byte.
template <DType D, MaskKind M>
constexpr bool kTwoRows = D == DType::kFloat32 && M == MaskKind::kRecord;

template <DType D, MaskKind M>
ZO_FN int first_row(int thread) {
  return kTwoRows<D, M> ? 2 * thread : thread;
}

template <DType D, MaskKind M>
ZO_FN int row_step(int i) {
  return kTwoRows<D, M> ? i / 2 * 2 * kThreads + i % 2 : kThreads * i;
}

}  // namespace zo
