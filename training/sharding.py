"""Where the frozen base is while several ranks train: whole on each, or split over them.

A base that fits one device is whole on each. One that doesn't is split: of every layer's weights each rank keeps
a part, and a layer is gathered when it is its turn and let go after it (PyTorch's `fully_shard`).
"""

from collections.abc import Callable

import torch
from torch import nn

from model import LLaMA
from runtime.distributed import all_reduce_max, world_size


def too_large(weights: int, memory: int) -> bool:
    """Whether so many bytes of a base leave too little of a device's memory to be whole on each."""
    return weights > 0.7 * memory


def choose_strategy(strategy: str, weights: int, device: torch.device) -> str:
    """ "ddp" or "fsdp", on all ranks the same; "auto" goes by the bytes of the base.

    Raises ValueError where it cannot be split.
    """
    if strategy == "auto":
        large = device.type == "cuda" and too_large(weights, torch.cuda.get_device_properties(device).total_memory)
        strategy = "fsdp" if all_reduce_max(int(world_size() > 1 and large)) else "ddp"
    if strategy == "fsdp" and world_size() == 1:
        raise ValueError("--strategy fsdp needs several processes: torchrun --nproc_per_node 8 train.py ...")
    if strategy == "fsdp" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        raise ValueError(f"--strategy fsdp needs PyTorch 2.7 or later, this is {torch.__version__}")
    return strategy


def fsdp_sharder(device: torch.device) -> Callable[[nn.Module], None]:
    """Return a function that shards a layer as soon as `load_model` has read it, and at the end the whole model.

    Embeddings, norm and output head, a few per cent of a large model, stay whole on every rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))

    def split(module: nn.Module) -> None:
        if not isinstance(module, LLaMA):
            fully_shard(module, mesh=mesh)
            return
        whole = {weight for name, weight in module.named_parameters() if not name.startswith("layers.")}
        fully_shard(module, mesh=mesh, ignored_params=whole)
        register_fsdp_forward_method(module, "hidden_states")

    return split
