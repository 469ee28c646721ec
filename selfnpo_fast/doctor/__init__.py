"""The doctor room: what a training run will need, computed in advance, and a check of it against a real update."""
