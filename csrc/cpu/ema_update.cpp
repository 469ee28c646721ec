#include "bind.h"

namespace selfnpo {

static void ema_update(at::TensorList masters, at::TensorList live, at::TensorList shadows, double decay) {
  std::vector<int64_t> sizes;
  std::vector<float*> master_data;
  std::vector<Array> live_data, shadow_data;
  for (size_t i = 0; i < masters.size(); ++i) {
    sizes.push_back(masters[i].numel());
    master_data.push_back(masters[i].mutable_data_ptr<float>());
    live_data.push_back(array(live[i]));
    if (!shadows.empty()) shadow_data.push_back(array(shadows[i]));
  }
  kernels().ema_update({static_cast<int64_t>(sizes.size()), sizes.data(), master_data.data(), live_data.data(),
                        shadows.empty() ? nullptr : shadow_data.data(), decay});
}

TORCH_LIBRARY_IMPL(selfnpo_cpp, CPU, m) { m.impl("ema_update", ema_update); }

}  // namespace selfnpo
