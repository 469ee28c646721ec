"""The rollout room: a reference model walks down a DDIM grid, and its states give training pairs.

A pair is (x_s, s, target): the student's input, its timestep, and what the student's x0 should be.
"""

from selfnpo_fast.rollout.continuous import ContinuousRollout
from selfnpo_fast.rollout.grid import Grid, continuous_frequencies, life_states, lockstep_frequencies
from selfnpo_fast.rollout.lockstep import LockstepDraws, LockstepRollout, lockstep_rollout, walk
from selfnpo_fast.rollout.pairs import GuidedPredictor, PairMaker, Pairs, UpdatePairs, rows_at_hand
from selfnpo_fast.rollout.producer import OverlappedProducer, Producer, join_lanes, rows_in_flight

__all__ = [
    "ContinuousRollout",
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
    "join_lanes",
    "life_states",
    "lockstep_frequencies",
    "lockstep_rollout",
    "rows_at_hand",
    "rows_in_flight",
    "walk",
]
