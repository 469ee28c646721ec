"""Negative guidance at inference: the positive model's output is pushed away from the negative model's."""
