"""A run that goes on from an adapter of whosever making, and parts of an adapter that stay as they are."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from adapter import Adapter
from encoders.heads import HeadAdapter
from formats.adapters import load_adapter
from model import Config
from multimodal import ImageAdapter
from runtime.cli import warn
from runtime.distributed import rank
from runtime.fingerprints import hash_tensors
from training.mlp_prompts import make_prompts_by_mlp

PARTS = ("prompts", "gates", "projection")


def load_initial(path: str) -> Adapter:
    """Before the base's heads are known: a file with one gate for all has that. Raises OSError or ValueError."""
    try:
        initial = load_adapter(path)
    except ValueError:
        initial = load_adapter(path, heads=1)
    if isinstance(initial, HeadAdapter):
        raise ValueError(f"--init {path}: is for an encoder, not for a LLaMA")
    return initial


def initial_fingerprint(path: str | None) -> str | None:
    """A hash of all that the adapter to go on from has learnt. Raises as `load_initial`."""
    return None if path is None else hash_tensors([*load_initial(path).state_dict().values()])


def shaped_as_initial(config, path: str | None, out: Path):
    """The configuration (train.TrainConfig) with L and K of the adapter to go on from, if there is one.

    Raises OSError or ValueError.
    """
    if path is None:
        return config
    if out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
        raise ValueError(f"--init {path} lies where this run will write: give another --out")
    layers, length, _ = load_initial(path).prompts.shape
    if config.layers not in (None, layers):
        raise ValueError(f"--layers {config.layers}: {path}, from which to go on, has {layers}")
    return replace(config, layers=layers, length=length)


def begin_with(path: str | None, adapter: Adapter, base: Config) -> Adapter:
    """A new adapter with what the one at `path` has learnt, if there is one. It has a projection if either has one.

    Raises ValueError where they don't fit each other, or the base.
    """
    if path is None:
        return adapter
    initial = load_adapter(path, heads=base.n_heads)
    try:
        initial.check_base(layers=base.n_layers, dim=base.dim, heads=base.n_heads)
    except ValueError as error:
        raise ValueError(f"--init {path}: {error}") from None
    known, device = initial.metadata, adapter.prompts.device
    for name, what in (("base_fingerprint", "over another base"), ("prompt_template", "with another template")):
        if rank() == 0 and known.get(name, adapter.metadata.get(name)) != adapter.metadata.get(name):
            warn(f"--init {path} was tuned {what}: {name} is {known[name]}, here {adapter.metadata.get(name)}")
    if isinstance(adapter, ImageAdapter) and isinstance(initial, ImageAdapter):
        made_for, features = initial.projection[0].in_features, adapter.projection[0].in_features
        if made_for != features:
            raise ValueError(f"--init {path}: takes {made_for} features of an image, here there are {features}")
    if isinstance(adapter, ImageAdapter) and not isinstance(initial, ImageAdapter):
        adapter.load_state_dict(initial.state_dict(), strict=False)
        adapter.gate_activation = initial.gate_activation
        begun = adapter
    else:
        begun = initial.to(device)
        sees = {name: value for name, value in known.items() if name.startswith("tower") or name == "encoder"}
        begun.metadata = (sees if isinstance(initial, ImageAdapter) else {}) | adapter.metadata
    begun.metadata["init"] = Path(path).name
    return begun


def choose_learnt(adapter: Adapter, base, generator: torch.Generator) -> None:
    """As --prompts and --freeze say, in a BaseOptions. Raises ValueError where they contradict others."""
    if base.prompts == "mlp":
        if base.init is not None:
            raise ValueError(f"--prompts mlp: a network cannot begin with the prompts of --init {base.init}")
        make_prompts_by_mlp(adapter, generator)
        adapter.metadata["prompts_by"] = "mlp"
    freeze_parts(adapter, base.freeze)


def freeze_parts(adapter: Adapter, names: Collection[str]) -> None:
    """Hold parts still. Raises ValueError where there is no such part, or nothing else."""
    for name in names:
        parameters = [parameter for where, parameter in adapter.named_parameters() if name in where.split(".")]
        if not parameters:
            raise ValueError(f"--freeze {name}: there is none, for no example has an image")
        for parameter in parameters:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in adapter.parameters()):
        raise ValueError(f"--freeze {' --freeze '.join(names)}: then there is nothing left to tune")
