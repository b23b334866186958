"""Tasks: readers of training data, and scorers of responses. Each task is a module, and an entry of TASKS."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from data import Example

TASKS = {  # values of --task, and the modules that define their TASK, imported on use
    "instructions": "tasks.instructions",
    "scienceqa": "tasks.scienceqa",
    "captions": "tasks.captions",
}


@dataclass(frozen=True)
class Task:
    """Reader and scorer of one task; only `read` is required.

    `read(path, images=None, split=None)` returns Examples, by default those to train on. The image path of an Example
    is relative to the folder `images`. `score(examples, responses)` returns scores by name. A response is a string, or
    None if the prompt, or a choice after it, does not fit into the context. A task without `score` has no command in
    evaluate.py; the docstring of `score` is the command's help. Both functions raise OSError, or ValueError with a
    one-line message.
    """

    read: Callable[..., list[Example]]
    score: Callable[[Sequence, Sequence[str | None]], dict[str, float | None]] | None = None
    read_for_scoring: Callable[..., list] | None = (
        None  # like `read`, if the examples to score differ from those to train on
    )
    choices: Callable[..., list[str]] | None = None  # all possible responses to an example, for --choose
    read_responses: Callable[[Path, Sequence], list[str | None]] | None = None  # reads the file of --results
    write_results: Callable[[object, dict, Path], None] | None = None  # prints the scores and writes them to a folder
    split: str | None = None  # the split to score by default; None: the file has no splits
    needs_images: bool = False  # reject the base alone, and an adapter without a projection
    max_new_tokens: int = 64
    data_help: str = "File of examples, in the same format as for train.py."
    unit: str = "example"  # unit of the progress bar


def load_task(name: str) -> Task:
    """Import and return a task by its name in TASKS."""
    return import_module(TASKS[name]).TASK
