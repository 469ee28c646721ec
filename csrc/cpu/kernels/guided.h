// Classifier-free guidance of one element or vector (Eq. 1).
#pragma once

#include "vec.h"

namespace selfnpo {
inline namespace CPU_CAPABILITY {

// p = scale (pos + w (pos - neg)); with only one branch given, scale times that branch.
template <bool Both>
struct Guidance {
  float w = 0, scale = 1;

  template <class V, class T>
  V operator()(const T* pos, const T* neg, int64_t i) const {
    V p = load<V>(pos + i);
    if constexpr (Both) p = fmadd(V(w), p - load<V>(neg + i), p);
    return p * V(scale);
  }
};

// Calls f(tag of the dtype of pos and neg, whether both are given). A single branch is passed as
// pos.
template <class F>
inline void branches(const Array& pos, const Array& neg, const F& f) {
  dispatch((pos ? pos : neg).type, [&](auto type) {
    if (pos && neg) {
      f(type, std::true_type());
    } else {
      f(type, std::false_type());
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace selfnpo
