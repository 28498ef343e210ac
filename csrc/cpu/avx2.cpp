// Built with the instructions named below and called only where the processor has them (bindings.cpp asks).
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

// Standard headers come first: their inline functions must not be compiled for this instruction set.
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
