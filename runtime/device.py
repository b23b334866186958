"""Select the device and dtype of a command, copy values to the device, and report its name and peak memory."""

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

import torch

from runtime.distributed import local_rank, print_rank0, world_size
from runtime.files import first_line


def select_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of the base.

    The default is a CUDA GPU with bfloat16; if there is none, it is Apple's GPU or the CPU with float32. With several
    ranks, each one gets its own CUDA GPU, which becomes the current device, or they share the CPU. Disables TF32 and
    cuDNN's attention for the whole process. Prints advice if other processes use much of the CPU, or if it is slow in
    bfloat16. Raises ValueError if the device is not available.
    """
    torch.set_float32_matmul_precision("highest")  # float32 means float32, not TF32; use bfloat16 for speed
    torch.backends.cudnn.allow_tf32 = False  # the same for the convolution of a vision encoder
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN would build a plan for each new batch shape, up to 0.5 s each
    if world_size() > 1 and device != "cpu" and (device != "auto" or torch.cuda.is_available()):
        if device not in ("auto", "cuda"):
            raise ValueError(
                f"--device {device}: with several processes, each has its own device; use cuda, cpu or auto"
            )
        device = f"cuda:{local_rank()}"
    if device == "auto" and world_size() > 1:
        device = "cpu"  # gloo, which connects the ranks, does not exchange tensors of Apple's GPU
    elif device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = first_line(error).split(". ")[0]  # PyTorch continues with advice for its own developers
        advice = "; start at most one process per GPU" if world_size() > 1 and device.startswith("cuda") else ""
        raise ValueError(f"device {device!r} is not available: {reason}{advice}") from None
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # the device that NCCL and "cuda" refer to from now on
    elif device == "cpu":
        advise_on_threads()
        advise_on_dtype(dtype)
    return torch.device(device), getattr(torch, dtype)


def advise_on_threads() -> None:
    """Print how to share the CPU, if other processes use so much of it that threads of this process would wait.

    The threads of OpenMP spin while they wait for each other. With one other busy process, this has made training up
    to seven times slower. OMP_WAIT_POLICY is read when torch is loaded, so it cannot be set here.
    """
    threads, cores, busy = torch.get_num_threads(), os.cpu_count() or 1, busy_cores()
    if threads > 1 and busy > 0.5 and threads + busy > cores + 0.5 and "OMP_WAIT_POLICY" not in os.environ:
        print_rank0(
            f"other processes use about {min(busy, cores):.0f} of {cores} cores, and this one has {threads} threads; "
            f"it may be faster with OMP_WAIT_POLICY=passive in the environment"
        )


def advise_on_dtype(dtype: str) -> None:
    """Print that float32 is faster than bfloat16, if this CPU has no instructions for bfloat16."""
    if dtype == "bfloat16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        print_rank0(
            "this CPU has no bfloat16 instructions: training and long prompts are several times slower than with "
            "--dtype float32, which needs twice the memory for the base"
        )


def busy_cores() -> float:
    """Estimate the number of cores that other processes use, from the load average of the last minute.

    On Linux, the estimate is at most the number of other threads that are running or runnable now.
    """
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return 0.0
    with suppress(OSError):
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
        load = min(load, running - 1)  # without this thread
    return load


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor, copied from the CPU to the device. The host does not wait for a CUDA GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def device_name(device: torch.device) -> str:
    """Return the name of the CUDA GPU, or of the processor for any other device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes.

    On a CUDA GPU, this is the memory of the tensors. On other devices, it is the memory of the process, or 0 on
    Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
