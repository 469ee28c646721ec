#include "bind.h"

namespace selfnpo {

static Tensor normal(const Tensor& sample_ids, at::IntArrayRef shape, int64_t seed, int64_t draw,
                     const MaybeTensor& draws, at::ScalarType dtype) {
  std::vector<int64_t> sizes{samples(sample_ids)};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  Tensor out = at::empty(sizes, sample_ids.options().dtype(dtype));
  kernels().normal({samples(out), elements(out), array(out), noise(seed, sample_ids, draw, draws)});
  return out;
}

TORCH_LIBRARY_IMPL(selfnpo_cpp, CPU, m) { m.impl("normal", normal); }

}  // namespace selfnpo
