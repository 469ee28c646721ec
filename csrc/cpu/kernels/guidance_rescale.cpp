// phi std(pos) / std(p) + 1 - phi per sample (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are
// Flawed", section 3.4).
#include <vector>

#include "guided.h"

namespace selfnpo {
inline namespace CPU_CAPABILITY {

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  // Chan, Golub and LeVeque (1979).
  void add(const Moments& o) {
    const double total = count + o.count, delta = o.mean - mean;
    mean += delta * o.count / total;
    m2 += o.m2 + delta * delta * count * o.count / total;
    count = total;
  }
};

// Mean first, squares about it second, while the block lies in the cache: nothing cancels where the mean is large.
template <class Value>
Moments moments(int64_t n, const Value& value) {
  Vec sum(0.0f);
  float rest = 0;
  each(n, [&](auto tag, int64_t i) {
    using V = decltype(tag);
    if constexpr (std::is_same_v<V, Vec>) {
      sum = sum + value(tag, i);
    } else {
      rest += value(tag, i);
    }
  });
  const auto total = [](const Vec& v, float more) {
    float lanes[8];
    v.store(lanes);
    double out = more;
    for (float lane : lanes) out += lane;
    return out;
  };
  const double mean = total(sum, rest) / static_cast<double>(n);
  const float center = static_cast<float>(mean);
  Vec squares(0.0f);
  rest = 0;
  each(n, [&](auto tag, int64_t i) {
    using V = decltype(tag);
    const V d = value(tag, i) - V(center);
    if constexpr (std::is_same_v<V, Vec>) {
      squares = fmadd(d, d, squares);
    } else {
      rest += d * d;
    }
  });
  const double off = mean - center;
  return {static_cast<double>(n), mean, total(squares, rest) - static_cast<double>(n) * off * off};
}

void guidance_rescale(const GuidanceRescaleArgs& a) {
  const int64_t per_sample = (a.N + kBlock - 1) / kBlock;
  std::vector<Moments> of_pos(a.B * per_sample), of_p(a.B * per_sample);
  dispatch(a.pos.type, [&](auto tp) {
    dispatch(a.neg.type, [&](auto tn) {
      blocks(a.B, a.N, [&](int64_t b, int64_t offset, int64_t n) {
        const auto* pos = at_offset<decltype(tp)>(a.pos, b * a.N + offset);
        const auto* neg = at_offset<decltype(tn)>(a.neg, b * a.N + offset);
        const float w = a.k.row(b)[6];
        const int64_t unit = b * per_sample + offset / kBlock;
        of_pos[unit] = moments(n, [&](auto tag, int64_t i) { return load<decltype(tag)>(pos + i); });
        of_p[unit] = moments(n, [&](auto tag, int64_t i) {
          using V = decltype(tag);
          const V p = load<V>(pos + i);
          return fmadd(V(w), p - load<V>(neg + i), p);
        });
      });
    });
  });
  for (int64_t b = 0; b < a.B; ++b) {
    Moments pos, p;
    for (int64_t unit = b * per_sample; unit < (b + 1) * per_sample; ++unit) {
      pos.add(of_pos[unit]);
      p.add(of_p[unit]);
    }
    a.out[b] = static_cast<float>(a.phi * std::sqrt(pos.m2 / p.m2) + (1.0 - a.phi));
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace selfnpo
