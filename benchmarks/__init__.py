"""Benchmarks of speed and memory. Some can also measure other implementations in the same run."""
