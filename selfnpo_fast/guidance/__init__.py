"""Guidance by a negative: attached to stock pipelines, in the fast sampler, and measured."""
