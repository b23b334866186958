"""Measure time, memory and the machine's peak speeds; publish the results as a table, a JSON file and a plot."""

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

MATRIX = {"cuda": 8192, "cpu": 2048}  # rows and columns; a smaller matrix would not keep the device busy
COPIED = {"cuda": 2**28, "cpu": 2**28}  # number of 4-byte values; fewer might fit into a cache


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Call a function, and return its duration in seconds, including its work on the GPU."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the speed of a large matmul in FLOP/s, from the fastest of eight runs."""
    n = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(8))


def sustained_matmul_speed(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Return the mean speed of large matmuls in FLOP/s over at least `seconds` seconds.

    It may be lower than `matmul_speed`, because a GPU lowers its clock under load.
    """
    matmuls, operations = matmul_work(device, dtype)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        seconds_of(matmuls, device)
        number += 1
    return number * operations / (time.perf_counter() - start)


def copy_speed(device: torch.device) -> float:
    """Return the speed of a large copy in bytes/s, from the fastest of eight runs.

    Every byte counts twice, because it is read and written.
    """
    source = torch.zeros(COPIED.get(device.type, COPIED["cpu"]), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(8))


def read_work(device: torch.device) -> tuple[Callable[[], object], int]:
    """Return a function that reads a large tensor, and the number of bytes that it reads.

    The function is timed in turn with the contestants, because the speed of a machine drifts.
    """
    numbers = torch.zeros(COPIED.get(device.type, COPIED["cpu"]) // 2, dtype=torch.long, device=device)
    return numbers.sum, numbers.nbytes


def matmul_work(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """Return a function that computes four large matmuls, and the number of their floating-point operations."""
    n = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: [a @ b for _ in range(4)], 4 * 2 * n**3


def share_of(amount: float, seconds: list[float], peak_amount: float, peak_seconds: list[float]) -> float:
    """Return the share of the peak rate that was reached, as the median over the rounds.

    The amounts are the bytes or operations per round; the seconds have one value per round.
    """
    rounds = zip(seconds, peak_seconds)
    return statistics.median(amount / mine / (peak_amount / peak) for mine, peak in rounds)


def peak_growth(function: Callable[[], object], device: torch.device) -> int:
    """Run a function, and return by how many bytes memory grew at its peak.

    On a GPU, this is the memory of its tensors; on the CPU, it is the memory of the process (Linux only).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status_bytes("VmRSS")
    function()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """Return the value of a field of /proc/self/status in bytes (Linux only)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_anonymous(function: Callable[[], object], interval: float = 0.05) -> tuple[object, int]:
    """Run a function. Return its result, and the peak memory of the process in bytes, without memory-mapped files.

    The memory is sampled every `interval` seconds (Linux only).
    """
    seen, done = [status_bytes("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            seen.append(status_bytes("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return function(), max(seen)
    finally:
        done.set()
        thread.join()


def interleave(
    functions: dict[str, Callable[[], object]], repeat: int, device: torch.device, limit: float = math.inf
) -> dict[str, list[float]]:
    """Time functions in turn, so that a slow moment of the machine affects all of them.

    Returns the seconds of each function, one value per round. The first round is a warm-up, and is not counted. No
    round begins after the counted rounds have taken `limit` seconds in total.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with tqdm(total=(repeat + 1) * len(functions), unit="run", leave=False) as bar:
        for turn in range(repeat + 1):
            for name, function in functions.items():
                bar.set_postfix_str(name)
                duration = seconds_of(function, device)
                if turn > 0:
                    seconds[name].append(duration)
                bar.update()
            if sum(map(sum, seconds.values())) > limit:
                break
    return seconds


RATIO = ("median", "least", "most")


def compare_seconds(seconds: dict[str, list[float]], first: str) -> dict[str, dict]:
    """Return the seconds of each contestant, their median, and their ratio to the seconds of the contestant `first`.

    The ratio is computed per round; its median, minimum ("least") and maximum ("most") are returned.
    """
    rows = {}
    for name, durations in seconds.items():
        ratios = [duration / reference for duration, reference in zip(durations, seconds[first])]
        spread = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        rows[name] = {"seconds": durations, "median": statistics.median(durations), "ratio": spread}
    return rows


def read_results(path: Path) -> dict[str, dict]:
    """Read the results of earlier benchmarks by title; return {} if the file does not exist.

    Raises OSError if the file cannot be read, or ValueError if it does not contain results of benchmarks.
    """
    known = read_json_object(path) if path.exists() else {}
    for title, part in known.items():
        rows = part.get("rows") if isinstance(part, dict) else None
        if not isinstance(rows, dict) or not rows or not all(map(is_row, rows.values())):
            raise ValueError(
                f"{path}: the value of {title!r} is not the result of a benchmark; choose a different file"
            )
    return known


def is_row(row: object) -> bool:
    """Return True if a value is a row of results: an object whose "ratio", if any, has three numbers in order."""
    if not isinstance(row, dict) or "ratio" not in row:
        return isinstance(row, dict)
    ratio = row["ratio"]
    if not isinstance(ratio, dict) or not all(type(ratio.get(key)) in (int, float) for key in RATIO):
        return False
    return 0 <= ratio["least"] <= ratio["median"] <= ratio["most"] < 1e12


def check_results(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Return the path if results can be added to the file. Raises click.BadParameter otherwise.

    This is the callback of --json, so that an unsuitable file is rejected before anything is measured.
    """
    if path is not None:
        try:
            read_results(path)
        except (OSError, ValueError) as error:
            raise click.BadParameter(error_line(error)) from None
    return path


json_option = option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    callback=check_results,
    help="JSON file to which the results are added; a plot of relative times, if any, is written next to it.",
)


def measured_on(size: str, device: torch.device, dtype: torch.dtype) -> dict:
    """Return the conditions of a measurement: model size, device, threads, dtype and version of PyTorch."""
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
    """Print a table. If `json_path` is given, add the results to that file, and draw a plot next to it.

    `columns` maps each heading to a function that formats a row. Earlier results with
    the same title (`kind`, size, dtype and flags) are replaced.
    """
    click.echo(f"{kind}: {', '.join(f'{name} {value}' for name, value in about.items())}")
    click.echo("| | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for name, row in rows.items():
        click.echo(f"| {name} | " + " | ".join(text(row) for text in columns.values()) + " |")
    if json_path is not None:
        known = read_results(json_path)
        special = [name for name in ("checkpoint_activations", "check") if about.get(name)]
        known[" ".join([kind, about["size"], about["dtype"], *special])] = about | {"rows": rows}
        write_json(json_path, known)
        draw_ratios(known, json_path.with_suffix(".png"))


def draw_ratios(known: dict[str, dict], path: Path) -> None:
    """Plot the time of each contestant relative to this implementation, with the spread over the rounds.

    Benchmarks without relative times are omitted. If none has relative times, no file is written.
    """
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
        axes.set(title=title, xlabel="time relative to ours (lower is better)")
        axes.margins(x=0.12)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
