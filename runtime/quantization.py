"""Weights in fewer bits."""

import math
from collections.abc import Callable

import torch
from torch import nn


def quantizer(bits: int, device: torch.device) -> Callable[[nn.Module], None]:
    """Return a function that rounds the linear weights of a layer, in place, to 8 or 4 bits.

    8: whole numbers and a scale for each row. 4: NF4 of QLoRA (Dettmers et al., 2023), 16 values that suit normally
    distributed weights, a scale for each 64 numbers, itself in 8 bits. They are widened wherever they are used; of
    those in 8 bits autograd would keep the wide ones for the backward pass: train with activation checkpointing. Raises
    ValueError without torchao, or on a device that has no such arithmetic.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4
    except ImportError:
        raise ValueError(f"--bits {bits} needs a package that is not installed: pip install torchao") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--bits {bits} is for cpu and cuda, not for {device.type}")

    def to_8_bits(layer: nn.Module) -> None:
        quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))

    def to_4_bits(layer: nn.Module) -> None:
        for linear in filter(lambda module: isinstance(module, nn.Linear), layer.modules()):
            numbers = linear.weight.numel()
            if numbers % 64:
                shape = " x ".join(map(str, linear.weight.shape))
                raise ValueError(f"--bits 4 takes 64 numbers at a time, and a weight has {shape}")
            scales = math.gcd(numbers // 64, 256)  # of them one scale of its own, as many as divide a small weight's
            nf4 = to_nf4(linear.weight.detach().contiguous(), scaler_block_size=scales)
            linear.weight = nn.Parameter(nf4, requires_grad=False)

    return {8: to_8_bits, 4: to_4_bits}[bits]


def held_bytes(module: nn.Module) -> int:
    """Of all that its weights are made of: a rounded one has numbers and scales inside."""
    total = 0
    for weight in module.parameters():
        inner = getattr(weight, "__tensor_flatten__", None)
        parts = [weight] if inner is None else [getattr(weight, name) for name in inner()[0]]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total
