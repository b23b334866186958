"""The choice of device and dtype, which is made here alone."""

import platform
import sys
from pathlib import Path

import torch

from runtime.distributed import local_rank, world_size


def select_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of the base: by default a GPU in bfloat16, else Apple's GPU or the CPU in float32.

    With several ranks, each one gets a GPU of its own. Raises ValueError if the device is not available.
    """
    torch.set_float32_matmul_precision("highest")  # float32 means float32, not TF32: bfloat16 is there for speed
    if world_size() > 1 and device != "cpu" and (device != "auto" or torch.cuda.is_available()):
        if device not in ("auto", "cuda"):
            raise ValueError(f"--device {device}: with several processes each has its own; use cuda, cpu or auto")
        device = f"cuda:{local_rank()}"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from None
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # the device that NCCL and "cuda" refer to from now on
    return torch.device(device), getattr(torch, dtype)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or the processor, as the driver or Linux has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a GPU, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
