"""The paper's tables and figures again: python -m experiments NAME; what it finds is kept in results/."""
