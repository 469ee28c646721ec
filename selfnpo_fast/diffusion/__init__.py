"""Noise schedules and solvers as tables of coefficients.

Equation numbers without a source, here and in all of the project, are those of the paper
"Self-NPO: Data-Free Diffusion Model Enhancement via Truncated Diffusion Fine-Tuning" (Fu-Yun Wang,
Keqiang Sun, Yao Teng, Xihui Liu, Jiale Yuan, Jiaming Song, Hongsheng Li; AAAI 2026,
https://arxiv.org/abs/2505.11777, numbering of its second version). They are coded in:

    Eq. 1, 4    guidance              kernels/selfnpo_kernels/ops.py: guided_step
                its variance          selfnpo_fast/guidance/correlation.py
    Eq. 2, 12   estimate x_{t->0}     selfnpo_fast/diffusion/levels.py: x0_coefficients
    Eq. 7       mixed negative        selfnpo_fast/negatives/weights.py: mix
    Eq. 13, 14  start, truncation     selfnpo_fast/rollout/lockstep.py: LockstepRollout
                                      selfnpo_fast/rollout/continuous.py: ContinuousRollout
    Eq. 15      naive re-noising      selfnpo_fast/diffusion/levels.py: forward_coefficients
    Eq. 16      re-noising            selfnpo_fast/diffusion/levels.py: renoise_coefficients
                of pairs, 15 and 16   selfnpo_fast/rollout/grid.py: Grid.noised
                                      kernels/selfnpo_kernels/ops.py: tdft_step
    Eq. 17      loss                  selfnpo_fast/training/objective.py
                                      kernels/selfnpo_kernels/ops.py: x0_loss
"""
