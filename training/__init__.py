"""What a long run needs around its loop: ranks, a loss that saves memory, metrics and resuming, curves."""
