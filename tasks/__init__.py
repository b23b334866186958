"""What a LLaMA is tuned on and asked about: a task is one file here, and one line in the table TASKS."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from data import Example
from formats.image_encoders import FunctionEncoder, TowerEncoder, load_image_encoder
from runtime.distributed import local_rank, sync_errors
from runtime.files import path_inside, require_file
from tasks import captions, instructions, scienceqa
from tasks.answering import Answers, read_answers, write_scores
from training.options import DataOptions


@dataclass(frozen=True)
class Task:
    """How the examples of a task are read, and how answers to them are scored. All but `read` may be left out.

    `read(path, images=None, split=None)` gives Examples: those to train on, where no split is named. `images` is the
    folder of the images; an Example has the name of its image in there. `score(examples, answers)` gives numbers by
    name, of one answer for each example: a text, or None where there was no room for one. Without it evaluate.py has no
    command for the task; its docstring is the command's help. Both raise OSError, or ValueError in one line.
    """

    read: Callable[..., list[Example]]
    score: Callable[[Sequence, Sequence[str | None]], dict[str, float | None]] | None = None
    read_for_scoring: Callable[..., list] | None = None  # as `read`, where other examples are scored than trained on
    choices: Callable[..., list[str]] | None = None  # all that may be answered to an example, for --choose
    read_answers: Callable[[Path, Sequence], list[str | None]] = read_answers  # for --results, of such a file
    write_results: Callable[[Answers, dict, Path], None] = write_scores  # into a folder; prints them, too
    split: str | None = None  # that is scored, unless --split names another; None: the file has no splits
    needs_images: bool = False  # an adapter that sees none is refused
    max_new_tokens: int = 64
    data_help: str = "The examples, in a file as train.py takes it."
    unit: str = "example"  # of progress


TASKS = {
    "instructions": Task(instructions.read),
    "scienceqa": Task(
        scienceqa.read,
        scienceqa.score,
        choices=scienceqa.Problem.answers,
        read_answers=scienceqa.read_answers,
        write_results=scienceqa.write_results,
        split="test",
        max_new_tokens=32,
        data_help="ScienceQA's problems.json.",
        unit="problem",
    ),
    "captions": Task(
        captions.read,
        captions.score,
        read_for_scoring=captions.read_for_scoring,
        read_answers=captions.read_answers,
        write_results=captions.write_results,
        needs_images=True,
        data_help="COCO's captions_*.json.",
        unit="image",
    ),
}

AnyExample = TypeVar("AnyExample", bound=Example)


def with_images(
    examples: Sequence[AnyExample], folder: str | Path, skip_missing: bool, path: str | Path
) -> list[AnyExample]:
    """Those whose image is in the folder, or that have none; `path`, of their file, begins the error messages.

    Raises FileNotFoundError that names the example, unless those whose image is missing are to be skipped, and
    ValueError where none is left.
    """
    kept = []
    for example in examples:
        try:
            if example.image:
                require_file(path_inside(folder, example.image), "image")
        except (FileNotFoundError, ValueError) as error:
            if skip_missing and isinstance(error, FileNotFoundError):
                continue
            raise type(error)(f"{path}: {example.name}: {error}") from None
        kept.append(example)
    if not kept:
        raise ValueError(f"{path}: none of its {len(examples)} examples has an image that is there")
    return kept


def attach_features(
    examples: Sequence[AnyExample],
    folder: str | Path,
    encoder: TowerEncoder | FunctionEncoder,
    cache: Path | None = None,
) -> list[AnyExample]:
    """The examples, those with an image with its features (F,); an image of several goes through the encoder once.

    In the folder `cache` features are kept for the next time. Raises OSError or ValueError.
    """
    paths = [Path(folder) / example.image if example.image else None for example in examples]
    distinct = list(dict.fromkeys(path for path in paths if path is not None))
    features = dict(zip(distinct, encoder.encode(distinct, cache=cache))) if distinct else {}
    return [replace(example, features=features.get(path)) for example, path in zip(examples, paths)]


def see_images(
    examples: Sequence[AnyExample], source: DataOptions, dtype: torch.dtype, device: torch.device
) -> tuple[list[AnyExample], TowerEncoder | FunctionEncoder]:
    """The examples with the features of their images, on every rank, and the encoder. Raises OSError or ValueError."""
    with sync_errors():
        encoder = load_image_encoder(source.tower, source.encoder, dtype, device)
    for turn in (local_rank() == 0, local_rank() > 0):  # the first on a machine keeps them for the others
        with sync_errors():
            if turn:
                examples = attach_features(examples, source.images, encoder, cache=source.features)
    return examples, encoder
