"""Frozen linear layers whose weights are stored in 8 or 4 bits.

The weight of a layer is (N, K), with N outputs and K inputs. Each group of 32 columns of a row has a scale d and, with
4 bits, an offset m. A weight is w = d*q + m, where q is an integer. These are the blocks Q8_0 and Q4_1 of GGUF, but
with scales and offsets in float32. Weights are dequantized when they are used. On a CPU, this is done for a few rows at
a time (except during torch.compile), so that the whole dequantized matrix never exists. runtime/decoding.py has a
faster matmul for few rows of inputs.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32  # columns that share a scale
# The number of elements of q that are dequantized at a time (with 4 bits, each contains two weights), or of weights
# that are quantized at a time. On a CPU, the result fits into its cache.
CHUNK = {"cpu": 2**20, "cuda": 2**26}


def unpack_nibbles(q: Tensor) -> Tensor:
    """Unpack q, uint8 (N, K/32, 16) with two values per byte, to uint8 (N, K/32, 32) with values from 0 to 15.

    The order of the values is described in `chunks`.
    """
    return torch.cat([q & 15, q >> 4], dim=2)


def chunks(q: Tensor, scales: Tensor, offsets: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the weight (N, K), dequantized to `dtype`, in pieces (n, K) of a few rows, or whole during torch.compile.

    q is int8 (N, K/32, 32), or uint8 (N, K/32, 16) with two values per byte: the first half of a group is in the lower
    four bits, and the second half in the upper four. scales and offsets are float32 (N, K/32, 1).
    """
    rows = len(q)
    if not torch.compiler.is_compiling():  # the compiler would unroll the loop
        rows = max(1, CHUNK.get(q.device.type, CHUNK["cuda"]) // q[0].numel())
    for start in range(0, len(q), rows):
        end = start + rows
        numbers = q[start:end]
        if offsets is None:
            weights = numbers * scales[start:end]  # (n, K/32, 32), in float32
        else:
            weights = (unpack_nibbles(numbers) * scales[start:end]).add_(offsets[start:end])
        yield weights.flatten(1).to(dtype)


class ChunkedProduct(torch.autograd.Function):
    """x @ w.T for a quantized weight w, and the gradient with respect to x. Only w is saved for backward, quantized."""

    @staticmethod
    def forward(context, x: Tensor, q: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor:
        context.save_for_backward(q, scales, offsets)
        return torch.cat([x @ piece.T for piece in chunks(q, scales, offsets, x.dtype)], dim=-1)

    @staticmethod
    def backward(context, gradient: Tensor):
        q, scales, offsets = context.saved_tensors
        total, start = 0.0, 0  # accumulated in float32
        for piece in chunks(q, scales, offsets, gradient.dtype):
            total = total + (gradient[..., start : start + len(piece)] @ piece).float()
            start += len(piece)
        return total.to(gradient.dtype), None, None, None


class QuantizedLinear(nn.Module):
    """A frozen linear layer with a quantized weight (out, in), in the form that `chunks` describes.

    If the stored weight has more columns than the layer has inputs, the inputs are padded with zeros.
    """

    def __init__(self, q: Tensor, scales: Tensor, offsets: Tensor | None, in_features: int, bias: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, len(q)
        self.register_buffer("q", q)
        self.register_buffer("scales", scales)
        self.register_buffer("offsets", offsets)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def bits(self) -> int:
        return 8 if self.offsets is None else 4

    @property
    def stored_columns(self) -> int:
        return self.q[0].numel() * 8 // self.bits

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantized weight (out, in)."""
        return torch.cat(list(chunks(self.q, self.scales, self.offsets, dtype)))[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.stored_columns != self.in_features:
            x = F.pad(x, (0, self.stored_columns - self.in_features))
        y = ChunkedProduct.apply(x, self.q, self.scales, self.offsets)
        return y if self.bias is None else y + self.bias


def round_to_8_bits(weight: Tensor) -> tuple[Tensor, Tensor, None]:
    """Round a weight (N, K) to the nearest of 255 values. Return q, scales, and None for the offsets.

    The values are evenly spaced between plus and minus the largest magnitude in each group. K must be a multiple of 32.
    q is int8 (N, K/32, 32), and the scales are float32 (N, K/32, 1).
    """
    groups = weight.float().unflatten(1, (-1, GROUP))  # (N, K/32, 32)
    scales = groups.abs().amax(dim=2, keepdim=True).clamp_(min=1e-30) / 127  # (N, K/32, 1)
    return (groups * (1 / scales)).round_().to(torch.int8), scales, None


def round_to_4_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight (N, K) to the nearest of 16 values. Return q, scales and offsets.

    The values are evenly spaced from the smallest to the largest weight of each group. K must be a multiple of 32.
    q is uint8 (N, K/32, 16), two values per byte, and scales and offsets are float32 (N, K/32, 1).
    """
    groups = weight.float().unflatten(1, (-1, GROUP))  # (N, K/32, 32)
    least, greatest = groups.aminmax(dim=2, keepdim=True)  # (N, K/32, 1)
    scales = ((greatest - least) / 15).clamp_(min=1e-30)
    q = (groups - least).mul_(1 / scales).round_().to(torch.uint8)
    first, second = q.chunk(2, dim=2)
    return first | second << 4, scales, least


def quantize(linear: nn.Linear, bits: int) -> QuantizedLinear:
    """Return the linear layer with its weight quantized to 8 or 4 bits, a few rows at a time. The bias is kept."""
    weight = linear.weight.detach()
    N, K = weight.shape
    round_rows = {8: round_to_8_bits, 4: round_to_4_bits}[bits]
    rows = max(1, CHUNK.get(weight.device.type, CHUNK["cuda"]) // K)
    pieces = [round_rows(F.pad(piece, (0, -K % GROUP))) for piece in weight.split(rows)]
    q, scales, offsets = (None if parts[0] is None else torch.cat(parts) for parts in zip(*pieces))
    return QuantizedLinear(q, scales, offsets, K, linear.bias)


def replace_linear(model: nn.Module, kind: type, make: Callable[[nn.Module], nn.Module]) -> None:
    """Replace each layer of exactly the type `kind` inside the model with make(layer), in place.

    The layers of one module are freed before those of the next one are replaced.
    """
    for parent in [module for module in model.modules() if type(module) is not kind]:
        for name, module in list(parent.named_children()):
            if type(module) is kind:
                setattr(parent, name, make(module))


def quantizer(bits: str | None) -> Callable[[nn.Module], None] | None:
    """Return a function that quantizes the linear layers in a module, in place, or None if `bits` is not "8" or "4"."""
    if bits not in ("8", "4"):
        return None

    return lambda layer: replace_linear(layer, nn.Linear, lambda linear: quantize(linear, int(bits)))


def num_weights(model: nn.Module) -> int:
    """Return the number of weights of a model, including quantized ones."""
    quantized = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters + sum(layer.in_features * layer.out_features for layer in quantized)


def held_bytes(module: nn.Module) -> int:
    """Return the number of bytes of the parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
