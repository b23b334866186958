"""Several processes at one training run, as torchrun starts them. In a process alone all of this does nothing.

Every rank holds the whole adapter and its optimizer, takes its share of every batch, and adds its part of the gradient
to that of the others; then all take the same step. That is data parallelism with nothing but the adapter travelling.
A base that fits one device is whole on each. One that doesn't is split: of every layer's weights each rank keeps
a part, and a layer is gathered when it is its turn and let go after it (PyTorch's `fully_shard`).
"""

import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import LLaMA


def started() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(name: str) -> str:
    """The device of this rank, where "auto" and "cuda" mean one for each. Raises ValueError at one for all."""
    if started()[1] == 1 or name == "cpu":
        return name
    if name not in ("auto", "cuda"):
        raise ValueError(f"--device {name}: of several processes each has its own; say cuda, cpu or auto")
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" or torch.cuda.is_available() else "cpu"


def join(device: torch.device) -> None:
    """Meet the other ranks."""
    if started()[1] > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Lost(Exception):
    """Another rank is gone."""


@contextmanager
def all_ranks():
    """Raises Lost where PyTorch says that a rank is gone, in whatever words it has for it."""
    try:
        yield
    except RuntimeError as error:
        if world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
            raise Lost("another rank has ended") from error
        raise


def add_up(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the ranks, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def highest(number: int, device: torch.device) -> int:
    """The highest that any rank has."""
    if world() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def choose_strategy(strategy: str, weights: int, device: torch.device) -> str:
    """Of "auto", "ddp" or "fsdp" for a base of so many bytes. Raises ValueError where it cannot be split."""
    if strategy == "fsdp" and world() == 1:
        raise ValueError("--strategy fsdp needs several processes: torchrun --nproc_per_node 8 train.py ...")
    if strategy == "fsdp" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        raise ValueError(f"--strategy fsdp needs PyTorch 2.7 or later, this is {torch.__version__}")
    if strategy != "auto":
        return strategy
    if world() == 1 or device.type != "cuda":
        return "ddp"
    return "fsdp" if weights > 0.7 * torch.cuda.get_device_properties(device).total_memory else "ddp"


def splitter(device: torch.device) -> Callable[[nn.Module], None]:
    """What `load_llama` is to do with every layer as soon as it is read, and with the model at the end.

    Embeddings, norm and output head, a few per cent of a large model, stay whole on every rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world(),))

    def split(module: nn.Module) -> None:
        if not isinstance(module, LLaMA):
            fully_shard(module, mesh=mesh)
            return
        whole = {weight for name, weight in module.named_parameters() if not name.startswith("layers.")}
        fully_shard(module, mesh=mesh, ignored_params=whole)
        register_fsdp_forward_method(module, "hidden_states")

    return split
