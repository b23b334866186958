"""What a training run writes and reads back: metrics, checkpoints, curves."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from adapter import Adapter
from runtime.files import atomic_write
from formats.bases import first_line, load_pth, read_json
from training.distributed import broadcast_from_rank0, sync_errors

# Options in which a run and its resumption may differ.
FREE = {
    "out",
    "base",
    "data",
    "tower",
    "encoder",
    "images",
    "features",
    "device",
    "micro_batch_tokens",
    "checkpoint_activations",
    "compile",
    "log_every",
    "save_every",
    "resume",
    "strategy",
    "max_minutes",
}


def fixed_options(options: dict) -> dict:
    """The options in which a run and its resumption must be the same."""
    return {name: value for name, value in options.items() if name not in FREE}


def run_state(out: Path, resume: str | None, options: dict) -> str:
    """How a run stands in its folder: "new", "begun" or "finished".

    Raises ValueError where --resume does not suit that, or the run that finished there had other options.
    """
    checkpoint, summary = out / "checkpoint.pt", out / "summary.json"
    if checkpoint.exists():
        if resume is None:
            raise ValueError(f"{checkpoint} is of an unfinished run: go on with --resume, or use another --out")
        return "begun"
    if resume is not None and summary.exists():
        before = read_json(summary).get("options")
        known = options if options["layers"] is not None else {k: v for k, v in options.items() if k != "layers"}
        check_options(before, known, summary)
        if before["base"] != resolved(options["base"]):
            raise ValueError(f"{summary}: was made with base {before['base']}, not {resolved(options['base'])}")
        return "finished"
    if resume == "yes":
        raise ValueError(
            f"{checkpoint}: nothing to resume, nothing was saved; leave out --resume, or say --resume auto"
        )
    return "new"


def resolved(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def trim_metrics(path: Path, step: int) -> None:
    """Take from metrics.jsonl what a killed run wrote after the step that is gone on from.

    An evaluation at that very step goes as well, since it is made again. Raises ValueError where steps are missing.
    """
    kept = []
    if step:
        for line in read_metrics(path):
            if line["step"] < step or (line["step"] == step and "loss" in line):
                kept.append(line)
        if [line["step"] for line in kept if "loss" in line] != list(range(1, step + 1)):
            raise ValueError(f"{path}: does not have every step up to {step}, where checkpoint.pt stands")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict]:
    """Every whole line; a killed run may leave half of one at the end. Raises ValueError, naming the line."""
    lines = []
    if path.exists():
        for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                lines.append(json.loads(text))
                lines[-1]["step"] + 0
            except (ValueError, TypeError, KeyError, IndexError):
                raise ValueError(f"{path}: line {number} is no line of metrics") from None
    return lines


def write_metrics(path: Path, line: dict) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def save_checkpoint(
    out: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, progress: dict[str, float], options: dict
) -> None:
    """The adapter for use, and all that `--resume` needs. `progress` has step, tokens, seconds.

    When the new checkpoint takes the place of the old one, it and the metrics so far are on the disk.
    """
    with open(out / "metrics.jsonl", "rb+") as metrics:
        os.fsync(metrics)
    adapter.save(out / "adapter.safetensors", steps=progress["step"])
    state = {
        "progress": progress,
        "adapter": adapter.state_dict(),
        "optimizer": optimizer.state_dict(),
        "options": fixed_options(options),
    }
    content = io.BytesIO()
    torch.save(state, content)
    with atomic_write(out / "checkpoint.pt") as temporary:
        temporary.write_bytes(content.getvalue())


def load_checkpoint(path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, options: dict) -> dict[str, float]:
    """Fill adapter and optimizer; returns the progress. The first rank reads the file, for all.

    Raises FileNotFoundError, or ValueError where the file is broken or of a run with other options.
    """
    content = broadcast_from_rank0(path.read_bytes)
    with sync_errors():
        checkpoint = load_pth(path, content)
        check_options(checkpoint.get("options"), options, path)
        try:
            adapter.load_state_dict(checkpoint["adapter"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            return {name: checkpoint["progress"][name] + 0 for name in ("step", "tokens", "seconds")}
        except Exception as error:  # whatever is missing, or of another shape
            raise ValueError(f"{path}: not a checkpoint of train.py: {first_line(error)}") from None


def check_options(before: object, options: dict, path: Path) -> None:
    """Raise ValueError where a run that left `path` had other options than now."""
    if not isinstance(before, dict):
        raise ValueError(f"{path}: does not say the options of its run")
    for name, value in fixed_options(options).items():
        if before.get(name) != value:
            was = f"{path}: was made with {name} = {before.get(name)}, not {value}"
            raise ValueError(f"{was}: a resumed run cannot change it")


def draw_curves(metrics: list[dict], adapter: Adapter, path: Path) -> None:
    """The losses, and the gates as a picture of layers x heads."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label, style in (("loss", "training", {"linewidth": 1}), ("val_loss", "validation", {"marker": "o"})):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            left.plot(*zip(*points), label=label, **style)
    left.set(xlabel="step", ylabel="loss per response token", title="Loss")
    left.set_ylim(bottom=0)
    left.legend()
    draw_gates(right, adapter)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_gates(axes: Axes, adapter: Adapter) -> None:
    """The gates as a picture of layers x heads, white where they are closed."""
    gates = adapter.gate_values().detach().cpu()  # (L, H)
    first_layer = int(adapter.metadata.get("base_layers", len(gates))) - len(gates)
    image = paint_gates(axes, gates.numpy(), first_layer, max(gates.abs().max().item(), 1e-6))
    axes.set(title="How far each gate is open")
    axes.figure.colorbar(image, ax=axes)


def paint_gates(axes: Axes, gates: np.ndarray, first_layer: int, bound: float) -> AxesImage:
    """Gates (L, H) from -bound to bound; `first_layer` is that of row 0."""
    edges = (-0.5, gates.shape[1] - 0.5, first_layer - 0.5, first_layer + len(gates) - 0.5)
    image = axes.imshow(gates, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", origin="lower", extent=edges)
    axes.set(xlabel="head", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return image


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, elsewhere the most that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
