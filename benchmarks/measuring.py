"""Seconds, bytes, and what the machine has to give."""

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

MATRIX = {"cuda": 8192, "cpu": 2048}  # rows and columns; small ones would not keep the device busy
COPIED = {"cuda": 2**28, "cpu": 2**26}  # numbers of 4 bytes; fewer would fit a cache


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes, the GPU's part included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    n = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(8))


def copy_speed(device: torch.device) -> float:
    """Bytes/s that a large copy moves, read and written."""
    source = torch.zeros(COPIED.get(device.type, COPIED["cpu"]), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(8))


def peak_growth(work: Callable[[], object], device: torch.device) -> int:
    """By how many bytes tensors on the GPU, or on a CPU (under Linux) the process, grew meanwhile, at most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before counts as free
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """A field of this process's status, as Linux has it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def interleave(works: dict[str, Callable[[], object]], repeat: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each, round by round, so that a slow moment of the machine hits all alike; one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    bar = tqdm(list(itertools.product(range(repeat + 1), works.items())), unit="run", leave=False)
    for turn, (name, work) in bar:
        bar.set_postfix_str(name)
        taken = seconds_of(work, device)
        if turn:
            seconds[name].append(taken)
    return seconds


def compare_seconds(seconds: dict[str, list[float]], first: str) -> dict[str, dict]:
    """Median, and how many times as long as `first`, round by round: median, least and most."""
    rows = {}
    for name, taken in seconds.items():
        ratios = [mine / its for mine, its in zip(taken, seconds[first])]
        spread = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        rows[name] = {"seconds": taken, "median": statistics.median(taken), "ratio": spread}
    return rows
