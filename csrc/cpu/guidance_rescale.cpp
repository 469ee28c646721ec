#include "bind.h"

namespace selfnpo {

static Tensor guidance_rescale(const Tensor& pos, const Tensor& neg, const Tensor& k, const MaybeTensor& index,
                               double phi) {
  Tensor out = at::empty({samples(pos)}, pos.options().dtype(at::kFloat));
  kernels().guidance_rescale({samples(pos), elements(pos), array(pos), array(neg), table(k, index),
                              static_cast<float>(phi), out.mutable_data_ptr<float>()});
  return out;
}

TORCH_LIBRARY_IMPL(selfnpo_cpp, CPU, m) { m.impl("guidance_rescale", guidance_rescale); }

}  // namespace selfnpo
