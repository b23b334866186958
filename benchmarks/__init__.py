"""Benchmarks of speed and memory on this machine. Other implementations can be measured in the same run."""
