#include "bind.h"

namespace selfnpo {

static std::tuple<Tensor, Tensor, Tensor, Tensor> tdft_step(
    const MaybeTensor& pos, const MaybeTensor& neg, Tensor x, const MaybeTensor& final, const Tensor& slots,
    Tensor next_slots, const Tensor& step, const Tensor& start, const Tensor& renoise, const Tensor& timesteps,
    const Tensor& weight, const MaybeTensor& latents, int64_t num_prompts, int64_t stride, int64_t max_steps,
    int64_t seed, double dropout, bool shuffled, bool naive) {
  check_rows("slots: the grid index", slots.const_data_ptr<int64_t>(), samples(x), -1, timesteps.size(0) - 1);
  Tensor target = at::empty_like(x), x_s = at::empty_like(x), pairs = at::empty_like(slots);
  Tensor pair_weight = at::empty({samples(x)}, weight.options());
  TdftStepArgs args{};
  args.B = samples(x);
  args.N = elements(x);
  args.T = renoise.size(1);
  args.grid_rows = timesteps.size(0);
  args.pos = array(pos);
  args.neg = array(neg);
  args.x = array(x);
  args.final = array(final);
  args.latents = array(latents);
  args.target = array(target);
  args.x_s = array(x_s);
  args.slots = slots.const_data_ptr<int64_t>();
  args.next_slots = next_slots.mutable_data_ptr<int64_t>();
  args.step = step.const_data_ptr<float>();
  args.start = start.const_data_ptr<float>();
  args.renoise = renoise.const_data_ptr<float>();
  args.weights = weight.const_data_ptr<float>();
  args.timesteps = timesteps.const_data_ptr<int64_t>();
  args.num_prompts = num_prompts;
  args.stride = stride;
  args.max_steps = max_steps;
  args.seed = static_cast<uint64_t>(seed);
  args.dropout = static_cast<float>(dropout);
  args.shuffled = shuffled;
  args.naive = naive;
  args.pairs = pairs.mutable_data_ptr<int64_t>();
  args.weight = pair_weight.mutable_data_ptr<float>();
  kernels().tdft_step(args);
  return {target, x_s, pairs, pair_weight};
}

TORCH_LIBRARY_IMPL(selfnpo_cpp, CPU, m) { m.impl("tdft_step", tdft_step); }

}  // namespace selfnpo
