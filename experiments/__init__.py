"""Reproduce the paper's tables and figures: python -m experiments NAME. The results are saved in results/."""
