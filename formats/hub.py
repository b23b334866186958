"""Find bases by their names on the Hugging Face Hub. Each is downloaded once, to the cache of huggingface_hub."""

import re
from pathlib import Path

import click

from runtime.errors import printable
from runtime.files import first_line, read_json_object

NAME = r"[A-Za-z0-9][\w.-]*/[\w.-]+"  # owner/model
INDEX = "model.safetensors.index.json"
PATTERNS = ["config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json", "tokenizer*"]
PATTERNS += ["model.safetensors", "model-*-of-*.safetensors", INDEX]  # no pickles, and not Mistral's consolidated*


def find_base(base: str | Path, commit: str | None = None) -> Path:
    """Return `base` as a path or, if it does not exist and is a name on the Hub, the folder of its download.

    A complete download in the cache is used without a request, so that the weights under an adapter do not change when
    the repository does. Otherwise a line is printed, and `commit` is downloaded, by default the newest. If
    huggingface_hub is not installed, `base` is returned as a path. Raises ValueError if the base cannot be downloaded,
    or if the repository has no safetensors.
    """
    path, name = Path(base), str(base)
    if path.exists() or not re.fullmatch(NAME, name):
        return path
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        return path
    request = {"repo_id": name, "revision": commit, "allow_patterns": PATTERNS}
    try:
        cached = Path(snapshot_download(**request, local_files_only=True))
    except LocalEntryNotFoundError:  # also if the download is incomplete
        cached = None
    if cached is not None and is_complete(cached):
        return cached
    click.echo(printable(f"{name}: downloading from {constants.ENDPOINT} to {constants.HF_HUB_CACHE}"), err=True)
    try:
        folder = Path(snapshot_download(**request))
    except GatedRepoError:
        hint = f"accept its terms at {constants.ENDPOINT}/{name}, and set HF_TOKEN to your token"
        raise ValueError(f"{name}: access to this model is restricted; {hint}") from None
    except RepositoryNotFoundError:
        found = f"no such file or folder, and no model of this name at {constants.ENDPOINT}"
        raise ValueError(f"{name}: {found}; for a private model, set HF_TOKEN to your token") from None
    except Exception as error:  # errors of the network, the server and the disk have no common class
        found = "no such file or folder, not complete in the cache, and cannot be downloaded"
        raise ValueError(f"{name}: {found} from {constants.ENDPOINT}: {first_line(error)}") from None
    if not has_weights(folder):
        raise ValueError(f"{name}: the repository has no model*.safetensors; for other formats, download it yourself")
    return folder


def has_weights(folder: Path) -> bool:
    """Return True if all weight files exist. Raises ValueError if their index cannot be read."""
    index = folder / INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = read_json_object(index).get("weight_map")
    return isinstance(shards, dict) and all((folder / str(shard)).is_file() for shard in shards.values())


def is_complete(folder: Path) -> bool:
    """Return True if a download contains the weights, the tokenizer, tokenizer_config.json and generation_config.json.

    Other programs download only some of the files, and without the last two, EOS tokens might be missed.
    """
    tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()
    configs = all((folder / name).is_file() for name in ("tokenizer_config.json", "generation_config.json"))
    return tokenizer and configs and has_weights(folder)
