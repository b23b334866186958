"""Training support: options, sharding, memory-efficient loss, metrics, checkpoints, and plots."""
