"""Reproduce the paper's tables and figures: python -m experiments COMMAND. Results are in experiments/results/."""
