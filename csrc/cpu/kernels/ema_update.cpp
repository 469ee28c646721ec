// master <- decay master + (1 - decay) live for a list of parameters; shadow <- master.
#include <vector>

#include "vec.h"

namespace selfnpo {
inline namespace CPU_CAPABILITY {

constexpr int64_t kChunk = 1 << 15;

void ema_update(const EmaUpdateArgs& a) {
  struct Chunk {
    int64_t tensor, offset;
  };
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < a.count; ++i) {
    for (int64_t offset = 0; offset < a.sizes[i]; offset += kChunk) chunks.push_back({i, offset});
  }
  // Interpolated from the nearer end, so that decay 0 gives exactly live and decay 1 exactly
  // master.
  const bool near = a.decay > 0.5;
  const float share = static_cast<float>(near ? 1.0 - a.decay : a.decay);
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      const auto [tensor, offset] = chunks[j];
      const int64_t n = std::min(kChunk, a.sizes[tensor] - offset);
      float* master = a.masters[tensor] + offset;
      dispatch(a.live[tensor].type, [&](auto type) {
        const auto* live = at_offset<decltype(type)>(a.live[tensor], offset);
        const auto loop = [&](auto* shadow) {
          each(n, [&](auto tag, int64_t i) {
            using V = decltype(tag);
            const V old = load<V>(master + i), fresh = load<V>(live + i);
            const V from = near ? old : fresh, to = near ? fresh : old;
            const V after = fmadd(V(share), to - from, from);
            store<V>(master + i, after);
            if (shadow) store<V>(shadow + i, after);
          });
        };
        if (a.shadows == nullptr) {
          loop(static_cast<float*>(nullptr));
        } else {
          dispatch(a.shadows[tensor].type, [&](auto kind) { loop(at_offset<decltype(kind)>(a.shadows[tensor], offset)); });
        }
      });
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace selfnpo
