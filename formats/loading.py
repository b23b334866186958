"""Load a base and adapters, for commands that generate or evaluate."""

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from adapter import ATTENTIONS, Adapter
from data import Tokenizer
from encoders.heads import HeadAdapter
from formats.adapters import describe_reading, load_adapter
from formats.bases import base_fingerprint, load_model, read_base
from formats.chat_templates import NAMES
from formats.hub import find_base
from formats.tensors import Weights, download_hint
from formats.tokenizers import load_tokenizer
from model import Config, LLaMA
from runtime.cli import warn
from runtime.compilation import prepare_to_compile
from runtime.decoding import prepare_to_decode
from runtime.distributed import local_rank0_first, world_size
from runtime.errors import printable
from runtime.quantization import quantizer


def load_with_adapters(
    adapter_paths: Sequence[str],
    base: str | None,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "fused",
    bits: str | None = None,
    compiled: bool = False,
    decoding: bool = True,
) -> tuple[LLaMA, Tokenizer, dict[str, Adapter]]:
    """Load adapters and a base, by default the one that the first adapter names.

    Returns the base, its tokenizer, and the adapters keyed by name. If the base is a name on the Hugging Face Hub, it
    is downloaded once. `bits` is "none", "8" or "4", or None for `--bits auto`. With `decoding`, the base gets linear
    layers that are faster in decoding; `compiled` means that the caller will compile the decoding step. With several
    ranks, each loads its shard of every layer. Warns if an adapter was trained with different base weights, and prints
    how third-party files were interpreted. Raises OSError, or ValueError if a file is invalid or the files do not fit
    each other.
    """
    if compiled:
        prepare_to_compile(device)
    files = name_adapters(adapter_paths)
    for path in files.values():  # before a base is downloaded
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such adapter file")
    adapters: dict[str, Adapter] = {}
    commit = None
    if base is None:
        if not files:
            raise ValueError("nothing to run: give --adapter FILE, or --base PATH, or both")
        name, path = next(iter(files.items()))
        adapters[name] = load_adapter(path)
        base = adapters[name].metadata.get("base")
        if base is None:
            raise ValueError(f"{path}: does not state which base it is for; give --base PATH")
        commit = adapters[name].metadata.get("base_commit")
    folder = Path(base)
    if not folder.exists():
        with local_rank0_first():
            folder = find_base(base, commit)
    if adapters and not folder.exists():
        raise FileNotFoundError(
            f"{base}: no such base model; {path} names it as its base; give --base PATH{download_hint(folder)}"
        )
    config, weights = read_base(folder)
    fingerprint = base_fingerprint(config, weights)
    for name, path in files.items():
        if name not in adapters:
            adapters[name] = load_adapter(path, heads=config.n_heads)
        check_adapter(adapters[name], path, base, config, fingerprint)
        adapters[name].to(device)

    tokenizer = load_tokenizer(folder, config.vocab_size)
    load = load_model if world_size() == 1 else load_part_of_rank
    model = load(folder, config, weights, dtype, device, ATTENTIONS[attention], quantizer(bits), bits is None)
    if decoding:
        prepare_to_decode(model, compiled)
    return model, tokenizer, adapters


def name_adapters(paths: Sequence[str]) -> dict[str, str]:
    """Return the adapter files keyed by name. Each of `paths` is NAME=FILE, or only FILE.

    Without NAME, the adapter is named after the file, without its suffix, or after the folder.

    Raises ValueError if two adapters have the same name, or one is named "base".
    """
    files: dict[str, str] = {}
    for path in paths:
        name, _, file = path.partition("=")
        if not file or Path(path).exists():
            name, file = Path(path).resolve().name if Path(path).is_dir() else Path(path).stem, path
        if name in files or name == "base":
            raise ValueError(f"{file}: the name {name!r} is taken; choose a different one with --adapter NAME={file}")
        files[name] = file
    return files


def load_part_of_rank(
    folder: Path, config: Config, weights: Weights, dtype: torch.dtype, device: torch.device, *args, **options
) -> LLaMA:
    """Load this rank's shard of every layer, for tensor parallelism. The arguments are those of `load_model`.

    Every matrix is dequantized; `keep_blocks` has no effect, because a shard is copied from the dequantized weight.
    """
    from runtime.tensor_parallel import base_of_rank, join_ranks

    model = load_model(folder, *base_of_rank(config, weights), dtype, device, *args, **options)
    join_ranks(model)
    return model


def check_adapter(adapter: Adapter, path: str, base: str, config: Config, fingerprint: str) -> None:
    """Raise ValueError if the adapter does not fit the base, or names an unknown prompt template.

    Warn if it was trained with different base weights. If the adapter is from a third-party file, print how the file
    was interpreted.
    """
    metadata = adapter.metadata
    if isinstance(adapter, HeadAdapter):
        task = metadata.get("task", "an encoder task")
        raise ValueError(
            f"{path}: was trained for {task} on an encoder; use python -m encoder_tuning evaluate --adapter {path}"
        )
    try:
        adapter.check_base(layers=config.n_layers, dim=config.dim, heads=config.n_heads)
    except ValueError as error:
        raise ValueError(f"{path}: does not fit the base {base}: {error}") from None
    if metadata.get("prompt_template", "alpaca").partition(":")[0] not in NAMES:
        expected = f"expected one of {', '.join(NAMES)}"
        raise ValueError(f"{path}: unknown prompt template {metadata['prompt_template']!r}; {expected}")
    if metadata.get("base_fingerprint", fingerprint) != fingerprint:
        warn(f"{path}: was trained with other weights than those of {base}")
    if "format" not in metadata:  # a third-party file
        click.echo(printable(f"{path}: {describe_reading(adapter)}"), err=True)
