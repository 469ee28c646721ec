"""Stage `unet`: text encoder and UNet, trained together on cached latents."""

from __future__ import annotations

import json

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.digits_model.checkpoints import Progress
from selfnpo_fast.scoring.digits.domain import digits_domain

STEPS, BATCH, RATE, EMA, DROPOUT, SEED = 4000, 64, 1e-3, 0.997, 0.1, 2
MAX_TOKENS = 16
"""Token ids per prompt, start, end and padding included."""


def new_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that has each word of the domain as one token, and spells other words."""
    domain = digits_domain()
    words = domain.template.replace("{", "").replace("}", "").split()
    words += [*domain.digits, *domain.ink_names, *domain.background_names]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator([" ".join(sorted(set(words)))], trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokens = sorted({*learned["vocab"], *letters, *(letter + "</w>" for letter in letters)})
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained two-layer CLIP text model over the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """The untrained UNet, 1.1 M parameters: so small that flaws stay visible, as in real models."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


class Denoiser(torch.nn.Module):
    """UNet and text encoder as one module, for one optimiser and one running average."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Predicted noise (B, 4, 8, 8).

        `noisy`: (B, 4, 8, 8), noisy latents.
        `timesteps`: (B,).
        `tokens`: (B, 16), token ids.
        """
        return self.unet(noisy, timesteps, self.text_encoder(tokens).last_hidden_state).sample


def train(latents: torch.Tensor, tokens: torch.Tensor, empty: torch.Tensor, progress: Progress) -> Denoiser:
    """Fits epsilon prediction; returns the running average. Goes on from what `progress` saved.

    `latents`: (N, 4, 8, 8), scaled to unit variance.
    `tokens`: (N, 16) int64, token ids of the latents' prompts.
    `empty`: (1, 16) int64, token ids of the empty prompt, which replaces a share DROPOUT of the
    prompts.
    """
    torch.manual_seed(SEED)
    denoiser = Denoiser(new_unet(), new_text_encoder(new_tokenizer()))
    averaged = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimizer = torch.optim.AdamW(denoiser.parameters(), RATE, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * max(0.02, 1 - step / STEPS)
    )
    alphas_cumprod = new_scheduler().alphas_cumprod
    start = progress.restore(denoiser, averaged, optimizer, schedule)
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(SEED * 10**6 + step)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 4, 8, 8, generator=generator)
        dropped = torch.rand(BATCH, 1, generator=generator) < DROPOUT
        a = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents[rows] + (1 - a).sqrt() * noise
        loss = (denoiser(noisy, timesteps, torch.where(dropped, empty, tokens[rows])) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(denoiser)
        progress.save(step, STEPS, loss, denoiser, averaged, optimizer, schedule)
    return averaged.module
