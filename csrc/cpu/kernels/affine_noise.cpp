// k0 x + k1 noise: forward diffusion and Eq. 16.
#include "noise.h"

namespace selfnpo {
inline namespace CPU_CAPABILITY {

void affine_noise(const AffineNoiseArgs& a) {
  const bool stream = streams(a.B * a.N * 8, a.N);
  dispatch(a.x.type, [&](auto type) {
    using T = decltype(type);
    blocks(a.B, a.N, [&](int64_t b, int64_t offset, int64_t n) {
      NoiseBlock block;
      const int64_t sample = b * a.N;
      const T* x = at_offset<T>(a.x, sample + offset);
      const float* z = block.get(a.noise_tensor, a.noise, b, sample, offset, n, x);
      T* out = at_offset<T>(a.out, sample + offset);
      const float* k = a.k.row(b);
      each(n, [&](auto tag, int64_t i) {
        using V = decltype(tag);
        store<V>(out + i, fmadd(V(k[0]), load<V>(x + i), V(k[1]) * load<V>(z + i)), stream);
      });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace selfnpo
