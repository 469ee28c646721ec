// Eq. 17 on the student's x0 = k0 x_s + k1 pred: the loss and its slope in one pass, and the
// gradient, which is computed from the slope.
#include <vector>

#include "vec.h"

namespace selfnpo {
inline namespace CPU_CAPABILITY {

template <class S, class P, bool Huber>
double loss_block(const X0LossArgs& a, int64_t b, int64_t offset, int64_t n, bool stream) {
  const int64_t at = b * a.N + offset;
  const S *x_s = at_offset<S>(a.x_s, at), *target = at_offset<S>(a.target, at);
  const P* pred = at_offset<P>(a.pred, at);
  P* slope = at_offset<P>(a.slope, at);
  const float *k = a.k.row(b), c = a.c, c2 = a.c * a.c;
  Vec sum(0.0f);
  float rest = 0;
  each(n, [&](auto tag, int64_t i) {
    using V = decltype(tag);
    const V d = fmadd(V(k[0]), load<V>(x_s + i), V(k[1]) * load<V>(pred + i)) - load<V>(target + i);
    V loss, rise;
    if constexpr (Huber) {
      const V root = sqrt(fmadd(d, d, V(c2)));
      // d / root and d^2 / (root + c) by one division; root - c would cancel where |d| is far below
      // c.
      const V more = root + V(c), inverse = V(1.0f) / (root * more);
      loss = d * d * root * inverse;
      rise = d * more * inverse;
    } else {
      loss = d * d;
      rise = d + d;
    }
    if (slope) store<V>(slope + i, rise, stream);
    if constexpr (std::is_same_v<V, Vec>) {
      sum = sum + loss;
    } else {
      rest += loss;
    }
  });
  float lanes[8];
  sum.store(lanes);
  double total = rest;
  for (float lane : lanes) total += lane;
  return total;
}

void x0_loss(const X0LossArgs& a) {
  const int64_t per_sample = (a.N + kBlock - 1) / kBlock;
  std::vector<double> sums(a.B * per_sample);
  const bool stream = streams(a.B * a.N * 16, a.N);
  dispatch(a.pred.type, [&](auto p) {
    dispatch(a.x_s.type, [&](auto s) {
      blocks(a.B, a.N, [&](int64_t b, int64_t offset, int64_t n) {
        using S = decltype(s);
        using P = decltype(p);
        double& sum = sums[b * per_sample + offset / kBlock];
        sum = a.huber ? loss_block<S, P, true>(a, b, offset, n, stream)
                      : loss_block<S, P, false>(a, b, offset, n, stream);
      });
    });
  });
  double weighted = 0;
  for (int64_t b = 0; b < a.B; ++b) {
    double sample = 0;
    for (int64_t unit = b * per_sample; unit < (b + 1) * per_sample; ++unit) sample += sums[unit];
    a.per_sample[b] = static_cast<float>(sample / static_cast<double>(a.N));
    weighted += static_cast<double>(a.weight[b]) * a.per_sample[b];
  }
  *a.loss = static_cast<float>(weighted / static_cast<double>(a.B));
}

void x0_loss_backward(const X0LossBackwardArgs& a) {
  const double all = static_cast<double>(a.B) * static_cast<double>(a.N);
  const bool stream = streams(a.B * a.N * 8, a.N);
  dispatch(a.slope.type, [&](auto type) {
    using T = decltype(type);
    blocks(a.B, a.N, [&](int64_t b, int64_t offset, int64_t n) {
      const T* slope = at_offset<T>(a.slope, b * a.N + offset);
      T* out = at_offset<T>(a.out, b * a.N + offset);
      const float factor = static_cast<float>(static_cast<double>(a.k.row(b)[1]) * a.weight[b] * *a.grad / all);
      each(n, [&](auto tag, int64_t i) {
        using V = decltype(tag);
        store<V>(out + i, load<V>(slope + i) * V(factor), stream);
      });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace selfnpo
