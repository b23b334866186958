"""The default number of positions per forward pass: as many as fit into the memory of a GPU, and 1,024 on a CPU."""

import torch

from data import MICRO_BATCH_TOKENS
from model import Config, LLaMA
from runtime.distributed import all_reduce_max, print_rank0
from training.loss import ROWS


def activation_bytes(config: Config, adapted: int, itemsize: int, checkpoint_activations: bool) -> int:
    """Return the bytes of activations per position: those saved for backward, plus those of the layer being computed.

    Each of the `adapted` layers saves seven vectors of width C and three of the feed-forward width, with `itemsize`
    bytes per number. With checkpointing, a layer saves only its input, and one layer at a time is recomputed.
    """
    layer = 7 * config.dim + 3 * config.hidden_dim
    if checkpoint_activations:
        return itemsize * (adapted * config.dim + 2 * layer)
    return itemsize * (adapted + 1) * layer


def logit_bytes(config: Config, rows: int, itemsize: int) -> int:
    """Return the peak bytes of the loss for `rows` positions: logits, their float32 copy, and log p in float32."""
    return rows * config.vocab_size * (itemsize + 4 + 4)  # the gradient overwrites log p


def positions_that_fit(
    model: LLaMA, adapted: int, checkpoint_activations: bool, total_memory: int, weights: int
) -> int:
    """Return the number of positions per forward pass, from 256 to 8,192, for a GPU with `total_memory` bytes.

    `weights` is the number of bytes already allocated. A tenth of the memory is left to CUDA and fragmentation. Room is
    also reserved for the logits of 1,024 positions, and for two whole layers, which a sharded base gathers. The result
    is a multiple of 256, so that it does not change with a few bytes of memory.
    """
    gathered = max(sum(weight.nbytes for weight in layer.parameters()) for layer in model.layers)
    logits = logit_bytes(model.config, ROWS["cuda"], model.dtype.itemsize)
    room = 0.9 * total_memory - weights - logits - 2 * gathered
    per_position = activation_bytes(model.config, adapted, model.dtype.itemsize, checkpoint_activations)
    return min(MICRO_BATCH_TOKENS, max(256, int(room / per_position) // 256 * 256))


def default_micro_batch_tokens(device: torch.device) -> int:
    """Return the number of positions per forward pass for a device whose memory does not limit it."""
    # On a CPU, matrix products are no faster with more rows, and small micro-batches have less padding.
    return 1024 if device.type == "cpu" else MICRO_BATCH_TOKENS


def choose_micro_batch_tokens(model: LLaMA, adapted: int, checkpoint_activations: bool) -> int:
    """Choose the number of positions per forward pass from the memory of the model's GPU, and print it.

    All ranks use the smallest of their numbers. On devices other than CUDA GPUs, it is the default, and not printed.
    """
    if model.device.type != "cuda":
        return default_micro_batch_tokens(model.device)
    memory = torch.cuda.get_device_properties(model.device).total_memory
    weights = torch.cuda.memory_allocated(model.device)
    positions = positions_that_fit(model, adapted, checkpoint_activations, memory, weights)
    positions = -all_reduce_max(-positions)
    print_rank0(f"{positions:,} positions per forward pass, for a GPU of {memory / 1e9:.0f} GB (--micro-batch-tokens)")
    return positions
