"""torch.compile, for training and for decoding, and CUDA graphs."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn


def prepare_to_compile(device: torch.device) -> None:
    """Before anything is compiled. Raises ValueError where torch.compile would fail later."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise ValueError("--compile needs a C++ compiler, such as g++, and there is none")
    if device.type == "cuda" and not any(map(shutil.which, (os.environ.get("CC", "gcc"), "cc", "clang", "cl"))):
        raise ValueError("--compile needs a C compiler on a GPU too, such as gcc, and there is none")
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


def compile_decoding(decode_step: Callable[..., Tensor], model: nn.Module) -> Callable[..., Tensor]:
    """`decode_step(model, ids, prompts, cache)` under torch.compile.

    On a GPU it is recorded as one CUDA graph at the first step of each generation.
    """
    compiled = torch.compile(decode_step)
    if next(model.parameters()).device.type != "cuda":
        return compiled
    recorded = None  # with the cache and the adaption prompts that it reads, wherever they lie

    def replay(model: nn.Module, ids: Tensor, adaption_prompts, cache) -> Tensor:
        nonlocal recorded
        if recorded is None or recorded[0] is not cache or recorded[1] is not adaption_prompts:
            recorded = None  # the memory of the one before
            graph = record_cuda_graph(compiled, model, ids, adaption_prompts, cache)
            recorded = (cache, adaption_prompts, *graph)
        *_, graph, newest, logits = recorded
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
