// Guidance and a solver step: x0 = k0 x + k1 p,
// x_next = k2 x + k3 p + k4 x0_prev + k7 x0_prev2 + k5 noise.
#include "guided.h"
#include "noise.h"

namespace selfnpo {
inline namespace CPU_CAPABILITY {

template <class S, class P, bool Both>
void guided_step_block(const GuidedStepArgs& a, int64_t b, int64_t offset, int64_t n, bool stream) {
  const int64_t at = b * a.N + offset;
  NoiseBlock block;
  const P* pos = at_offset<P>(a.pos ? a.pos : a.neg, at);
  const P* neg = at_offset<P>(a.neg, at);
  const S *x = at_offset<S>(a.x, at), *before = at_offset<S>(a.x0_prev, at), *earlier = at_offset<S>(a.x0_prev2, at);
  S *x_next = at_offset<S>(a.x_next, at), *x0 = at_offset<S>(a.x0, at);
  const float* z = block.get(a.noise_tensor, a.noise, b, b * a.N, offset, n, x, pos, neg, before, earlier);
  const float* k = a.k.row(b);
  const Guidance<Both> guided{k[6], a.scale ? a.scale[b] : 1.0f};
  const auto loop = [&](auto extra) {
    each(n, [&](auto tag, int64_t i) {
      using V = decltype(tag);
      const V p = guided.template operator()<V>(pos, neg, i), state = load<V>(x + i);
      V next = fmadd(V(k[2]), state, V(k[3]) * p);
      if constexpr (decltype(extra)::value) {
        if (before) next = fmadd(V(k[4]), load<V>(before + i), next);
        if (earlier) next = fmadd(V(k[7]), load<V>(earlier + i), next);
        if (z) next = fmadd(V(k[5]), load<V>(z + i), next);
      }
      store<V>(x0 + i, fmadd(V(k[0]), state, V(k[1]) * p), stream);
      store<V>(x_next + i, next, stream);
    });
  };
  if (before || earlier || z) {
    loop(std::true_type());
  } else {
    loop(std::false_type());
  }
}

void guided_step(const GuidedStepArgs& a) {
  const bool stream = streams(a.B * a.N * 16, a.N);
  branches(a.pos, a.neg, [&](auto p, auto both) {
    dispatch(a.x.type, [&](auto s) {
      blocks(a.B, a.N, [&](int64_t b, int64_t offset, int64_t n) {
        guided_step_block<decltype(s), decltype(p), decltype(both)::value>(a, b, offset, n, stream);
      });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace selfnpo
