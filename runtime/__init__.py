"""How a program here runs: device and dtype, compilation, int8, files written wholly or not at all, command lines."""
