"""What a training command can be told beside its hyper-parameters, each kind a record, and the options that fill it."""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import click
from cloup import option, option_group

from adapter import ATTENTIONS
from runtime.cli import SEED, Count, Real, bits_options, device_options
from training.initial import PARTS, initial_fingerprint


@dataclass(frozen=True)
class DataOptions:
    """What there is to learn from."""

    data: str | None
    task: str = "instructions"  # a key of tasks.TASKS
    toy: str | None = None  # a key of toy.TOYS, where there is no data; None is "text"
    limit: int | None = None  # only the first so many examples
    template: str | None = None  # one of formats.chat_templates.NAMES; None is as the data is
    tower: str | None = None  # CLIP's, for images
    encoder: str | None = None  # or a function of the user's, FILE.py:NAME
    images: str | None = None  # the folder that they are in
    skip_missing: bool = False
    features: Path = Path("features")  # keeps what the tower makes of images

    def checked(self, base: str | None) -> "DataOptions":
        """With the toy named. Raises ValueError where the options contradict each other."""
        if self.tower is not None and self.encoder is not None:
            raise ValueError("--clip and --encoder: one of them makes the features of an image")
        if self.data is not None and self.toy is not None:
            raise ValueError(f"--toy {self.toy} brings its own data: leave out --data {self.data}")
        if base is not None and self.data is None and self.toy is None:
            raise ValueError(f"--base {base} needs --data FILE, or --toy text for the toy's questions")
        given = {"--clip": self.tower, "--encoder": self.encoder, "--images": self.images}
        given["--task"] = None if self.task == "instructions" else self.task
        what = next((name for name, value in given.items() if value is not None), None)
        if self.data is None and what is not None:
            raise ValueError(f"{what} needs --data FILE: the toy brings all that it needs")
        return replace(self, toy=self.toy or "text")


TEMPLATE_HELP = "How they are written for the model.  [default: alpaca, or auto for conversations: the base's own]"


def data_options(tasks: list[str], toys: list[str], templates: Sequence[str]):
    """A decorator: the options that fill DataOptions."""
    return option_group(
        "Data",
        option("--data", type=click.Path(), help="JSON or JSONL, also .gz or .xz.  [default: the toy's]"),
        option("--task", type=click.Choice(tasks), default="instructions", help="What the data is: docs/tasks.md."),
        option("--toy", type=click.Choice(toys), help="In place of --data: docs/toy.md.  [default: text]"),
        option("--limit", type=Count(), help="Use only the first so many examples."),
        option("--template", type=click.Choice(templates), help=TEMPLATE_HELP),
        option("--clip", "tower", type=click.Path(), help="CLIP's vision tower; without it images are left out."),
        option("--encoder", help="In place of --clip: FILE.py:NAME, your function to (M, Cv) numbers."),
        option("--images", type=click.Path(), help="Where the images are.  [default: beside the data]"),
        option("--skip-missing", is_flag=True, help="Leave out examples whose image is not there."),
        option("--features", type=click.Path(path_type=Path), default="features", help="Cache of image features."),
    )


optimisation_options = option_group(
    "Adapter and optimisation",
    option("--layers", type=Count(), help="L, how many of the topmost layers are adapted.  [default: all but two]"),
    option("--length", type=click.IntRange(1, 4096), help="K, prompt vectors per layer."),
    option("--epochs", type=Count(), help="Passes over the training data."),
    option("--warmup-epochs", type=Real(0), help="The learning rate rises over these."),
    option("--batch-size", type=Count(), help="Examples per optimizer step, over all ranks."),
    option("--blr", type=Real(0, 1e3), help="Base learning rate: lr = blr * batch size / 256."),
    option("--lr", type=Real(0, 1e3), help="Peak learning rate.  [default: from --blr]"),
    option("--weight-decay", type=Real(0, 1e3), help="Of the prompts; gates have none."),
    option("--max-seq-len", type=Count(2), help="In tokens; longer responses are cut.  [default: 512, or the base's]"),
    option("--val-size", type=Real(0), help="Validation set: a share if below 1, else a number of examples."),
    option("--seed", type=SEED, help="Of prompts, validation split and order of examples."),
)


@dataclass(frozen=True)
class BaseOptions:
    """Which frozen model, how it is held, and what of the adapter is there before."""

    base: str | None
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "fused"  # a key of adapter.ATTENTIONS
    bits: str | None = None  # of the layers' weights: "8", "4", or as dtype says
    compile: bool = False
    init: str | None = None  # the adapter to go on from
    freeze: tuple[str, ...] = ()  # parts of the adapter that stay as they are
    prompts: str = "plain"  # or "mlp": a small network makes them while they are learnt
    strategy: str = "auto"  # ddp: whole on every rank; fsdp: split over them


STRATEGY = "Under torchrun: the base whole on every rank, or split over them; auto splits one that does not fit."
MICRO_BATCH_HELP = "Positions of one forward pass, padding included."
MICRO_BATCH = option("--micro-batch-tokens", type=Count(), help=MICRO_BATCH_HELP)
PROMPTS_HELP = "Learnt as they are, or made by a small network; the file is the same."
base_options = option_group(
    "Model",
    option("--base", type=click.Path(), help="The model to adapt.  [default: the toy's, made at the first use]"),
    option("--init", type=click.Path(), help="An adapter to go on from, in a new run; its L and K count."),
    option("--freeze", type=click.Choice(PARTS), multiple=True, help="What of the adapter stays as it is; repeatable."),
    option("--prompts", type=click.Choice(["plain", "mlp"]), default="plain", help=PROMPTS_HELP),
    *device_options,
)
memory_options = option_group(  # the first two fill train.TrainConfig: they change nothing of what is learnt
    "Memory and speed",
    MICRO_BATCH,
    option("--checkpoint-activations", is_flag=True, help="Activation checkpointing: less memory, more time."),
    *bits_options,
    option("--compile", is_flag=True, help="torch.compile the layers: slow to start, then faster."),
    option("--attention", type=click.Choice([*ATTENTIONS]), default="fused", help="Two ways to the same numbers."),
    option("--strategy", type=click.Choice(["auto", "ddp", "fsdp"]), default="auto", help=STRATEGY),
)


@dataclass(frozen=True)
class RunOptions:
    """How a run goes on and off; a resumed one may have others."""

    out: Path
    resume: str | None = None  # None, "yes" or "auto"
    log_every: int = 1
    save_every: int = 100
    max_minutes: float | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def deadline(self) -> float:
        """A time of `time.perf_counter`."""
        return self.started + 60 * (self.max_minutes or math.inf)


RESUME = "Go on from the checkpoint in --out, with the same options (auto: if there is one)."
run_options = option_group(
    "Run",
    option("--out", type=click.Path(path_type=Path), default="out", help="Folder for adapter, metrics, checkpoints."),
    option("--resume", is_flag=False, flag_value="yes", type=click.Choice(["yes", "auto"]), help=RESUME),
    option("--save-every", type=Count(), default=100, help="Steps between checkpoints."),
    option("--log-every", type=Count(), default=1, help="Steps between readings on the progress bar."),
    option("--max-minutes", type=Real(0, min_open=True), help="Save and stop when so many have gone by."),
)


def pick(record: type, options: dict):
    """The record, filled with those of the command's options that it has."""
    return record(**{each.name: options[each.name] for each in fields(record) if each.name in options})


def fixed_options(config, source: DataOptions, base: BaseOptions, examples: list) -> dict[str, object]:
    """What a run and its resumption must have in common, as far as it is known before the base is loaded.

    `config` is a train.TrainConfig.
    """
    options = asdict(config) | {"lr": config.peak_lr, "dtype": f"torch.{base.dtype}", "bits": base.bits}
    options |= {name: getattr(source, name) for name in ("task", "toy", "limit", "template", "skip_missing")}
    options |= {"init": initial_fingerprint(base.init), "freeze": sorted(set(base.freeze)) or None}
    options |= {"prompts": None if base.prompts == "plain" else base.prompts}
    options["data_hash"] = hashlib.sha256(repr(examples).encode()).hexdigest()[:16]
    changeable = {"micro_batch_tokens", "checkpoint_activations", "gradient_clip"}
    unknown = {name for name in ("layers", "max_seq_len") if options[name] is None}
    return {name: value for name, value in options.items() if name not in changeable | unknown}
