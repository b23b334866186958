"""Bases by their name on Hugging Face: fetched once into its ordinary cache, and found there from then on."""

import re
from fnmatch import fnmatch
from pathlib import Path

import click

from runtime.errors import printable
from runtime.files import first_line, read_json_object

NAME = r"[A-Za-z0-9][\w.-]*/[\w.-]+"  # an owner and a model
SMALL = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template.jinja")
WEIGHTS = ("model*.safetensors",)
INDEX = "model.safetensors.index.json"


def find_base(base: str | Path) -> Path:
    """The path of a base; of a name, where nothing lies at such a path, the folder that it is fetched to.

    What is in the cache already, whole, is taken from there, and nobody is asked: an adapter is for one set of weights.
    Without huggingface_hub the path is as it was given. Raises ValueError in one line.
    """
    path, name = Path(base), str(base)
    if path.exists() or not re.fullmatch(NAME, name):
        return path
    try:
        from huggingface_hub import constants, try_to_load_from_cache
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        return path
    endpoint = constants.ENDPOINT
    try:
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str) and is_whole(Path(cached).parent):
            return Path(cached).parent
        return fetch(name, endpoint)
    except GatedRepoError:
        cure = f"accept its terms at {endpoint}/{name}, and set HF_TOKEN to a token of yours"
        raise ValueError(f"{name}: Hugging Face gives it to those alone who may have it: {cure}") from None
    except RepositoryNotFoundError:
        where = f"no such base model here, and none of that name at {endpoint}"
        raise ValueError(f"{name}: {where}; a private one needs HF_TOKEN") from None
    except Exception as error:  # of the network, the server, the disk: the library has no kind of its own for them all
        what = "is neither here nor in the cache, and cannot be fetched"
        raise ValueError(f"{name}: {what} from {endpoint}: {first_line(error)}") from None


def is_whole(folder: Path) -> bool:
    """Whether all weights are there. They come last: so is all else."""
    index = folder / INDEX
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = read_json_object(index).get("weight_map")
    return isinstance(shards, dict) and all((folder / str(shard)).is_file() for shard in shards.values())


def fetch(name: str, endpoint: str) -> Path:
    """Configuration, tokenizer and weights, as safetensors, of a model; what was begun before goes on.

    Says first what and how much. Raises what huggingface_hub does, and ValueError where there is no such file.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    files = HfApi().model_info(name, files_metadata=True).siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files}
    small = [file for file in sizes if file == INDEX or any(fnmatch(file, kind) for kind in SMALL)]
    weights = [file for file in sizes if any(fnmatch(file, kind) for kind in WEIGHTS) and "/" not in file]
    if "config.json" not in sizes or not weights:
        raise ValueError("it has no config.json and model*.safetensors there, which is what is read")
    number, size = len(small) + len(weights), sum(sizes[file] for file in small + weights)
    text = f"{name}: fetching {number} files, {size / 1e6:,.1f} MB, from {endpoint} to {constants.HF_HUB_CACHE}"
    click.echo(printable(text), err=True)
    snapshot_download(name, allow_patterns=small)
    return Path(snapshot_download(name, allow_patterns=weights))
