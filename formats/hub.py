"""Bases by their name on Hugging Face: fetched once into its ordinary cache, and found there from then on."""

import re
from pathlib import Path

import click

from runtime.errors import printable
from runtime.files import first_line, read_json_object

NAME = r"[A-Za-z0-9][\w.-]*/[\w.-]+"  # an owner and a model
INDEX = "model.safetensors.index.json"
SMALL = r"config\.json|generation_config\.json|tokenizer.*|special_tokens_map\.json|chat_template\.jinja"
SMALL += rf"|{re.escape(INDEX)}"
WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors"


def find_base(base: str | Path) -> Path:
    """The path of a base; of a name, where nothing lies at such a path, the folder that it is fetched to.

    What is in the cache, whole, is taken from there, and nobody is asked: an adapter is for one set of weights. Without
    huggingface_hub the path is as it was given. Raises ValueError in one line.
    """
    path, name = Path(base), str(base)
    if path.exists() or not re.fullmatch(NAME, name):
        return path
    try:
        from huggingface_hub import constants, try_to_load_from_cache
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        return path
    endpoint, cached = constants.ENDPOINT, try_to_load_from_cache(name, "config.json")
    folder = Path(cached).parent if isinstance(cached, str) else None
    if folder is not None and is_whole(folder):
        return folder
    try:
        return fetch(name, endpoint, folder)
    except GatedRepoError:
        cure = f"accept its terms at {endpoint}/{name}, and set HF_TOKEN to a token of yours"
        raise ValueError(f"{name}: Hugging Face gives it to those alone who may have it: {cure}") from None
    except RepositoryNotFoundError:
        where = f"no such base model here, and none of that name at {endpoint}"
        raise ValueError(f"{name}: {where}; a private one needs HF_TOKEN") from None
    except Exception as error:  # of the network, the server, the disk: the library has no kind of its own for them all
        if folder is not None and has_weights(folder):  # it may be that there is no more than this
            return folder
        what = "is neither here nor whole in the cache, and cannot be fetched"
        raise ValueError(f"{name}: {what} from {endpoint}: {first_line(error)}") from None


def has_weights(folder: Path) -> bool:
    """Whether all of them are there. Raises ValueError where the index of them cannot be read."""
    index = folder / INDEX
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = read_json_object(index).get("weight_map")
    return isinstance(shards, dict) and all((folder / str(shard)).is_file() for shard in shards.values())


def is_whole(folder: Path) -> bool:
    """Whether there are weights, and what says how texts become tokens and end. Other programs fetch what they need."""
    tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()
    configs = all((folder / name).is_file() for name in ("tokenizer_config.json", "generation_config.json"))
    return tokenizer and configs and has_weights(folder)


def fetch(name: str, endpoint: str, cached: Path | None) -> Path:
    """Configuration, tokenizer and weights, as safetensors, of a model; what is cached already stays.

    Says first what is to come, and how much. Raises what huggingface_hub does, and ValueError where there is no such
    file.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    found = {file.rfilename: file.size or 0 for file in HfApi().model_info(name, files_metadata=True).siblings or []}
    small = [file for file in found if re.fullmatch(SMALL, file)]
    weights = [file for file in found if re.fullmatch(WEIGHTS, file)]
    if "config.json" not in found or not weights:
        raise ValueError("it has no config.json and model*.safetensors there, which is what is read")
    missing = [file for file in small + weights if cached is None or not (cached / file).is_file()]
    if cached is not None and not missing:
        return cached
    size = sum(found[file] for file in missing) / 1e6
    text = f"{name}: fetching {len(missing)} files, {size:,.1f} MB, from {endpoint} to {constants.HF_HUB_CACHE}"
    click.echo(printable(text), err=True)
    snapshot_download(name, allow_patterns=small)
    return Path(snapshot_download(name, allow_patterns=weights))
