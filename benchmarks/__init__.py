"""Speed and memory, ours and the peers': python -m benchmarks NAME; what it finds is kept in results/."""
