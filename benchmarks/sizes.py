"""Configurations of published LLaMA models, for benchmarks and tests. Loading a checkpoint does not use them."""

from formats.rope import llama3_rope_factors
from model import Config

SCALED = {"Llama-3.2-1B": 32.0, "Llama-3.2-3B": 32.0, "Llama-3.1-8B": 8.0}  # scaling factors of the rotary embedding


def scaled(size: str, head_dim: int) -> tuple[float, ...]:
    return llama3_rope_factors(head_dim, 5e5, SCALED[size])


SIZES = {
    #                 dim  layers heads kv  D  hidden   vocab   eps    theta rope factors, context
    "TinyLlama-1.1B": Config(2048, 22, 32, 4, 64, 5632, 32000, 1e-5, 1e4, None, 2048),
    "Llama-3.2-1B": Config(2048, 16, 32, 8, 64, 8192, 128256, 1e-5, 5e5, scaled("Llama-3.2-1B", 64), 131072),
    "Llama-3.2-3B": Config(3072, 28, 24, 8, 128, 8192, 128256, 1e-5, 5e5, scaled("Llama-3.2-3B", 128), 131072),
    "LLaMA-7B": Config(4096, 32, 32, 32, 128, 11008, 32000, 1e-6, 1e4, None, 2048),
    "Llama-2-7B": Config(4096, 32, 32, 32, 128, 11008, 32000, 1e-5, 1e4, None, 4096),
    "Llama-3-8B": Config(4096, 32, 32, 8, 128, 14336, 128256, 1e-5, 5e5, None, 8192),
    "Llama-3.1-8B": Config(4096, 32, 32, 8, 128, 14336, 128256, 1e-5, 5e5, scaled("Llama-3.1-8B", 128), 131072),
    "LLaMA-13B": Config(5120, 40, 40, 40, 128, 13824, 32000, 1e-6, 1e4, None, 2048),
    "Llama-2-13B": Config(5120, 40, 40, 40, 128, 13824, 32000, 1e-5, 1e4, None, 4096),
    "LLaMA-33B": Config(6656, 60, 52, 52, 128, 17920, 32000, 1e-6, 1e4, None, 2048),
    "LLaMA-65B": Config(8192, 80, 64, 64, 128, 22016, 32000, 1e-5, 1e4, None, 2048),
    "Llama-2-70B": Config(8192, 80, 64, 8, 128, 28672, 32000, 1e-5, 1e4, None, 4096),
    "Llama-3-70B": Config(8192, 80, 64, 8, 128, 28672, 128256, 1e-5, 5e5, None, 8192),
}
