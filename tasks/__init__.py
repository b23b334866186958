"""What a LLaMA is trained on and asked about: a task is one file here, and one line in the table TASKS."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from data import Example

TASKS = {  # by the name that --task takes: the module, which is imported on use and has a TASK
    "instructions": "tasks.instructions",
    "scienceqa": "tasks.scienceqa",
    "captions": "tasks.captions",
}


@dataclass(frozen=True)
class Task:
    """How the examples of a task are read, and how responses to them are scored. Only `read` is required.

    `read(path, images=None, split=None)` returns Examples: those to train on, if no split is named. `images` is the
    folder of the images; an Example has the name of its image in there. `score(examples, responses)` returns numbers by
    name. A response is a text, or None if the prompt left no room for one. A task without `score` has no command in
    evaluate.py; the docstring of `score` is the command's help. Both raise OSError, or ValueError in one line.
    """

    read: Callable[..., list[Example]]
    score: Callable[[Sequence, Sequence[str | None]], dict[str, float | None]] | None = None
    read_for_scoring: Callable[..., list] | None = None  # like `read`, if other examples are scored than trained on
    choices: Callable[..., list[str]] | None = None  # all possible responses to an example, for --choose
    read_answers: Callable[[Path, Sequence], list[str | None]] | None = None  # reads the file of --results
    write_results: Callable[[object, dict, Path], None] | None = None  # prints the scores and writes a folder
    split: str | None = None  # the split to score by default; None: the file has no splits
    needs_images: bool = False  # refuse an adapter without a projection
    max_new_tokens: int = 64
    data_help: str = "The examples, in a file as train.py takes it."
    unit: str = "example"  # of the progress bar


def load_task(name: str) -> Task:
    """Import the task of one of the names in TASKS."""
    return import_module(TASKS[name]).TASK
