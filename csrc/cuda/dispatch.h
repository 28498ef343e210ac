// From the kind of a pass to the kernel compiled for it.
#pragma once

#include "launch.h"

namespace zo {

template <DType D, MaskKind M, bool STOCHASTIC, bool DECAY>
struct Variant {};

template <DType D, MaskKind M, bool STOCHASTIC, typename F>
void with_variant(const Kind& kind, F&& call) {
  kind.decay ? call(Variant<D, M, STOCHASTIC, true>()) : call(Variant<D, M, STOCHASTIC, false>());
}

template <DType D, MaskKind M, typename F>
void with_variant(const Kind& kind, F&& call) {
  constexpr bool kRounds = D != DType::kFloat32;
  kRounds&& kind.stochastic ? with_variant<D, M, kRounds>(kind, call) : with_variant<D, M, false>(kind, call);
}

template <DType D, typename F>
void with_variant(const Kind& kind, F&& call) {
  switch (kind.mask) {
    case MaskKind::kNone:
      return with_variant<D, MaskKind::kNone>(kind, call);
    case MaskKind::kThreshold:
      return with_variant<D, MaskKind::kThreshold>(kind, call);
    case MaskKind::kBool:
      return with_variant<D, MaskKind::kBool>(kind, call);
    case MaskKind::kBits:
      return with_variant<D, MaskKind::kBits>(kind, call);
    case MaskKind::kRecord:
      return with_variant<D, MaskKind::kRecord>(kind, call);
  }
}

// Calls call(Variant<...>()) with the template arguments of a kind.
template <typename F>
void with_variant(const Kind& kind, F&& call) {
  switch (kind.dtype) {
    case DType::kFloat32:
      return with_variant<DType::kFloat32>(kind, call);
    case DType::kBFloat16:
      return with_variant<DType::kBFloat16>(kind, call);
    case DType::kFloat16:
      return with_variant<DType::kFloat16>(kind, call);
  }
}

}  // namespace zo
