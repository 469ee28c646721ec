"""The training room: one run, from its inputs to its negative model, checkpoints and record."""
