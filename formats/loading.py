"""A base and the adapters over it, as commands that answer are told of them."""

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from adapter import ATTENTIONS, Adapter
from data import Tokenizer
from encoders.heads import HeadAdapter
from formats.adapters import describe_reading, load_adapter
from formats.bases import base_fingerprint, load_base_tokenizer, load_weights, read_base
from formats.chat_templates import NAMES
from formats.hub import find_base
from formats.tensors import Weights
from model import Config, LLaMA
from runtime.cli import warn
from runtime.compilation import decode_by_rows, rows_pay
from runtime.distributed import local_rank0_first, world_size
from runtime.errors import printable
from runtime.quantization import quantizer
from runtime.tensor_parallel import base_of_rank, join_ranks


def name_adapters(paths: Sequence[str]) -> dict[str, str]:
    """Names to files, of NAME=FILE, or FILE, whose name is its own. Raises ValueError where a name is taken."""
    files: dict[str, str] = {}
    for path in paths:
        name, _, file = path.partition("=")
        if not file or Path(path).exists():
            name, file = Path(path).resolve().name if Path(path).is_dir() else Path(path).stem, path
        if name in files or name == "base":
            raise ValueError(f"{file}: the name {name!r} is taken; give it another, --adapter NAME={file}")
        files[name] = file
    return files


def load_with_adapters(
    adapter_paths: Sequence[str],
    base: str | None,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "fused",
    bits: str | None = None,
) -> tuple[LLaMA, Tokenizer, dict[str, Adapter]]:
    """The base, by default the one that the first adapter names, and adapters, whosever they are, by name.

    Of several ranks each has its part of every layer. Raises OSError or ValueError where the files don't fit each
    other. Warns where an adapter was tuned on other weights, and says how files of others were understood.
    """
    files, base, read = named_files(adapter_paths, base)
    with local_rank0_first():  # it downloads a base that is given by name
        folder = find_base(base)
    config, weights = read_base(folder)
    prepare_layer = quantizer(int(bits), device) if bits else None
    tokenizer = load_base_tokenizer(folder, config)
    model = load_part_of_rank(folder, config, weights, dtype, device, ATTENTIONS[attention], prepare_layer)
    if rows_pay(device, dtype) and bits is None:
        decode_by_rows(model)
    fingerprint = base_fingerprint(config, weights)
    adapters = {}
    for name, path in files.items():
        adapter = read[name] if name in read else load_adapter(path, heads=config.n_heads)
        check_adapter(adapter, path, base, config, fingerprint)
        adapters[name] = adapter.to(device)
    return model, tokenizer, adapters


def load_part_of_rank(
    folder: Path, config: Config, weights: Weights, dtype: torch.dtype, device: torch.device, *args
) -> LLaMA:
    """`load_weights`; with several ranks, only this rank's part of every layer. Raises OSError or ValueError."""
    if world_size() == 1:
        return load_weights(folder, config, weights, dtype, device, *args)
    model = load_weights(folder, *base_of_rank(config, weights), dtype, device, *args)
    join_ranks(model)
    return model


def named_files(adapter_paths: Sequence[str], base: str | None) -> tuple[dict[str, str], str, dict[str, Adapter]]:
    """Adapter files by name, the base, and what had to be read to know it. Raises OSError or ValueError."""
    files, read = name_adapters(adapter_paths), {}
    if base is None and not files:
        raise ValueError("nothing to run: give --adapter FILE, or --base PATH, or both")
    if base is None:
        name, path = next(iter(files.items()))
        read[name] = load_adapter(path)
        base = read[name].metadata.get("base")
        if base is None:
            raise ValueError(f"{path}: does not say which base it is for; give --base PATH")
    for path in files.values():  # before a base is fetched
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such adapter file")
    return files, base, read


def check_adapter(adapter: Adapter, path: str, base: str, config: Config, fingerprint: str) -> None:
    """Raise ValueError where it cannot belong to the base, of such a shape; warn where it was tuned on another."""
    metadata = adapter.metadata
    if isinstance(adapter, HeadAdapter):
        task = metadata.get("task", "a task of an encoder")
        raise ValueError(f"{path}: was tuned for {task}, on an encoder: python -m encoder_tuning evaluate --adapter")
    try:
        adapter.check_base(layers=config.n_layers, dim=config.dim, heads=config.n_heads)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {base}: {error}") from None
    if metadata.get("prompt_template", "alpaca").partition(":")[0] not in NAMES:
        raise ValueError(f"{path}: unknown prompt template {metadata['prompt_template']!r}")
    if metadata.get("base_fingerprint", fingerprint) != fingerprint:
        warn(f"{path} was tuned on other weights than those of {base}")
    if "format" not in metadata:  # not a file of ours
        click.echo(printable(f"{path}: {describe_reading(adapter)}"), err=True)
