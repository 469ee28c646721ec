// Standard normals (rng.normal), written straight into the output.
#include "noise.h"

namespace selfnpo {
inline namespace CPU_CAPABILITY {

void normal(const NormalArgs& a) {
  const bool stream = streams(a.B * a.N * 4, a.N);
  dispatch(a.out.type, [&](auto type) {
    using T = decltype(type);
    blocks(a.B, a.N, [&](int64_t b, int64_t offset, int64_t n) {
      NoiseBlock block;
      const float* z = block.get({}, a.noise, b, b * a.N, offset, n);
      T* out = at_offset<T>(a.out, b * a.N + offset);
      each(n, [&](auto tag, int64_t i) {
        using V = decltype(tag);
        store<V>(out + i, load<V>(z + i), stream);
      });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace selfnpo
