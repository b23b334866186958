"""The options of a training command besides its hyper-parameters: data, frozen base, and run.

Each option is declared once, as a field with its default and its help text.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import click
import torch

from adapter import ATTENTIONS
from formats.chat_templates import NAMES
from runtime.cli import BASE_HELP, PATH, Count, Real, setting
from tasks import TASKS
from toy import TOYS

KEEP = click.Choice(["last", "best"])
PARTS = ("prompts", "gates", "projection")  # parts of an adapter, for --freeze
TEMPLATE_HELP = "The prompt template.  [default: alpaca, or auto for conversations: the base's own]"


@dataclass(frozen=True)
class DataOptions:
    """Options of the training data, its prompt template, and its images with their encoder."""

    data: str | None = setting(
        None, "Training data: a JSON or JSONL file, also .gz or .xz.  [default: the toy's data]", click.Path()
    )
    task: str = setting("instructions", "The kind of data; see docs/tasks.md.", click.Choice([*TASKS]))
    toy: str | None = setting(
        None, "Train on this toy's data, without --data; see docs/toy.md.  [default: text]", click.Choice(TOYS)
    )
    limit: int | None = setting(None, "Use only this many examples, from the beginning.", Count())
    template: str | None = setting(None, TEMPLATE_HELP, click.Choice(NAMES))
    vision_encoder: str | None = setting(
        None,
        "Folder or file of CLIP's vision encoder; without it or --encoder, images are ignored.",
        click.Path(),
        "--clip",
    )
    encoder: str | None = setting(
        None, "Instead of --clip, a Python function that returns the features of a file, as FILE.py:NAME."
    )
    images: str | None = setting(None, "The folder of the images.  [default: the data's folder]", click.Path())
    skip_missing: bool = setting(False, "Skip examples whose image is missing, instead of ending with an error.")
    features: Path = setting(
        Path("features"), "Folder that caches the features of --clip, and holds the toy's images.", PATH
    )

    def checked(self, base: str | None) -> "DataOptions":
        """Return the options with the default toy filled in. Raises ValueError if they contradict each other."""
        if self.vision_encoder is not None and self.encoder is not None:
            raise ValueError("--clip and --encoder both compute the features of an image; use only one of them")
        if self.data is not None and self.toy is not None:
            raise ValueError(f"--toy {self.toy} brings its own data; omit --data {self.data}")
        if base is not None and self.data is None and self.toy is None:
            raise ValueError(f"--base {base} needs --data FILE, or --toy text to train on the toy's data")
        given = {"--clip": self.vision_encoder, "--encoder": self.encoder, "--images": self.images}
        given["--task"] = None if self.task == "instructions" else self.task
        unused = next((name for name, value in given.items() if value is not None), None)
        if self.data is None and unused is not None:
            raise ValueError(f"{unused} needs --data FILE; a toy does not use it")
        return replace(self, toy=self.toy or "text")


STRATEGY_HELP = "With torchrun: replicate the base (ddp) or shard it (fsdp); auto shards a base that does not fit."


@dataclass(frozen=True)
class BaseOptions:
    """The frozen base, how it is loaded, and the adapter that training is initialized from."""

    base: str | None = setting(None, f"{BASE_HELP}  [default: the toy's base]", click.Path())
    init: str | None = setting(None, "An adapter to initialize from, in a new run; its L and K are used.", click.Path())
    freeze: tuple[str, ...] = setting(
        (), "A part of the adapter to keep unchanged; repeatable.", click.Choice(PARTS), multiple=True
    )
    device: str = "auto"  # device, dtype and bits: the options that all commands share, in runtime/cli.py
    dtype: str = "auto"
    bits: str | None = None
    compile: bool = setting(False, "Compile the layers: slower at the start, then faster.")
    attention: str = setting(
        "fused", "Implementation of gated attention; the two are equivalent.", click.Choice([*ATTENTIONS])
    )
    strategy: str = setting("auto", STRATEGY_HELP, click.Choice(["auto", "ddp", "fsdp"]))


RESUME_HELP = "Continue the run in --out, with the same options; auto starts a new run if there is none."


@dataclass(frozen=True)
class RunOptions:
    """The folder of a run, and when the run saves, logs and stops. A resumed run may change these options."""

    out: Path = setting(Path("out"), "The folder for adapter, metrics and checkpoints.", PATH)
    resume: str | None = setting(None, RESUME_HELP, click.Choice(["yes", "auto"]), is_flag=False, flag_value="yes")
    save_every: int = setting(100, "Steps between checkpoints.", Count())
    log_every: int = setting(1, "Steps between updates of the loss in the progress bar.", Count())
    tensorboard: bool = setting(False, "Also write the metrics for TensorBoard, to the folder tensorboard in --out.")
    max_minutes: float | None = setting(None, "Save and stop after this many minutes.", Real(0, min_open=True))
    started: float = field(default_factory=time.perf_counter)  # seconds, on the clock of time.perf_counter


def fixed_options(
    config, data: DataOptions, base: BaseOptions, dtype: torch.dtype, examples: Sequence
) -> dict[str, object]:
    """Return the options that must not change when a run is resumed. `config` is a train.TrainConfig."""
    fixed = asdict(config)
    for changeable in ("micro_batch_tokens", "checkpoint_activations", "gradient_clip"):
        del fixed[changeable]
    fixed |= {"lr": config.peak_lr, "dtype": str(dtype), "bits": base.bits}
    fixed |= {name: getattr(data, name) for name in ("task", "toy", "limit", "template", "skip_missing")}
    fixed |= {"init": None, "freeze": sorted(set(base.freeze)) or None}
    fixed["data_hash"] = hashlib.sha256(repr(examples).encode()).hexdigest()[:16]
    return fixed
