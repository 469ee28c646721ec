// Chooses the kernels of this machine's instruction set, once, as torch and ATEN_CPU_CAPABILITY do.
// torch calls a machine AVX512 only where it has the extensions f, vl, bw and dq, for which the
// kernels of that set are compiled.
#include <ATen/Version.h>
#include <unistd.h>

#include <string>

#include "ops.h"

#define SELFNPO_DECLARE(SET)                              \
  namespace SET {                                         \
  void normal(const NormalArgs&);                         \
  void affine_noise(const AffineNoiseArgs&);              \
  void guided_step(const GuidedStepArgs&);                \
  void guidance_rescale(const GuidanceRescaleArgs&);      \
  void tdft_step(const TdftStepArgs&);                    \
  void x0_loss(const X0LossArgs&);                        \
  void x0_loss_backward(const X0LossBackwardArgs&);       \
  void ema_update(const EmaUpdateArgs&);                  \
  }                                                       \
  static const Kernels kernels_##SET = {                  \
      #SET,              SET::normal,  SET::affine_noise,     SET::guided_step, SET::guidance_rescale, \
      SET::tdft_step,    SET::x0_loss, SET::x0_loss_backward, SET::ema_update};

namespace selfnpo {

SELFNPO_DECLARE(DEFAULT)
#ifdef SELFNPO_X86
SELFNPO_DECLARE(AVX2)
SELFNPO_DECLARE(AVX512)
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef SELFNPO_X86
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return kernels_AVX512;
    if (capability == "AVX2") return kernels_AVX2;
#endif
    return kernels_DEFAULT;
  }();
  return chosen;
}

bool streams(int64_t bytes, int64_t row) {
  static const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), int64_t{32} << 20);
  return bytes > cache && row % 8 == 0;
}

}  // namespace selfnpo
