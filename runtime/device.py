"""Where tensors live and in what dtype: decided here alone."""

import sys

import torch

from runtime.distributed import rank_device, sync_errors


def select_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Of a base: a GPU in bfloat16 if there is one, else Apple's or a CPU in float32, or what is asked for.

    Of several ranks each has a GPU of its own. Raises ValueError, on all of them, where this machine, or this PyTorch,
    has no such device.
    """
    torch.set_float32_matmul_precision("highest")  # float32 means float32, not TF32: bfloat16 is there for speed
    with sync_errors():
        device = rank_device(device)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        try:
            torch.empty(1, device=device).item()
        except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
            raise ValueError(f"device {device!r} is not to be had: {str(error).splitlines()[0]}") from None
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # where NCCL, and whoever says "cuda", will look
    return torch.device(device), getattr(torch, dtype)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, elsewhere the most that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
