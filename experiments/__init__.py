"""Reproduce the paper's tables and figures: python -m experiments COMMAND. The results are saved in results/."""
