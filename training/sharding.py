"""Placement of the frozen base when several ranks train: replicated on every rank, or sharded over them.

A base that fits on one device is replicated. Otherwise it is sharded: each rank keeps a shard of the weights of every
layer, and a layer is gathered when it is needed and freed afterwards (PyTorch's `fully_shard`).
"""

from collections.abc import Callable

import torch
from torch import nn

from model import LLaMA
from runtime.distributed import all_reduce_max, world_size


def too_large(weights: int, memory: int) -> bool:
    """Return True if a base of `weights` bytes leaves too little of a device's memory to be replicated."""
    return weights > 0.7 * memory


def choose_strategy(strategy: str, weights: int, device: torch.device) -> str:
    """Return "ddp" or "fsdp", the same on all ranks. "auto" depends on `weights`, the size of the base in bytes.

    Raises ValueError if the base is to be sharded, but there is only one rank, or PyTorch is older than 2.7.
    """
    if strategy == "auto":
        large = device.type == "cuda" and too_large(weights, torch.cuda.get_device_properties(device).total_memory)
        strategy = "fsdp" if all_reduce_max(int(world_size() > 1 and large)) else "ddp"
    if strategy == "fsdp" and world_size() == 1:
        raise ValueError("--strategy fsdp needs several processes; use torchrun --nproc_per_node 8 train.py ...")
    if strategy == "fsdp" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        found = f"needs PyTorch 2.7 or later, but this is {torch.__version__}"
        raise ValueError(f"--strategy fsdp, which auto chooses for a large base, {found}; upgrade it, or use ddp")
    return strategy


def fsdp_sharder(device: torch.device) -> Callable[[nn.Module], None]:
    """Return a function that shards a module in place. Call it for each loaded layer, then for the model.

    Embeddings, norm and output head are replicated on every rank; they are 4 % of LLaMA-7B, and 13 % of Llama 3 8B.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))

    def shard(module: nn.Module) -> None:
        if not isinstance(module, LLaMA):
            fully_shard(module, mesh=mesh)
            return
        replicated = {weight for name, weight in module.named_parameters() if not name.startswith("layers.")}
        fully_shard(module, mesh=mesh, ignored_params=replicated)
        register_fsdp_forward_method(module, "hidden_states")

    return shard
