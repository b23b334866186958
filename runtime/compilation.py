"""torch.compile, for training and for decoding, CUDA graphs, and layouts of weights that suit a CPU."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn


def prepare_to_compile(device: torch.device, bits: str | None = None) -> None:
    """Before anything is compiled. Raises ValueError where torch.compile would fail later."""
    if bits and device.type == "cpu":
        raise ValueError(f"--bits {bits} and --compile go together on a GPU only")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise ValueError("--compile needs a C++ compiler, such as g++, and there is none")
    # Kinds of call; with the default of 8 the later ones would go back to plain PyTorch.
    torch._dynamo.config.cache_size_limit = 32


def compile_layers(layers: nn.ModuleList) -> None:
    """torch.compile every layer, in place; its code is compiled anew only for a few kinds of call.

    Below the adapted layers, and among them; for one row and for several; with and without gradients. Lengths and
    numbers of rows are variables of that code.
    """
    for layer in layers:
        layer.compile(dynamic=True)


def transpose_output_head(head: nn.Linear) -> None:
    """Let the weight (V, C) lie in memory as (C, V).

    In float32 on a CPU one row goes through it up to three times as fast; in bfloat16 it would take four times as long.
    """
    head.weight.data = head.weight.data.T.contiguous().T


@torch.library.custom_op("llama_adapter::matrix_times_vector", mutates_args=())
def matrix_times_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """torch.mv, of which torch.compile would make a product and a sum: for large matrices that is slower."""
    return torch.mv(matrix, vector)


@matrix_times_vector.register_fake
def _(matrix: Tensor, vector: Tensor) -> Tensor:
    return vector.new_empty(len(matrix))


LARGE = 2**21  # numbers of a matrix


class RowLinear(nn.Linear):
    """For decoding on a CPU: a single row goes through the weights as fast as they can be read.

    In bfloat16 the library's matrix product takes up to twice as long as its product with a vector. Compiled, a small
    one is best as a product and a sum, which become one pass over the weights. The same as the linear layer without
    bias that it takes the weight of.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        linear.weight.data = linear.weight.data.contiguous()
        self.weight, self.bias = linear.weight, None
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if x.numel() != x.shape[-1]:
            return super().forward(x)
        row = x.view(-1)
        if not torch.compiler.is_compiling():
            product = torch.mv(self.weight, row)
        elif self.weight.numel() > LARGE:
            product = matrix_times_vector(self.weight, row)
        else:
            product = (row.float() * self.weight).sum(dim=1).to(x.dtype)
        return product.view(*x.shape[:-1], -1)


def decode_by_rows(model: nn.Module) -> None:
    """Replace all linear layers without bias by RowLinear, which in bfloat16 on a CPU is faster even uncompiled."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.Linear and module.bias is None:
                setattr(parent, name, RowLinear(module))


def compile_decoding(decode_step: Callable[..., Tensor], model: nn.Module) -> Callable[..., Tensor]:
    """`decode_step(model, ids, prompts, cache)` under torch.compile.

    On a GPU it is recorded as one CUDA graph at the first step of each generation. On a CPU the linear layers without
    bias are replaced, in place, by `RowLinear`.
    """
    compiled = torch.compile(decode_step)
    if next(model.parameters()).device.type != "cuda":
        decode_by_rows(model)
        return compiled
    recorded = None  # with the cache that it reads and writes, wherever that lies

    def replay(model: nn.Module, ids: Tensor, adaption_prompts, cache) -> Tensor:
        nonlocal recorded
        if recorded is None or recorded[0] is not cache:
            recorded = None  # the memory of the one before
            recorded = (cache, *record_cuda_graph(compiled, model, ids, adaption_prompts, cache))
        _, graph, newest, logits = recorded
        newest.copy_(ids)
        graph.replay()
        return logits

    return replay


def record_cuda_graph(
    decode_step: Callable[..., Tensor], model: nn.Module, ids: Tensor, adaption_prompts, cache
) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    """A CUDA graph of one step, where it reads the ids, and where it leaves the logits; the cache stays as it was."""
    newest, lengths = ids.clone(), cache.lengths.clone()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        decode_step(
            model, newest, adaption_prompts, cache
        )  # compiles; what it writes, the first replay will write again
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decode_step(model, newest, adaption_prompts, cache)
    cache.lengths.copy_(lengths)
    return graph, newest, logits
