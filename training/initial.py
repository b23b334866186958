"""Initialization from an existing adapter (--init), which this project or another implementation has written."""

from dataclasses import replace
from pathlib import Path

from adapter import Adapter
from encoders.heads import HeadAdapter
from formats.adapters import load_adapter
from model import Config
from multimodal import ImageAdapter
from runtime.cli import warn
from runtime.distributed import rank
from runtime.files import hash_tensors


def load_initial(path: str, base: Config, out: Path) -> Adapter:
    """Load the adapter to initialize from; `out` is the folder of the new run.

    Raises OSError, or ValueError if the adapter is invalid, does not fit the base, or is in the folder `out`.
    """
    if out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
        raise ValueError(f"--init {path}: is in the folder that this run writes to; choose a different --out")
    initial = load_adapter(path, heads=base.n_heads)
    if isinstance(initial, HeadAdapter):
        raise ValueError(f"--init {path}: is for an encoder, not for a LLaMA")
    try:
        initial.check_base(layers=base.n_layers, dim=base.dim, heads=base.n_heads)
    except ValueError as error:
        raise ValueError(f"--init {path}: {error}") from None
    return initial


def shaped_as(initial: Adapter, config, path: str):
    """Return the train.TrainConfig with L and K of the adapter, whatever --length is.

    Raises ValueError if --layers differs from L.
    """
    layers, length, _ = initial.prompts.shape
    if config.layers not in (None, layers):
        raise ValueError(f"--layers {config.layers}: --init {path} has {layers} adapted layers; use --layers {layers}")
    return replace(config, layers=layers, length=length)


def adapter_fingerprint(adapter: Adapter) -> str:
    """Return a hash of all parameters of the adapter."""
    return hash_tensors([*adapter.state_dict().values()])


def init_from_adapter(initial: Adapter, adapter: Adapter, path: str) -> Adapter:
    """Return an adapter with the parameters of `initial` and the metadata of `adapter`, which is untrained.

    One of the two is modified and returned. It has a projection if either of the two has one. If only `initial` has
    one, the metadata of its encoder are kept. Warns if `initial` was trained for a different base, or with a different
    template. Raises ValueError if the projections expect different numbers of features.
    """
    metadata = initial.metadata
    for name, what in (("base_fingerprint", "for a different base"), ("prompt_template", "with a different template")):
        here = adapter.metadata.get(name)
        if rank() == 0 and metadata.get(name, here) != here:
            warn(f"--init {path}: was trained {what}: {name} is {metadata[name]}, but this run has {here}")
    if isinstance(adapter, ImageAdapter) and isinstance(initial, ImageAdapter):
        made_for = initial.projection[0].in_features
        features = adapter.projection[0].in_features
        if made_for != features:
            found = f"takes {made_for} features of an image, but this run has {features}"
            raise ValueError(f"--init {path}: {found}; use the image encoder that it was trained with")
    if isinstance(adapter, ImageAdapter) and not isinstance(initial, ImageAdapter):
        adapter.load_state_dict(initial.state_dict(), strict=False)  # the projection is new
        adapter.gate_activation = initial.gate_activation
        result = adapter
    else:
        result = initial.to(adapter.prompts.device)
        kept = {}
        if isinstance(initial, ImageAdapter) and not isinstance(adapter, ImageAdapter):  # a run without images
            kept = {name: metadata[name] for name in metadata if name == "encoder" or name.startswith("vision_encoder")}
        result.metadata = kept | adapter.metadata
    result.metadata["init"] = Path(path).name
    return result
