"""Bases by their name on Hugging Face: fetched once into its ordinary cache, and found there from then on."""

import re
from pathlib import Path

import click

from runtime.errors import printable
from runtime.files import first_line, read_json_object

NAME = r"[A-Za-z0-9][\w.-]*/[\w.-]+"  # an owner and a model
INDEX = "model.safetensors.index.json"
PATTERNS = ["config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json", "tokenizer*"]
PATTERNS += ["model.safetensors", "model-*-of-*.safetensors", INDEX]  # no pickles, and not Mistral's consolidated*


def find_base(base: str | Path, commit: str | None = None) -> Path:
    """Return the path of a base. A name that is not a path becomes the folder that it is fetched to.

    Without a `commit` it is the newest, or the one in the cache: if that is whole, the server is not asked, because an
    adapter belongs to one set of weights. Without huggingface_hub the path is returned as it was given. Raises
    ValueError in one line.
    """
    path, name = Path(base), str(base)
    if path.exists() or not re.fullmatch(NAME, name):
        return path
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        return path
    what = {"repo_id": name, "revision": commit, "allow_patterns": PATTERNS}
    try:
        cached = Path(snapshot_download(**what, local_files_only=True))
    except LocalEntryNotFoundError:  # or not all of it
        cached = None
    if cached is not None and is_whole(cached):
        return cached
    click.echo(printable(f"{name}: fetching from {constants.ENDPOINT} to {constants.HF_HUB_CACHE}"), err=True)
    try:
        folder = Path(snapshot_download(**what))
        if not has_weights(folder):
            raise ValueError("there are no model*.safetensors, which is what is read")
        return folder
    except GatedRepoError:
        cure = f"accept its terms at {constants.ENDPOINT}/{name}, and set HF_TOKEN to a token of yours"
        raise ValueError(f"{name}: Hugging Face gives it to those alone who may have it: {cure}") from None
    except RepositoryNotFoundError:
        where = f"no such base model here, and none of that name at {constants.ENDPOINT}"
        raise ValueError(f"{name}: {where}; a private one needs HF_TOKEN") from None
    except Exception as error:  # of the network, the server, the disk: the library has no common class for them
        wrong = "is neither here nor whole in the cache, and cannot be fetched"
        raise ValueError(f"{name}: {wrong} from {constants.ENDPOINT}: {first_line(error)}") from None


def has_weights(folder: Path) -> bool:
    """Return True if all weights are there. Raises ValueError if their index cannot be read."""
    index = folder / INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = read_json_object(index).get("weight_map")
    return isinstance(shards, dict) and all((folder / str(shard)).is_file() for shard in shards.values())


def is_whole(folder: Path) -> bool:
    """Return True if there are weights, a tokenizer, and what says how texts end: other programs fetch only parts."""
    tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()
    configs = all((folder / name).is_file() for name in ("tokenizer_config.json", "generation_config.json"))
    return tokenizer and configs and has_weights(folder)
