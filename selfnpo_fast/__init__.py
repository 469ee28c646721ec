"""Negative preference models for diffusion, trained from prompts alone (Self-NPO)."""

__version__ = "0.1.0"
