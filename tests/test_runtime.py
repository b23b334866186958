"""Devices, compilation, the distributed backend, and running out of memory."""

import os
import random
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import make_adapter, make_model

from generate import decode_step, prefill
from model import KVCache
from runtime import compilation, device, distributed
from runtime.device import select_device
from runtime.errors import is_out_of_memory


def test_device_and_dtype_are_selected():
    assert select_device("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert select_device("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    assert select_device("auto", "auto")[1] == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    for absent in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"device '{absent}' is not available"):
            select_device(absent)
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="'mps' is not available: [^.]*aten::empty.memory_format[^.]*$"):
            select_device("mps")


@pytest.mark.parametrize(
    "threads, busy, environment, advised",
    [
        (2, 1.2, {}, True),
        (2, 0.1, {}, False),  # idle
        (1, 1.2, {}, False),  # a single thread never waits
        (2, 1.2, {"OMP_WAIT_POLICY": "passive"}, False),
    ],
)
def test_shared_cpu_gets_a_hint_about_omp_wait_policy(monkeypatch, capsys, threads, busy, environment, advised):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(device, "busy_cores", lambda: busy)
    select_device("cpu")
    assert ("OMP_WAIT_POLICY=passive" in capsys.readouterr().err) == advised


@pytest.mark.parametrize(
    "dtype, capability, advised",
    [("bfloat16", "AVX2", True), ("bfloat16", "AVX512", False), ("float32", "AVX2", False)],
)
def test_cpu_without_bfloat16_instructions_gets_a_hint(monkeypatch, capsys, dtype, capability, advised):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    select_device("cpu", dtype)
    assert ("no bfloat16 instructions" in capsys.readouterr().err) == advised


def test_busy_cores_are_counted(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (5.0, 0.0, 0.0))
    assert 0 <= device.busy_cores() <= 5
    monkeypatch.delattr(os, "getloadavg")  # as on Windows
    assert device.busy_cores() == 0


def test_select_device_disables_cudnn_attention_and_tf32():
    """cuDNN attention builds a plan for every shape, and TF32 rounds float32. On a CPU the settings have no effect."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True
    select_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("kind, compiler", [("cpu", "C++ compiler"), ("cuda", "C compiler")])
def test_compiling_needs_a_compiler(monkeypatch, kind, compiler):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=f"--compile needs a {re.escape(compiler)}"):
        compilation.prepare_to_compile(torch.device(kind))


def test_cuda_graph_is_recorded_again_for_a_different_cache_or_adaption_prompts(monkeypatch):
    """A graph refers to the memory of the cache and the adaption prompts with which it was recorded."""
    recorded = []

    class Graph:
        def replay(self):
            pass

    def record(step, model, ids, adaption_prompts, cache):
        recorded.append((adaption_prompts, cache))
        return Graph(), ids.clone(), torch.zeros(1)

    class Model:
        def parameters(self):
            yield SimpleNamespace(device=torch.device("cuda"))

    monkeypatch.setattr(compilation, "record_cuda_graph", record)
    decode_step = compilation.compile_decoding(lambda *_: None, Model())
    a, b, first, second = ["prompts"], ["prompts"], object(), object()
    for adaption_prompts, cache in [(a, first), (a, first), (b, first), (b, second), (b, second)]:
        decode_step(Model(), torch.zeros(1), adaption_prompts, cache)
    assert recorded == [(a, first), (b, first), (b, second)]


@pytest.mark.parametrize("has_nccl, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_backend_is_gloo_without_nccl(monkeypatch, has_nccl, backend):
    """PyTorch for Windows has CUDA but no NCCL."""
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, timeout: used.append(name))
    distributed.init_distributed()
    assert used == [backend]


def test_compiled_layers_need_few_graphs():
    """25 random batch shapes and decoding with 5 cache sizes need at most 16 graphs, without graph breaks."""
    model, rng = make_model("gqa"), random.Random(0)
    adapter = make_adapter(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counters = torch._dynamo.utils.counters
    for layer in model.layers:
        layer.compile(dynamic=True, backend="eager")
    for _ in range(25):
        rows, length = rng.randint(1, 8), rng.randint(2, 40)
        model(torch.randint(0, 50, (rows, length)), adapter()).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 8
    with torch.no_grad():
        for extra in range(5):
            cache = KVCache(model, batch=2, capacity=30 + extra)
            prefill(model, [[3] * (4 + extra), [5] * 3], adapter(), cache)
            for _ in range(3):
                decode_step(model, torch.tensor([3, 4]), adapter(), cache)
    assert counters["stats"]["unique_graphs"] <= 16 and not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "error, expected",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognized(error, expected):
    assert is_out_of_memory(error) == expected
