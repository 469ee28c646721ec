#include "bind.h"

namespace selfnpo {

static std::tuple<Tensor, Tensor, Tensor> x0_loss(const Tensor& pred, const Tensor& x_s, const Tensor& target,
                                                  const Tensor& k, const MaybeTensor& index, const Tensor& weight,
                                                  c10::string_view kind, double c, bool want_slope) {
  const auto wide = pred.options().dtype(at::kFloat);
  Tensor loss = at::empty({}, wide), per_sample = at::empty({samples(pred)}, wide);
  Tensor slope = want_slope ? at::empty_like(pred) : at::empty({0}, pred.options());
  kernels().x0_loss({samples(pred), elements(pred), array(pred), array(x_s), array(target),
                     want_slope ? array(slope) : Array{}, table(k, index), weight.const_data_ptr<float>(),
                     kind == "huber", static_cast<float>(c), loss.mutable_data_ptr<float>(),
                     per_sample.mutable_data_ptr<float>()});
  return {loss, per_sample, slope};
}

static Tensor x0_loss_backward(const Tensor& slope, const Tensor& k, const MaybeTensor& index, const Tensor& weight,
                               const Tensor& grad) {
  Tensor out = at::empty_like(slope);
  kernels().x0_loss_backward({samples(slope), elements(slope), array(slope), array(out), table(k, index),
                              weight.const_data_ptr<float>(), grad.const_data_ptr<float>()});
  return out;
}

TORCH_LIBRARY_IMPL(selfnpo_cpp, CPU, m) {
  m.impl("x0_loss", x0_loss);
  m.impl("x0_loss_backward", x0_loss_backward);
}

}  // namespace selfnpo
