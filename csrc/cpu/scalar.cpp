#include "scalar.h"

namespace zo {

void range_scalar(const Job& job, int64_t begin, int64_t end) { scalar_range(job, begin, end); }

}  // namespace zo
