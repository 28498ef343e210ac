// csrc's AVX-512 kernels with every intrinsic emulated, so that their logic is tested on any processor.
#include "axpy.h"

#include "immintrin.h"

#include "cpu/avx512.h"

#include "cpu/kernel.h"

namespace zo {

void range_avx512(const Job& job, int64_t begin, int64_t end) { range<Avx512>(job, begin, end); }

}  // namespace zo
