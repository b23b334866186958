"""Seconds, bytes, what the machine has to give; and figures as a table, in a JSON file, and as a picture beside it."""

import ctypes
import gc
import math
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from cloup import option
from matplotlib.figure import Figure
from tqdm import tqdm

from runtime.device import device_name
from runtime.errors import error_line
from runtime.files import atomic_write, read_json_object, write_json

MATRIX = {"cuda": 8192, "cpu": 2048}  # rows and columns; small ones would not keep the device busy
COPIED = {"cuda": 2**28, "cpu": 2**28}  # numbers of 4 bytes; fewer would fit a cache


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes, the GPU's part included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    n = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(8))


def sustained_matmul_speed(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of large matrix products that go on for some seconds, in which a GPU may lower its clock."""
    work, operations = matmul_work(device, dtype)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        seconds_of(work, device)
        number += 1
    return number * operations / (time.perf_counter() - start)


def copy_speed(device: torch.device) -> float:
    """Bytes/s that a large copy moves, read and written."""
    source = torch.zeros(COPIED.get(device.type, COPIED["cpu"]), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(8))


def read_work(device: torch.device) -> tuple[Callable[[], object], int]:
    """Return work that reads a large tensor, and its bytes: a contestant, since the speed of a machine drifts."""
    numbers = torch.zeros(COPIED.get(device.type, COPIED["cpu"]) // 2, dtype=torch.long, device=device)
    return numbers.sum, numbers.nbytes


def matmul_work(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """Return work of four large matrix products, and its operations."""
    n = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: [a @ b for _ in range(4)], 4 * 2 * n**3


def share_of(amount: float, seconds: list[float], peak_amount: float, peak_seconds: list[float]) -> float:
    """Return what share of the peak the work reached, in bytes or operations per second: the median of the rounds."""
    rounds = zip(seconds, peak_seconds)
    return statistics.median(amount / mine / (peak_amount / peak) for mine, peak in rounds)


def peak_growth(work: Callable[[], object], device: torch.device) -> int:
    """By how many bytes tensors on the GPU, or on a CPU (under Linux) the process, grew meanwhile, at most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before counts as free
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """A field of this process's status, as Linux has it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_anonymous(work: Callable[[], object], interval: float = 0.05) -> tuple[object, int]:
    """What the work returns, and the most bytes that were the process's own meanwhile, mapped files not counted.

    Looked at every so many seconds, under Linux.
    """
    seen, done = [status_bytes("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            seen.append(status_bytes("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return work(), max(seen)
    finally:
        done.set()
        thread.join()


def interleave(
    works: dict[str, Callable[[], object]], repeat: int, device: torch.device, limit: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each, round by round, so that a slow moment of the machine hits all alike.

    Before the rounds is one to warm up. No further round begins when they have taken `limit` seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    with tqdm(total=(repeat + 1) * len(works), unit="run", leave=False) as bar:
        for turn in range(repeat + 1):
            for name, work in works.items():
                bar.set_postfix_str(name)
                taken = seconds_of(work, device)
                if turn > 0:
                    seconds[name].append(taken)
                bar.update()
            if sum(map(sum, seconds.values())) > limit:
                break
    return seconds


RATIO = ("median", "least", "most")


def compare_seconds(seconds: dict[str, list[float]], first: str) -> dict[str, dict]:
    """Median, and how many times as long as `first`, round by round: median, least and most."""
    rows = {}
    for name, taken in seconds.items():
        ratios = [mine / its for mine, its in zip(taken, seconds[first])]
        spread = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        rows[name] = {"seconds": taken, "median": statistics.median(taken), "ratio": spread}
    return rows


def read_figures(path: Path) -> dict[str, dict]:
    """Read the figures of earlier benchmarks, none if there is no file. Raises OSError or ValueError."""
    known = read_json_object(path) if path.exists() else {}
    for title, part in known.items():
        rows = part.get("rows") if isinstance(part, dict) else None
        if not isinstance(rows, dict) or not rows or not all(map(is_row, rows.values())):
            raise ValueError(f"{path}: {title!r} is no table of a benchmark")
    return known


def is_row(row: object) -> bool:
    """Return True if a value is a row of a table: an object whose ratio, if it has one, is three ordered numbers."""
    if not isinstance(row, dict) or "ratio" not in row:
        return isinstance(row, dict)
    ratio = row["ratio"]
    if not isinstance(ratio, dict) or not all(type(ratio.get(key)) in (int, float) for key in RATIO):
        return False
    return 0 <= ratio["least"] <= ratio["median"] <= ratio["most"] < 1e12


def check_figures(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that cannot be added to, before anything is measured."""
    if path is not None:
        try:
            read_figures(path)
        except (OSError, ValueError) as error:
            raise click.BadParameter(error_line(error)) from None
    return path


json_option = option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    callback=check_figures,
    help="Where the figures go, added to what is there.",
)


def measured_on(size: str, device: torch.device, dtype: torch.dtype) -> dict:
    """What figures depend on, besides the options of their own command."""
    threads = torch.get_num_threads()
    return {
        "size": size,
        "device": device_name(device),
        "threads": threads,
        "dtype": str(dtype)[6:],
        "torch": torch.__version__,
    }


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
        known = read_figures(json_path)
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
