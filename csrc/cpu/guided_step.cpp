#include "bind.h"

namespace selfnpo {

static std::tuple<Tensor, Tensor> guided_step(
    const MaybeTensor& pos, const MaybeTensor& neg, const Tensor& x, const Tensor& k, const MaybeTensor& index,
    const MaybeTensor& scale, const MaybeTensor& x0_prev, const MaybeTensor& x0_prev2, const MaybeTensor& noise_tensor,
    int64_t seed, const MaybeTensor& sample_ids, int64_t draw, const MaybeTensor& draws) {
  Tensor x_next = at::empty_like(x), x0 = at::empty_like(x);
  kernels().guided_step({samples(x), elements(x), array(pos), array(neg), array(x), array(x0_prev),
                         array(x0_prev2), array(noise_tensor), array(x_next), array(x0), table(k, index),
                         pointer<float>(scale), noise(seed, sample_ids, draw, draws)});
  return {x_next, x0};
}

TORCH_LIBRARY_IMPL(selfnpo_cpp, CPU, m) { m.impl("guided_step", guided_step); }

}  // namespace selfnpo
