"""Baselines for zero-init attention: prompts without gates, gates fixed at 1, prompts in the lowest layers, LoRA, and
full fine-tuning.

All methods use the training loop of train.py. LoRA and full fine-tuning have no prompts; for them, a `NoPrompts`
contains the trained weights, and replaces the adapter. The notation is that of adapter.py.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from adapter import Adapter, AdaptionPrompt, attend, gated_attention
from data import IGNORE, TokenizedExample, collate
from formats.bases import load_llama
from model import LLaMA
from multimodal import ImageAdapter
from runtime.files import atomic_write
from train import Step, TrainConfig, make_optimizer, response_loss, training_steps

ZERO_INIT, ONE_SOFTMAX, GATES_AT_ONE = "zero-init attention", "random init, one softmax", "random init, gates at 1"
LORA, FULL = "LoRA", "full tuning"

WARMUP_EPOCHS = 2  # the paper's value
WEIGHT_DECAY = TrainConfig.weight_decay


class Setting(NamedTuple):
    """Settings of one training run. Row labels of tables name the settings that differ from the testbed's defaults."""

    layers: int  # L
    lr: float
    method: str = ZERO_INIT
    where: str = "top"  # adapt the topmost L layers; "bottom": the lowest
    length: int = 10  # K
    epochs: int = 5  # the paper's value
    warmup_epochs: float = WARMUP_EPOCHS
    scale: float = 1.0  # prompts are initialized from N(0, scale^2)
    activation: str = "tanh"  # activation of the gates, a key of Adapter.ACTIVATIONS
    gate_per: str = "head"  # one gate per head, or per "layer"
    gate_decay: float = 0.0  # weight decay of the gates
    rank: int = 8  # rank of LoRA


def ungated_attention(q, k, v, prompt_k, prompt_v, gate, mask=None, causal=False) -> Tensor:
    """Compute attention with one softmax over prompts and tokens, the paper's baseline ("random-init attention").

    The arguments and the result have the same shapes as those of `gated_attention`; `gate` is not used.
    """
    B, T, S, K = q.shape[0], q.shape[2], k.shape[2], prompt_k.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device)
        mask = mask.tril() if causal else mask
    mask = F.pad(mask.expand(B, 1, T, S), (K, 0), value=True)  # every query attends to all prompts
    k = torch.cat([prompt_k.expand(B, -1, -1, -1), k], dim=2)  # (B, Hkv, K + S, D)
    v = torch.cat([prompt_v.expand(B, -1, -1, -1), v], dim=2)
    return attend(q, k, v, mask)


class LowAdapter(Adapter):
    """Adapter of the lowest layers. The remaining `above` layers get adaption prompts with zero gates."""

    def __init__(self, *, above: int, **dimensions):
        super().__init__(**dimensions)
        self.above = above

    def forward(self, *args, **options) -> list[AdaptionPrompt]:
        adaption_prompts = super().forward(*args, **options)
        zero = AdaptionPrompt(adaption_prompts[0].embeddings.detach(), torch.zeros_like(adaption_prompts[0].gate))
        return adaption_prompts + [zero] * self.above


class NoPrompts(nn.Module):
    """Module in place of the adapter, for LoRA and full fine-tuning. forward() returns no adaption prompts.

    Contains the trained weights, which are those of LoRA or of the base, and the head if the base is an encoder.
    """

    def __init__(self, trained: Iterable[nn.Parameter], head: nn.Module | None = None):
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self.head = head
        self.metadata: dict[str, str] = {}

    def forward(self, *_, **__) -> list[AdaptionPrompt]:
        return []

    def make_optimizer(self) -> torch.optim.AdamW:
        """Create AdamW with the betas of `train.make_optimizer`, and with one learning rate for all parameters."""
        groups = [{"params": list(self.parameters()), "weight_decay": WEIGHT_DECAY, "lr_scale": 1.0}]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def whole_model_loss(
    model: LLaMA, adapter: nn.Module, examples: Sequence[TokenizedExample], checkpoint_activations: bool = False
) -> Tensor:
    """Compute the loss of `train.response_loss` without adaption prompts; `adapter` is not used.

    Gradients flow to all weights, including those of the output head.
    """
    batch = collate(examples)
    inputs = batch.inputs.to(model.device)  # (B, T)
    targets = batch.targets.to(model.device)  # (B, T)
    hidden = model.hidden_states(inputs, checkpoint_activations=checkpoint_activations)  # (B, T, C)
    loss_mask = targets != IGNORE  # (B, T)
    logits = model.output(hidden[loss_mask]).float()  # (R, V)
    return F.cross_entropy(logits, targets[loss_mask], reduction="sum")


def mixed_precision_loss(dtype: torch.dtype, model: LLaMA, *args, **options) -> Tensor:
    """Compute `whole_model_loss` with matmuls in `dtype`; weights and their gradients remain in float32."""
    with torch.autocast(model.device.type, dtype):
        return whole_model_loss(model, *args, **options)


# ---------------------------------------------------------------------------------------------------
# LoRA (Hu et al., 2022), from PEFT


def import_peft():
    """Import and return the package `peft`. Raises ValueError if it is not installed."""
    try:
        import peft
    except ImportError:
        raise ValueError(
            "the comparison with LoRA needs the package peft, which is not installed: pip install peft"
        ) from None
    return peft


def add_lora(model: nn.Module, rank: int, seed: int) -> list[nn.Parameter]:
    """Add LoRA (scale 1, no dropout) to wq and wv of every layer. Return its parameters, always in float32."""
    peft = import_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["wq", "wv"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def lora_layers(model: nn.Module) -> list[nn.Module]:
    """Return PEFT's LoRA layers in a model; they can be merged, unmerged and disabled."""
    return [module for module in model.modules() if isinstance(module, import_peft().tuners.lora.LoraLayer)]


# ---------------------------------------------------------------------------------------------------
# Setup and training steps of a setting


class Trainable(NamedTuple):
    """A model and its trainable parameters: the arguments of the training loop, except examples and configuration."""

    model: nn.Module
    adapter: nn.Module  # contains the trainable parameters, always in float32; NoPrompts for LoRA and full tuning
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[..., Tensor] = response_loss


def set_up(setting: Setting, seed: int, base: Path, dtype: torch.dtype, device: torch.device) -> Trainable:
    """Load a fresh base, and create the trainable parameters, their optimizer and their loss function."""
    if setting.method == FULL:
        model, _ = load_llama(base, torch.float32, device)
        adapter = NoPrompts(model.requires_grad_(True).parameters())
        loss_fn = whole_model_loss if dtype == torch.float32 else partial(mixed_precision_loss, dtype)
        return Trainable(model, adapter, adapter.make_optimizer(), loss_fn)
    model, _ = load_llama(base, dtype, device, ungated_attention if setting.method == ONE_SOFTMAX else gated_attention)
    if setting.method == LORA:
        adapter = NoPrompts(add_lora(model, setting.rank, seed))
        return Trainable(model, adapter, adapter.make_optimizer())
    adapter = make_adapter(model, setting, seed).to(device)
    optimizer = make_optimizer(adapter, WEIGHT_DECAY)
    for group in optimizer.param_groups:
        if group["params"][0] is adapter.gates:
            group["weight_decay"] = setting.gate_decay
    return Trainable(model, adapter, optimizer)


def make_adapter(model: LLaMA, setting: Setting, seed: int) -> Adapter:
    """Create the adapter of a setting. Its gates are trained only if the method is zero-init attention."""
    dimensions = {"layers": setting.layers, "length": setting.length, "dim": model.config.dim}
    dimensions["heads"] = model.config.n_heads if setting.gate_per == "head" else 1  # 1: one gate for all heads
    dimensions["gate_activation"] = "identity" if setting.method == GATES_AT_ONE else setting.activation
    dimensions["generator"] = torch.Generator().manual_seed(seed)
    above = model.config.n_layers - setting.layers if setting.where == "bottom" else 0
    adapter = LowAdapter(above=above, **dimensions) if above else Adapter(**dimensions)
    with torch.no_grad():
        adapter.prompts *= setting.scale
        if setting.method == GATES_AT_ONE:
            adapter.gates.fill_(1.0)
    adapter.gates.requires_grad_(setting.method == ZERO_INIT)
    return adapter


def make_image_adapter(model: LLaMA, features: int, config: TrainConfig) -> ImageAdapter:
    """Create an ImageAdapter for all layers of the model; `features` is the number of features of an image or sound."""
    dimensions = {"dim": model.config.dim, "heads": model.config.n_heads, "layers": model.config.n_layers}
    generator = torch.Generator().manual_seed(config.seed)
    adapter = ImageAdapter(features=features, length=config.length, generator=generator, **dimensions)
    return adapter.to(model.device)


def finite_steps(trainable: Trainable, examples: Sequence, config: TrainConfig, first_step: int = 0) -> Iterator[Step]:
    """Run the training steps from `first_step` on, with a progress bar, yielding a Step after each.

    Ends without an error before a step whose loss or gradient is not finite.
    """
    model, adapter, optimizer, loss_fn = trainable
    total = config.epochs * math.ceil(len(examples) / config.batch_size)
    steps = training_steps(model, adapter, optimizer, examples, config, loss_fn, first_step)
    options = {"total": total, "initial": first_step, "unit": "step", "file": sys.stderr, "leave": False}
    with suppress(FloatingPointError), tqdm(steps, **options) as bar:
        yield from bar


def save_state(path: Path, trainable: Trainable, losses: Sequence[float], seconds: float) -> None:
    """Save the training state for `load_state`: parameters, optimizer, losses, and training time so far in seconds."""
    state = {"adapter": trainable.adapter.state_dict(), "optimizer": trainable.optimizer.state_dict()}
    with atomic_write(path) as temporary:
        torch.save(state | {"losses": list(losses), "seconds": seconds}, temporary)


def load_state(path: Path, trainable: Trainable) -> tuple[list[float], float]:
    """Load the file of `save_state` into `trainable`. Return the losses and the training time so far in seconds."""
    state = torch.load(path, weights_only=True)
    trainable.adapter.load_state_dict(state["adapter"])
    trainable.optimizer.load_state_dict(state["optimizer"])
    return state["losses"], state["seconds"]
