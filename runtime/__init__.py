"""Runtime support: device and dtype, ranks, compilation, quantization, atomic file writes, command-line helpers."""
