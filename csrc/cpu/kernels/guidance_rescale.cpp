// phi std(pos) / std(p) + 1 - phi per sample (Lin et al., "Common Diffusion Noise Schedules and
// Sample Steps are Flawed", section 3.4).
#include <vector>

#include "guided.h"

namespace selfnpo {
inline namespace CPU_CAPABILITY {

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  // The formula of Chan, Golub and LeVeque (1979).
  void add(const Moments& o) {
    const double total = count + o.count, delta = o.mean - mean;
    mean += delta * o.count / total;
    m2 += o.m2 + delta * delta * count * o.count / total;
    count = total;
  }
};

// Sums over one block of the values minus a rough mean, so that a large mean cancels no digits.
// Eight lanes and a tail.
struct Sums {
  float rough;
  Vec sum{0.0f}, squares{0.0f};
  float tail_sum = 0, tail_squares = 0;

  void add(Vec v) {
    const Vec d = v - Vec(rough);
    sum = sum + d;
    squares = fmadd(d, d, squares);
  }
  void add(float v) {
    const float d = v - rough;
    tail_sum += d;
    tail_squares += d * d;
  }
  Moments moments(int64_t n) const {
    const auto total = [](const Vec& v, double out) {
      float lanes[8];
      v.store(lanes);
      for (float lane : lanes) out += lane;
      return out;
    };
    const double all = total(sum, tail_sum), count = static_cast<double>(n);
    return {count, rough + all / count, total(squares, tail_squares) - all * all / count};
  }
};

// The mean of a block's first values; a single value may lie far from the others.
template <class T>
float rough_mean(const T* p, int64_t n) {
  const int64_t some = std::min<int64_t>(n, 64);
  float sum = 0;
  for (int64_t i = 0; i < some; ++i) sum += load<float>(p + i);
  return sum / static_cast<float>(some);
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
        const float of_pos_roughly = rough_mean(pos, n);
        Sums pos_sums{of_pos_roughly}, p_sums{fmadd(w, of_pos_roughly - rough_mean(neg, n), of_pos_roughly)};
        each(n, [&](auto tag, int64_t i) {
          using V = decltype(tag);
          const V p = load<V>(pos + i);
          pos_sums.add(p);
          p_sums.add(fmadd(V(w), p - load<V>(neg + i), p));
        });
        of_pos[unit] = pos_sums.moments(n);
        of_p[unit] = p_sums.moments(n);
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
