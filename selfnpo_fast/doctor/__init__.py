"""The doctor room: what a training run will need, computed, and compared with a real update."""
