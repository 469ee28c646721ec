"""The schema of every operation, in the language of torch.library. This module imports nothing.

`ops.py` registers the schemas under `selfnpo::<op>` and `cpp.py` under `selfnpo_cpp::<op>`. The
functions of `checks.py`, `reference.py` and the Triton launchers take the same arguments in the
same order.
"""

STEP_COLUMNS = 8
"""Columns of the coefficient table of a solver step: k0 .. k5, w, k7."""

# SymInt: torch.compile does not compile again when a seed or a draw changes from call to call.
_NOISE = "SymInt seed, Tensor? sample_ids, SymInt draw, Tensor? draws"

SCHEMAS = {
    "normal": (
        "(Tensor sample_ids, SymInt[] shape, SymInt seed, SymInt draw, Tensor? draws, ScalarType dtype) -> Tensor"
    ),
    "affine_noise": f"(Tensor x, Tensor k, Tensor? index, Tensor? noise, {_NOISE}) -> Tensor",
    "guidance_rescale": "(Tensor pos, Tensor neg, Tensor k, Tensor? index, float phi) -> Tensor",
    "guided_step": (
        "(Tensor? pos, Tensor? neg, Tensor x, Tensor k, Tensor? index, Tensor? scale, Tensor? x0_prev, "
        f"Tensor? x0_prev2, Tensor? noise, {_NOISE}) -> (Tensor, Tensor)"
    ),
    "tdft_step": (
        "(Tensor? pos, Tensor? neg, Tensor(a!) x, Tensor(b!)? final, Tensor slots, Tensor(c!) next_slots, "
        "Tensor step, Tensor start, Tensor renoise, Tensor timesteps, Tensor weight, Tensor? latents, "
        "int num_prompts, int stride, int max_steps, int seed, float dropout, bool shuffled, bool naive"
        ") -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "x0_loss": (
        "(Tensor pred, Tensor x_s, Tensor target, Tensor k, Tensor? index, Tensor weight, str kind, float c, "
        "bool want_slope) -> (Tensor, Tensor, Tensor)"
    ),
    "x0_loss_backward": "(Tensor slope, Tensor k, Tensor? index, Tensor weight, Tensor grad) -> Tensor",
    "ema_update": "(Tensor(a!)[] masters, Tensor[] live, Tensor(b!)[] shadows, float decay) -> ()",
}
