"""The rollout engine: a reference model walks down a DDIM grid and leaves training pairs (x_s, s, target)."""

from selfnpo_fast.rollout.continuous import ContinuousRollout
from selfnpo_fast.rollout.grid import Grid, continuous_frequencies, life_states, lockstep_frequencies
from selfnpo_fast.rollout.lockstep import LockstepDraws, LockstepRollout, lockstep_rollout, walk
from selfnpo_fast.rollout.pairs import GuidedPredictor, PairMaker, Pairs, UpdatePairs
from selfnpo_fast.rollout.producer import OverlappedProducer, Producer
from selfnpo_fast.runtime.capture import CudaGraphs, no_capture

__all__ = [
    "ContinuousRollout",
    "CudaGraphs",
    "Grid",
    "GuidedPredictor",
    "LockstepDraws",
    "LockstepRollout",
    "OverlappedProducer",
    "PairMaker",
    "Pairs",
    "Producer",
    "UpdatePairs",
    "continuous_frequencies",
    "life_states",
    "lockstep_frequencies",
    "lockstep_rollout",
    "no_capture",
    "walk",
]
