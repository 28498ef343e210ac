// Built with the instructions named below and called only where the processor has them (bindings.cpp asks).
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

// Standard headers come first: their inline functions must not be compiled for this instruction set.
// GCC 12 warns of deliberately undefined registers in its own AVX-512 header.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "avx512.h"
#include "kernel.h"

namespace zo {

void range_avx512(const Job& job, int64_t begin, int64_t end) { range<Avx512>(job, begin, end); }

}  // namespace zo

// GCC 12 warns of deliberately undefined registers in its own AVX-512 header.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
