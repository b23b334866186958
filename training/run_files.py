"""The files of a training run: metrics and checkpoints, and the state of the run that they imply.

`fixed` are the options that must not change when a run is resumed.
"""

import io
import json
import os
import shutil
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adapter import Adapter
from formats.tensors import load_pth, require_dense
from runtime.distributed import broadcast_from_rank0
from runtime.files import atomic_write, first_line, named_errors, read_bytes, remove_unfinished
from runtime.schema import brief, renamed, require_number

CHECKPOINT, SUMMARY = "checkpoint.pt", "summary.json"
TENSORBOARD = "tensorboard"  # a folder
WRITTEN = ("adapter.safetensors", SUMMARY, "metrics.jsonl", "curves.png", TENSORBOARD)  # moved to run-N by a new run


class Progress(NamedTuple):
    """The progress of a run."""

    step: int
    tokens: int
    seconds: float  # time spent in the steps
    micro_batch_tokens: int | None = None


class Kept(NamedTuple):
    """The adapter with the lowest validation loss so far, for --keep best."""

    loss: float
    step: int
    tensors: dict[str, Tensor]  # the adapter's state_dict


def run_state(out: Path, resume: str | None) -> str:
    """Return "begun" if there is a checkpoint, "finished" if there is only a summary to resume from, else "new".

    checkpoint.pt exists from the first save until the summary is written. `resume` is None, "yes" or "auto". Raises
    ValueError if there is a checkpoint but `resume` is None, or if `resume` is "yes" but the folder has neither.
    """
    if (out / CHECKPOINT).exists():
        if resume is None:
            advice = "continue it with --resume, or use a different --out"
            raise ValueError(f"{out / CHECKPOINT}: is the checkpoint of an unfinished run; {advice}")
        return "begun"
    if resume is not None and (out / SUMMARY).exists():
        return "finished"
    if resume == "yes":
        raise ValueError(f"{out / CHECKPOINT}: no such checkpoint to resume from; omit --resume, or use --resume auto")
    return "new"


HASHES = {  # what a change of the hash means, for error messages
    "init": " (a different adapter for --init)",
    "data_hash": " (different data)",
    "images_hash": " (different images)",
    "features_hash": " (different features of the images)",
    "base_fingerprint": " (a different base)",
    "tokenizer_fingerprint": " (a different tokenizer)",
    "vision_encoder_fingerprint": " (a different vision encoder)",
}


def check_options(before: object, fixed: dict, path: Path) -> None:
    """Raise ValueError if the options `before`, read from `path`, differ from `fixed`.

    Options that an earlier version did not write get defaults. The path of the base is not compared.
    """
    if not isinstance(before, dict):
        raise ValueError(f"{path}: does not state the options of its run")
    before = {
        "keep": "last",
        "eval_every": None,
        "tokenizer_fingerprint": fixed.get("tokenizer_fingerprint"),
        "images_hash": fixed.get("images_hash"),
    } | renamed(before)
    for name, value in fixed.items():
        if name != "base" and before.get(name) != value:
            change = f"was made with {name} = {before.get(name)}, not {value}{HASHES.get(name, '')}"
            raise ValueError(f"{path}: {change}; a resumed run cannot change it")


# ---------------------------------------------------------------------------------------------------
# The folder


def begin_in_folder(out: Path, step: int) -> Path | None:
    """Prepare the folder to continue after `step`, and delete what a killed run wrote after that step.

    For a new run, `step` is 0: if a previous run has written an adapter or a summary, its files are moved to a new
    folder run-N, which is returned; otherwise its metrics, plot and TensorBoard folder are deleted. Raises OSError, or
    ValueError if metrics are missing or invalid.
    """
    for name in (*WRITTEN, CHECKPOINT):
        remove_unfinished(out / name)
    if step:
        (out / SUMMARY).unlink(missing_ok=True)
        (out / "curves.png").unlink(missing_ok=True)
        trim_metrics(out / "metrics.jsonl", step)
        return None
    moved = None
    if any((out / name).is_file() for name in ("adapter.safetensors", SUMMARY)):
        moved = next(place for i in count(1) if not (place := out / f"run-{i}").exists())
        move_run(out, moved)
    for name in ("metrics.jsonl", "curves.png"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / TENSORBOARD, ignore_errors=True)
    return moved


def move_run(out: Path, folder: Path) -> None:
    """Move the files of a run into `folder`, which has a temporary name until all files have been moved."""
    moving = folder.with_name(f"{folder.name}.moving")
    moving.mkdir(exist_ok=True)
    for name in WRITTEN:
        if (out / name).exists():
            (out / name).rename(moving / name)
    moving.rename(folder)


def finish_moving(out: Path) -> None:
    """Complete a `move_run` that was killed. Every run calls this first, so none has written to the folder since."""
    for moving in out.glob("run-*.moving"):
        if any(moving.iterdir()):
            move_run(out, moving.with_suffix(""))
        else:
            moving.rmdir()


# ---------------------------------------------------------------------------------------------------
# metrics.jsonl


def trim_metrics(path: Path, step: int) -> None:
    """Remove the lines that a killed run wrote after the step of its checkpoint.

    An evaluation at that step is removed, too, because it will be repeated. Raises ValueError if steps are missing.
    """
    kept = []
    for line in read_metrics(path):
        if line["step"] < step or (line["step"] == step and "loss" in line):
            kept.append(line)
    if [line["step"] for line in kept if "loss" in line] != list(range(1, step + 1)):
        advice = "restore the file, or use a different --out"
        raise ValueError(f"{path}: does not have every step up to {step}, the step of checkpoint.pt; {advice}")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict]:
    """Read every complete line; a killed run may leave a partial one at the end.

    Return [] if there is no file. Raises a ValueError that names an invalid line.
    """
    lines = []
    if path.exists():
        for number, text in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
            try:
                lines.append(checked_line(json.loads(text)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number}: not valid metrics: {first_line(error)}") from None
    return lines


def checked_line(line: object) -> dict:
    """Validate one line of metrics, and return it."""
    if not isinstance(line, dict):
        raise ValueError(f"it is {brief(line)}, not an object")
    require_number("step", line.get("step"), 0, 2**40, whole=True)
    for name, value in line.items():
        require_number(name, value, -1e30, 1e30)
    return line


def write_metrics(path: Path, line: dict) -> None:
    """Append one line of metrics. Raises an OSError that names the file, or ValueError if a value is not finite."""
    with named_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


# ---------------------------------------------------------------------------------------------------
# checkpoint.pt


def save_checkpoint(
    path: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    fixed: dict,
    best: Kept | None = None,
) -> None:
    """Write the checkpoint atomically, after flushing metrics.jsonl."""
    with named_errors(path.with_name("metrics.jsonl")), open(path.with_name("metrics.jsonl"), "rb+") as metrics:
        os.fsync(metrics)
    state = {
        "progress": progress._asdict(),
        "adapter": adapter.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": best and best._asdict(),
        "options": fixed,
    }
    content = io.BytesIO()
    torch.save(state, content)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getvalue())


def load_checkpoint(
    path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, fixed: dict
) -> tuple[Progress, Kept | None]:
    """Load the state of adapter and optimizer; return the progress, and the best adapter so far if it was kept.

    The first rank reads the file for all ranks. Raises FileNotFoundError, or ValueError if the file is invalid or
    belongs to a run with different options.
    """
    checkpoint = load_pth(path, broadcast_from_rank0(partial(read_bytes, path)))
    invalid = f"{path}: is not a valid checkpoint"
    try:
        options = json.loads(json.dumps(checkpoint.get("options")))  # this rejects anything but plain values
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{invalid}: its options: {first_line(error)}") from None
    check_options(options, json.loads(json.dumps(fixed)), path)
    try:
        progress = Progress(**checkpoint["progress"])
        require_number("step", progress.step, 1, 2**40, whole=True)
        require_number("tokens", progress.tokens, 1, 2**60, whole=True)
        require_number("seconds", progress.seconds, 1e-9, 1e12)
        if progress.micro_batch_tokens is not None:  # checkpoints of earlier versions do not state it
            require_number("micro_batch_tokens", progress.micro_batch_tokens, 1, 2**40, whole=True)
        best = checkpoint.get("best") and Kept(*(checkpoint["best"][name] for name in Kept._fields))
        for tensors in ([best.tensors] if best else []) + [checkpoint["adapter"]]:  # the current adapter is loaded last
            for tensor in tensors.values():
                require_dense(tensor)
            adapter.load_state_dict(tensors)
        if best:
            require_number("the step of the best adapter", best.step, 0, progress.step, whole=True)
            require_number("the loss of the best adapter", best.loss, -1e30, 1e30)
        load_optimizer(optimizer, checkpoint["optimizer"]["state"], progress.step)
        return progress, best or None
    except Exception as error:  # any field may be missing or have an unexpected type
        raise ValueError(f"{invalid}: {first_line(error)}") from None


def load_optimizer(optimizer: torch.optim.Optimizer, moments: dict, steps: int) -> None:
    """Load AdamW's moments after `steps` steps, and keep the hyper-parameters of the given optimizer.

    Raises ValueError if a moment has the wrong shape, is not finite, or belongs to a different step.
    """
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                if require_dense(state[name]).shape != parameter.shape or not state[name].isfinite().all():
                    raise ValueError(f"its {name} is not a tensor of shape {tuple(parameter.shape)} with finite values")
            if require_dense(state["step"]).numel() != 1 or state["step"].item() != steps:
                raise ValueError(f"the step of its optimizer is not {steps}")
