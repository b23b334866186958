"""How many positions a forward pass may have, by the memory of the GPU."""

import torch

from data import MICRO_BATCH_TOKENS
from model import Config, LLaMA
from runtime.distributed import all_reduce_max, print_rank0
from training.loss import ROWS


def activation_bytes(config: Config, adapted: int, itemsize: int, checkpoint_activations: bool) -> int:
    """Bytes of activations per position: those kept for the backward pass, and those of the layer at work.

    Each of the `adapted` layers keeps seven vectors of width C and three of the feed-forward width, of `itemsize` bytes
    per number; with checkpointing it keeps its input alone, and one layer at a time is computed again.
    """
    layer = 7 * config.dim + 3 * config.hidden_dim
    if checkpoint_activations:
        return itemsize * (adapted * config.dim + 2 * layer)
    return itemsize * (adapted + 1) * layer


def positions_that_fit(
    model: LLaMA, adapted: int, checkpoint_activations: bool, total_memory: int, weights: int
) -> int:
    """Positions of a forward pass on a GPU of so many bytes, which holds so many bytes of weights: 256 to 8,192.

    A tenth of the memory is left to CUDA and to fragmentation. Room is also kept for the logits of a few rows, and for
    two whole layers, which a sharded base gathers. A multiple of 256 does not change with a few bytes of memory.
    """
    logits = ROWS["cuda"] * model.config.vocab_size * (model.dtype.itemsize + 4 + 4)  # with log p and its gradient
    gathered = max(sum(weight.nbytes for weight in layer.parameters()) for layer in model.layers)
    room = 0.9 * total_memory - weights - logits - 2 * gathered
    per_position = activation_bytes(model.config, adapted, model.dtype.itemsize, checkpoint_activations)
    return min(MICRO_BATCH_TOKENS, max(256, int(room / per_position) // 256 * 256))


def choose_micro_batch_tokens(model: LLaMA, adapted: int, checkpoint_activations: bool) -> int:
    """Return the positions of a forward pass for the GPU that holds the model, the same on all ranks; and print them.

    It is 8,192 on other devices.
    """
    if model.device.type != "cuda":
        return MICRO_BATCH_TOKENS
    memory = torch.cuda.get_device_properties(model.device).total_memory
    weights = torch.cuda.memory_allocated(model.device)
    positions = positions_that_fit(model, adapted, checkpoint_activations, memory, weights)
    positions = -all_reduce_max(-positions)
    print_rank0(f"{positions:,} positions per forward pass, by the GPU's {memory / 1e9:.0f} GB (--micro-batch-tokens)")
    return positions
