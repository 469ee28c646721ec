"""The benchmarks. Like the commands, they share the cores of a busy machine."""

from selfnpo_fast.runtime.command import limit_spinning

limit_spinning()  # before a benchmark imports torch
