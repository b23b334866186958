"""Weights in fewer bits."""

from torch import nn


def quantize_int8(layers: nn.Module) -> None:
    """Round the layers' linear weights, in place, to 8 bits with a scale per row. Raises ValueError without torchao.

    They are widened again wherever they are used, and autograd would keep the wide ones of all layers for the
    backward pass: train with activation checkpointing.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ValueError("--int8 needs a package that is not installed: pip install torchao") from None
    quantize_(layers, Int8WeightOnlyConfig(set_inductor_config=False))
