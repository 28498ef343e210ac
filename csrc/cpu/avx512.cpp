// The kernel compiled for the instructions named below; bindings.cpp offers it only where the processor has them.
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

// Standard headers come before the target: their inline functions must not be compiled for this instruction set.
// GCC 12 warns about registers that its own AVX-512 header leaves undefined on purpose.
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

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
