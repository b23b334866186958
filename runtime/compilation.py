"""torch.compile for training and decoding, and CUDA graphs."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn


def prepare_to_compile(device: torch.device) -> None:
    """Configure torch.compile. Call this before anything is compiled.

    Raises ValueError if no compiler is installed; without this check, torch.compile would fail only later.
    """
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise ValueError("--compile needs a C++ compiler, such as g++; no compiler was found")
    if device.type == "cuda" and not any(map(shutil.which, (os.environ.get("CC", "gcc"), "cc", "clang", "cl"))):
        raise ValueError("--compile needs a C compiler, such as gcc, to use a GPU; no compiler was found")
    # The maximum number of compiled versions per function. After the default of 8, new kinds of calls run uncompiled.
    torch._dynamo.config.cache_size_limit = 32


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile every layer in place, with dynamic lengths and batch sizes.

    A layer is compiled once for each kind of call: with or without an adaption prompt, for one row or for several, and
    with or without gradients.
    """
    for layer in layers:
        layer.compile(dynamic=True)


def transpose_output_head(head: nn.Linear) -> None:
    """Store the weight (V, C) transposed in memory, as (C, V); its shape stays the same.

    In float32 on a CPU, this makes the head up to three times as fast for a single row of inputs. In bfloat16, it
    would make the head four times as slow.
    """
    head.weight.data = head.weight.data.T.contiguous().T


def compile_decoding(decode_step: Callable[..., Tensor], model: nn.Module) -> Callable[..., Tensor]:
    """Return a compiled `decode_step(model, ids, adaption_prompts, cache)`.

    On a CUDA GPU, the first step with a cache and its adaption prompts is recorded as a CUDA graph. That step and all
    later ones with the same cache and adaption prompts replay the graph, and each overwrites the logits of the previous
    one.
    """
    compiled = torch.compile(decode_step)
    if next(model.parameters()).device.type != "cuda":
        return compiled
    recorded = None  # the CUDA graph, with the cache and the adaption prompts whose memory it reads

    def replay(model: nn.Module, ids: Tensor, adaption_prompts, cache) -> Tensor:
        nonlocal recorded
        if recorded is None or recorded[0] is not cache or recorded[1] is not adaption_prompts:
            recorded = None  # frees the memory of the previous graph
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
    """Record one step as a CUDA graph. Return the graph, its input ids and its output logits.

    The lengths of the cache are restored afterwards.
    """
    newest, lengths = ids.clone(), cache.lengths.clone()
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        # The first call compiles. The first replay overwrites the keys and values that this call writes.
        decode_step(model, newest, adaption_prompts, cache)
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decode_step(model, newest, adaption_prompts, cache)
    cache.lengths.copy_(lengths)
    return graph, newest, logits
