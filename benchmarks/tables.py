"""Figures on standard output, in a JSON file, and as a picture beside it."""

import platform
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.figure import Figure

from runtime.files import atomic_write, read_json_object, write_json

json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Where the figures go, added to what is there."
)


def measured_on(size: str, device: torch.device, dtype: torch.dtype) -> dict:
    """What figures depend on, besides the options of their own command."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = torch.get_num_threads()
    return {"size": size, "device": name, "threads": threads, "dtype": str(dtype)[6:], "torch": torch.__version__}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def ratio_text(row: dict) -> str:
    ratio = row["ratio"]
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def publish(
    kind: str, rows: dict[str, dict], columns: dict[str, Callable], about: dict, json_path: Path | None = None
) -> None:
    """A table on standard output; in the JSON file, the figures under a name of their own, and a picture beside it."""
    click.echo(f"{kind}: {', '.join(f'{name} {value}' for name, value in about.items())}")
    click.echo("| | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for name, row in rows.items():
        click.echo(f"| {name} | " + " | ".join(text(row) for text in columns.values()) + " |")
    if json_path is not None:
        known = read_json_object(json_path) if json_path.exists() else {}
        special = [name for name in ("checkpoint_activations", "check") if about.get(name)]
        known[" ".join([kind, about["size"], about["dtype"], *special])] = about | {"rows": rows}
        write_json(json_path, known)
        draw_ratios(known, json_path.with_suffix(".png"))


def draw_ratios(known: dict[str, dict], path: Path) -> None:
    """Bars of how many times as long as ours each takes, with the spread over the rounds."""
    panels = {title: part["rows"] for title, part in known.items() if "ratio" in next(iter(part["rows"].values()))}
    if not panels:
        return
    heights = [0.9 + 0.28 * len(rows) for rows in panels.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    for axes, (title, rows) in zip(np.ravel(figure.subplots(len(panels), 1, height_ratios=heights)), panels.items()):
        ratios = [row["ratio"] for row in rows.values()]
        middle = [ratio["median"] for ratio in ratios]
        spread = [[r["median"] - r["least"] for r in ratios], [r["most"] - r["median"] for r in ratios]]
        bars = axes.barh(list(rows), middle, xerr=spread, capsize=3, color="C0")
        axes.bar_label(bars, [f"{value:.2f}" for value in middle], padding=6)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="time, in times ours (less is better)")
        axes.margins(x=0.12)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
