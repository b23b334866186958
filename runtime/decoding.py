"""Linear layers for decoding, where few rows are multiplied by a weight, and reading the weight takes most of the time.

A packed weight has a layout that suits the instructions of the CPU or GPU. Weights are packed after a model is loaded,
and only if a measurement on this machine shows that this is faster. A weight is (N, K), with N outputs and K inputs.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.cli import warn
from runtime.distributed import broadcast_from_rank0, rank
from runtime.errors import is_out_of_memory
from runtime.quantization import GROUP, QuantizedLinear, quantize, replace_linear, unpack_nibbles

# The maximum number of rows that use the packed weight, keyed by the weight's bits. These numbers are constant: if they
# were measured, responses would vary from run to run.
MAX_ROWS = {4: 64, 8: 32}
LARGE = 2**20  # number of weights; the speed of smaller layers hardly matters, and cannot be measured well


class PackedLinear(nn.Module):
    """A quantized layer with a packed copy of its weight for few rows; more rows go through `layer`.

    PyTorch has a kernel for matrix multiplication with packed 4-bit weights, in bfloat16. An 8-bit weight is packed as
    two 4-bit weights, its upper and its lower four bits, with 2N rows in all; the two results are added. By default,
    `layer` is the quantized layer.
    """

    def __init__(self, quantized: QuantizedLinear, layer: nn.Linear | None = None):
        super().__init__()
        self.layer = quantized if layer is None else layer
        self.bits, self.in_features, self.out_features = quantized.bits, quantized.in_features, quantized.out_features
        # The kernel dequantizes a weight as w = (nibble - 8) * scale + zero.
        q, d = quantized.q, quantized.scales
        if self.bits == 4:
            nibbles = [unpack_nibbles(q)]  # (N, K/32, 32)
            factors = [torch.cat([d, quantized.offsets + 8 * d], dim=2)]  # (N, K/32, 2)
        else:
            unsigned = q.to(torch.int16) + 128
            nibbles = [(unsigned >> 4).to(torch.uint8), (unsigned & 15).to(torch.uint8)]
            factors = [torch.cat([16 * d, 0 * d], dim=2), torch.cat([d, 8 * d], dim=2)]
        padding = (0, 0, 0, 0, 0, -self.out_features % 16)
        numbers = torch.cat([F.pad(each, padding) for each in nibbles]).flatten(1)  # (N|2N, K)
        factors = torch.cat([F.pad(each, padding) for each in factors])  # (N|2N, K/32, 2)
        self.register_buffer("packed", pack(numbers))
        self.register_buffer("factors", factors.transpose(0, 1).to(torch.bfloat16).contiguous())  # (K/32, N|2N, 2)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if x.numel() > MAX_ROWS[self.bits] * self.in_features:
            return self.layer(x)
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)  # (R, in)
        if self.in_features % GROUP:
            rows = F.pad(rows, (0, -self.in_features % GROUP))
        y = packed_product(rows, self.packed, self.factors).to(x.dtype)  # (R, N|2N)
        if self.bits == 8:
            upper, lower = y.chunk(2, dim=1)
            y = upper + lower  # (R, N)
        if self.out_features % 16:
            y = y[:, : self.out_features].contiguous()
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.layer.bias is None else y + self.layer.bias


def pack(nibbles: Tensor) -> Tensor:
    """Pack a uint8 weight (N, K) with values from 0 to 15. N must be a multiple of 16, and K of 32."""
    if nibbles.device.type == "cpu":
        # The operator needs 4 bytes per value, so it gets 1,024 rows at a time, a multiple of its tile height.
        return torch.cat([torch.ops.aten._convert_weight_to_int4pack_for_cpu(n.int(), 1) for n in nibbles.split(1024)])
    return torch.ops.aten._convert_weight_to_int4pack(nibbles[:, ::2] << 4 | nibbles[:, 1::2], 2)


def packed_product(rows: Tensor, packed: Tensor, factors: Tensor) -> Tensor:
    """Multiply rows (R, K) by a packed weight (N, K); return (R, N).

    `rows` and `factors` (K/32, N, 2), the scales and offsets, are bfloat16.
    """
    if rows.device.type == "cpu":
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, GROUP, factors)
    return torch.ops.aten._weight_int4pack_mm(rows, packed, GROUP, factors)


class PackedBfloat16(nn.Module):
    """A linear layer in bfloat16 on a CPU, with its weight in oneDNN's layout, for any number of rows."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.bias = layer.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous(), 1)

    @property
    def weight(self) -> Tensor:
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class RowLinear(nn.Linear):
    """A linear layer for torch.compile on a CPU. For a single row, it multiplies elementwise and sums.

    torch.compile fuses the two operations into one pass over the weight. On an AMD EPYC, this is 1.3 to 3 times as fast
    as a matmul, both in float32 and in bfloat16.
    """

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        layer.weight.data = layer.weight.data.contiguous()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if x.numel() != self.in_features or not torch.compiler.is_compiling():
            return super().forward(x)
        product = (x.reshape(-1).float() * self.weight).sum(dim=1).to(x.dtype)  # (out,)
        product = product.view(*x.shape[:-1], -1)
        return product if self.bias is None else product + self.bias


def largest_linear(model: nn.Module, kind: type) -> nn.Module | None:
    layers = [module for module in model.modules() if type(module) is kind]
    return max(layers, key=lambda layer: layer.in_features * layer.out_features, default=None)


def is_faster(make: Callable[[nn.Module], nn.Module], layer: nn.Module, dtype: torch.dtype, device) -> bool:
    """Return True if make(layer) takes less than nine tenths of the time that `layer` takes for one row.

    Return False if the operator is missing or fails, or if the results differ by more than 5 % (relative L2 norm).
    Raises RuntimeError if memory runs out.
    """
    row = torch.linspace(-1, 1, layer.in_features, dtype=dtype, device=device)[None]
    try:
        other = make(layer)
        actual, expected = other(row), layer(row)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    if (actual - expected).norm() > 0.05 * expected.norm():
        return False
    other_seconds, seconds = (min(seconds_of(each, row) for _ in range(5)) for each in (other, layer))
    return other_seconds < 0.9 * seconds


def seconds_of(layer: nn.Module, row: Tensor) -> float:
    start = time.perf_counter()
    layer(row).sum().item()  # waits for a GPU
    return time.perf_counter() - start


@torch.no_grad()
def prepare_to_decode(model: nn.Module, compiled: bool = False) -> None:
    """Replace the linear layers of a LLaMA with packed ones, in place, if these are faster.

    If quantized layers are replaced, the output head gets a copy in 8 bits for few rows. `compiled` means that the
    decoding step will be compiled; on a CPU, each linear layer that is not quantized then becomes a RowLinear, except
    for the output head if other layers are quantized. The first rank measures for all, because ranks with different
    output heads would choose different tokens. Warns if this machine has no fast kernel for large quantized layers.
    """
    on_cpu = model.device.type == "cpu"
    quantized, linear = largest_linear(model, QuantizedLinear), largest_linear(model, nn.Linear)
    if quantized is not None:
        if broadcast_from_rank0(lambda: is_faster(PackedLinear, quantized, model.dtype, model.device)):
            replace_linear(model.layers, QuantizedLinear, PackedLinear)
            model.output = PackedLinear(quantize(model.output, 8), model.output)
            linear = largest_linear(model.layers, nn.Linear)  # the largest layer that is not quantized, if there is one
        elif rank() == 0 and quantized.in_features * quantized.out_features >= LARGE:
            warn(f"this machine has no fast kernel for {quantized.bits}-bit weights; dequantizing them for every token")
    if linear is None or not on_cpu:
        return
    rest = model if quantized is None else model.layers
    if compiled:
        replace_linear(rest, nn.Linear, RowLinear)
    elif model.dtype == torch.bfloat16:
        if broadcast_from_rank0(lambda: is_faster(PackedBfloat16, linear, model.dtype, model.device)):
            replace_linear(rest, nn.Linear, PackedBfloat16)
