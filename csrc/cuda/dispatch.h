// From the kind of a pass to the kernel compiled for it.
#pragma once

#include "launch.h"

namespace zo {

template <Distribution Z, DType D, MaskKind M, bool STOCHASTIC, bool DECAY>
struct Variant {};

template <Distribution Z, DType D, MaskKind M, bool STOCHASTIC, typename F>
void with_variant(const Kind& kind, F&& call) {
  kind.decay ? call(Variant<Z, D, M, STOCHASTIC, true>()) : call(Variant<Z, D, M, STOCHASTIC, false>());
}

template <Distribution Z, DType D, MaskKind M, typename F>
void with_variant(const Kind& kind, F&& call) {
  constexpr bool kRounds = D != DType::kFloat32;
  kRounds&& kind.stochastic ? with_variant<Z, D, M, kRounds>(kind, call) : with_variant<Z, D, M, false>(kind, call);
}

template <Distribution Z, DType D, typename F>
void with_variant(const Kind& kind, F&& call) {
  switch (kind.mask) {
    case MaskKind::kNone:
      return with_variant<Z, D, MaskKind::kNone>(kind, call);
    case MaskKind::kThreshold:
      return with_variant<Z, D, MaskKind::kThreshold>(kind, call);
    case MaskKind::kBool:
      return with_variant<Z, D, MaskKind::kBool>(kind, call);
    case MaskKind::kBits:
      return with_variant<Z, D, MaskKind::kBits>(kind, call);
    case MaskKind::kRecord:
      return with_variant<Z, D, MaskKind::kRecord>(kind, call);
  }
}

template <Distribution Z, typename F>
void with_variant(const Kind& kind, F&& call) {
  switch (kind.dtype) {
    case DType::kFloat32:
      return with_variant<Z, DType::kFloat32>(kind, call);
    case DType::kBFloat16:
      return with_variant<Z, DType::kBFloat16>(kind, call);
    case DType::kFloat16:
      return with_variant<Z, DType::kFloat16>(kind, call);
  }
}

// Calls call(Variant<...>()) with the template arguments of a kind.
template <typename F>
void with_variant(const Kind& kind, F&& call) {
  switch (kind.distribution) {
    case Distribution::kNormal:
      return with_variant<Distribution::kNormal>(kind, call);
    case Distribution::kRademacher:
      return with_variant<Distribution::kRademacher>(kind, call);
  }
}

}  // namespace zo
