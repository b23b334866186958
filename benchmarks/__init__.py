"""Speed and memory on this machine, ours and others' in the same run."""
