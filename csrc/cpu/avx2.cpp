// The kernel compiled for the instructions named below; bindings.cpp offers it only where the processor has them.
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

// Standard headers come before the target: their inline functions must not be compiled for this instruction set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "avx2.h"
#include "kernel.h"

namespace zo {

void range_avx2(const Job& job, int64_t begin, int64_t end) { range<Avx2>(job, begin, end); }

}  // namespace zo

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
