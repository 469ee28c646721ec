"""What all rooms stand on: errors, log, options, folders, ranks, dtypes, CUDA graphs."""
