// The arguments that the bindings (cpu/<op>.cpp) give to the kernels (cpu/kernels/<op>.cpp,
// compiled once per instruction set). kernels/selfnpo_kernels/checks.py has checked the shapes and
// dtypes. A tensor has B samples of N elements each.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace selfnpo {

// A tensor of float32, bfloat16 or float16; data is null where an optional one is absent.
struct Array {
  void* data = nullptr;
  c10::ScalarType type = c10::ScalarType::Float;
  explicit operator bool() const { return data != nullptr; }
};

// A coefficient table. The row of sample b is index[b] if there is an index; otherwise row 0 of a
// table of one row, and row b of any other table.
struct Table {
  const float* data;
  int64_t rows, columns;
  const int64_t* index;
  const float* row(int64_t b) const { return data + (index ? index[b] : rows == 1 ? 0 : b) * columns; }
};

// Columns of the coefficient table of a solver step: k0 .. k5, w, k7 (schemas.py).
constexpr int64_t kStepColumns = 8;

// The key of the normals that an op draws itself; `drawn` is false where it draws none.
struct Noise {
  bool drawn = false;
  uint64_t seed = 0;
  const int64_t* sample_ids = nullptr;
  int64_t draw = 0;
  const int64_t* draws = nullptr;
};

struct NormalArgs {
  int64_t B, N;
  Array out;
  Noise noise;
};

struct AffineNoiseArgs {
  int64_t B, N;
  Array x, noise_tensor, out;
  Table k;
  Noise noise;
};

struct GuidedStepArgs {
  int64_t B, N;
  Array pos, neg, x, x0_prev, x0_prev2, noise_tensor, x_next, x0;
  Table k;
  const float* scale;
  Noise noise;
};

struct GuidanceRescaleArgs {
  int64_t B, N;
  Array pos, neg;
  Table k;
  float phi;
  float* out;
};

struct TdftStepArgs {
  int64_t B, N, T, grid_rows;
  Array pos, neg, x, final, latents, target, x_s;
  const int64_t* slots;
  int64_t* next_slots;
  const float *step, *start, *renoise, *weights;
  const int64_t* timesteps;
  int64_t num_prompts, stride, max_steps;
  uint64_t seed;
  float dropout;
  bool shuffled, naive;
  int64_t* pairs;
  float* weight;
};

struct X0LossArgs {
  int64_t B, N;
  Array pred, x_s, target, slope;
  Table k;
  const float* weight;
  bool huber;
  float c;
  float *loss, *per_sample;
};

struct X0LossBackwardArgs {
  int64_t B, N;
  Array slope, out;
  Table k;
  const float *weight, *grad;
};

struct EmaUpdateArgs {
  int64_t count;
  const int64_t* sizes;
  float* const* masters;
  const Array* live;
  const Array* shadows;  // null where there are none
  double decay;
};

// The kernels of one instruction set; `kernels()` returns those for this machine.
struct Kernels {
  const char* name;
  void (*normal)(const NormalArgs&);
  void (*affine_noise)(const AffineNoiseArgs&);
  void (*guided_step)(const GuidedStepArgs&);
  void (*guidance_rescale)(const GuidanceRescaleArgs&);
  void (*tdft_step)(const TdftStepArgs&);
  void (*x0_loss)(const X0LossArgs&);
  void (*x0_loss_backward)(const X0LossBackwardArgs&);
  void (*ema_update)(const EmaUpdateArgs&);
};

const Kernels& kernels();

// Whether to use streaming stores: outputs of this many bytes do not fit the last-level cache, and
// rows of `row` elements are aligned.
bool streams(int64_t bytes, int64_t row);

}  // namespace selfnpo
