"""What a training run writes to its folder and reads back: metrics, checkpoints, a summary.

`options` are the fixed ones everywhere here: those in which a run and its resumption must be the same.
"""

import io
import json
import os
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from adapter import Adapter
from formats.tensors import load_pth, require_dense
from runtime.distributed import broadcast_from_rank0, sync_errors
from runtime.files import atomic_write, first_line, read_bytes, read_json_object, resolved
from runtime.schema import require_number
from training.mlp_prompts import with_plain_prompts


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of its steps


def run_state(out: Path, resume: str | None, options: dict, base: str | Path | None) -> str:
    """How a run stands in its folder: "new", "begun" or "finished".

    `options` are those known so far, `resume` is None, "yes" or "auto". Raises ValueError where it does not suit that,
    or where the run that finished there had other options.
    """
    checkpoint, summary = out / "checkpoint.pt", out / "summary.json"
    if checkpoint.exists():
        if resume is None:
            raise ValueError(f"{checkpoint} is of an unfinished run: go on with --resume, or use another --out")
        return "begun"
    if resume is not None and summary.exists():
        before = read_json_object(summary).get("options")
        check_options(before, options | {"base": resolved(base)}, summary)
        return "finished"
    if resume == "yes":
        raise ValueError(
            f"{checkpoint}: nothing to resume, nothing was saved; leave out --resume, or say --resume auto"
        )
    return "new"


def check_options(before: object, options: dict, path: Path) -> None:
    """Raise ValueError where a run that left `path` had other options than now."""
    if not isinstance(before, dict):
        raise ValueError(f"{path}: does not say the options of its run")
    for name, value in options.items():
        if before.get(name) != value:
            was = f"{path}: was made with {name} = {before.get(name)}, not {value}"
            raise ValueError(f"{was}: a resumed run cannot change it")


WRITTEN = ("adapter.safetensors", "summary.json", "metrics.jsonl", "curves.png")


def begin_in_folder(out: Path, step: int) -> Path | None:
    """Make the folder ready to go on after `step`: what a killed run left of later steps goes.

    What a run that finished there left, where a new one begins, is moved to a folder in it, which is returned. Raises
    OSError, or ValueError where metrics are missing.
    """
    moved = None
    if step == 0 and (out / "adapter.safetensors").is_file():
        moved = next(place for i in count(1) if not (place := out / f"run-{i}").exists())
        moved.mkdir()
        for name in filter(lambda name: (out / name).is_file(), WRITTEN):
            (out / name).rename(moved / name)
    for stale in (out / "summary.json", out / "curves.png", *out.glob("*.unfinished")):
        stale.unlink(missing_ok=True)
    trim_metrics(out / "metrics.jsonl", step)
    return moved


def trim_metrics(path: Path, step: int) -> None:
    """Take from metrics.jsonl what a killed run wrote after the step that is gone on from.

    An evaluation at that very step goes as well, since it is made again. Raises ValueError where steps are missing.
    """
    kept = []
    if step:
        for line in read_metrics(path):
            if line["step"] < step or (line["step"] == step and "loss" in line):
                kept.append(line)
        steps = [line["step"] for line in kept if "loss" in line]
        if len(steps) != step or steps != list(range(1, step + 1)):
            raise ValueError(f"{path}: does not have every step up to {step}, where checkpoint.pt stands")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict]:
    """Every whole line; a killed run may leave half of one at the end. Raises ValueError, naming the line."""
    lines = []
    if path.exists():
        for number, text in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
            try:
                lines.append(checked_line(json.loads(text)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is no line of metrics: {first_line(error)}") from None
    return lines


def checked_line(line: object) -> dict:
    """A line of metrics; raises ValueError where it is none."""
    if not isinstance(line, dict):
        raise ValueError(f"a {type(line).__name__}")
    require_number("step", line.get("step"), 0, 2**40, whole=True)
    for name, value in line.items():
        require_number(name, value, -1e30, 1e30)
    return line


def write_metrics(path: Path, line: dict) -> None:
    """Append one. Raises OSError that names the file."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def save_checkpoint(
    out: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, progress: Progress, options: dict
) -> None:
    """The adapter for use, and all that `--resume` needs.

    When the new checkpoint takes the place of the old one, it and the metrics so far are on the disk.
    """
    with open(out / "metrics.jsonl", "rb+") as metrics:
        os.fsync(metrics)
    with_plain_prompts(adapter).save(out / "adapter.safetensors", steps=progress.step)
    state = {
        "progress": progress._asdict(),
        "adapter": adapter.state_dict(),
        "optimizer": optimizer.state_dict(),
        "options": options,
    }
    content = io.BytesIO()
    torch.save(state, content)
    with atomic_write(out / "checkpoint.pt") as temporary:
        temporary.write_bytes(content.getvalue())


def load_checkpoint(path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, options: dict) -> Progress:
    """Fill adapter and optimizer; returns the progress. The first rank reads the file, for all.

    Raises FileNotFoundError, or ValueError where the file is broken or of a run with other options.
    """
    content = broadcast_from_rank0(partial(read_bytes, path))
    with sync_errors():
        checkpoint = load_pth(path, content)
        check_options(checkpoint.get("options"), options, path)
        try:
            progress = Progress(*(checkpoint["progress"][name] for name in Progress._fields))
            require_number("step", progress.step, 1, 2**40, whole=True)
            require_number("tokens", progress.tokens, 1, 2**60, whole=True)
            require_number("seconds", progress.seconds, 1e-9, 1e12)
            for tensor in checkpoint["adapter"].values():
                require_dense(tensor)
            adapter.load_state_dict(checkpoint["adapter"])
            load_optimizer(optimizer, checkpoint["optimizer"]["state"], progress.step)
            return progress
        except Exception as error:  # whatever is missing, or of another shape
            raise ValueError(f"{path}: not a checkpoint of train.py: {first_line(error)}") from None


def load_optimizer(optimizer: torch.optim.Optimizer, moments: dict, steps: int) -> None:
    """Fill AdamW with what it knew of each parameter, after so many steps; rates and betas stay its own.

    Raises ValueError where that is not of the parameter's shape, not finite, or of another step.
    """
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            known = optimizer.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                if require_dense(known[name]).shape != parameter.shape or not known[name].isfinite().all():
                    raise ValueError(f"its {name} is not that of {tuple(parameter.shape)} finite numbers")
            if require_dense(known["step"]).numel() != 1 or known["step"].item() != steps:
                raise ValueError(f"its optimizer took other than {steps} steps")
