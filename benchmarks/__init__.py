"""Benchmarks of the speed and memory of this implementation, and of others in the same run."""
