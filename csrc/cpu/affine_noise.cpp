#include "bind.h"

namespace selfnpo {

static Tensor affine_noise(const Tensor& x, const Tensor& k, const MaybeTensor& index, const MaybeTensor& noise_tensor,
                           int64_t seed, const MaybeTensor& sample_ids, int64_t draw, const MaybeTensor& draws) {
  Tensor out = at::empty_like(x);
  kernels().affine_noise({samples(x), elements(x), array(x), array(noise_tensor), array(out), table(k, index),
                          noise(seed, sample_ids, draw, draws)});
  return out;
}

TORCH_LIBRARY_IMPL(selfnpo_cpp, CPU, m) { m.impl("affine_noise", affine_noise); }

}  // namespace selfnpo
