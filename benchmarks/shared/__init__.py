"""What several benchmarks use: running and measuring, synthetic checkpoints, other programs."""
