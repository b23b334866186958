"""Run several settings with several seeds, print the results as a table, and save them as JSON with a plot.

The results of each run are saved as soon as it has finished. If an interrupted command is started again, it skips the
runs that have finished.
"""

import hashlib
import inspect
import json
import math
import multiprocessing
import shlex
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import click
import cloup
import torch
from cloup import option, option_group
from matplotlib.figure import Figure

from runtime.cli import PATH, Count, Real, one_line_errors
from runtime.errors import error_line, printable
from runtime.device import device_name, select_device
from runtime.files import atomic_write, read_json_object, write_json

RESULTS = Path(__file__).parent / "results"


class Column(NamedTuple):
    """A column of the printed table, which shows the mean of one result over the seeds."""

    name: str  # key of the result in the dictionary that a run returns
    title: str
    form: str = ".1%"  # format specification of the mean
    spread: bool = False  # also print the standard deviation

    @property
    def width(self) -> int:
        return max(len(self.title) + 2, 10)


def spread(values: Sequence[float]) -> float:
    """Return the sample standard deviation, or 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def rounded(value: object) -> object:
    """Round all floats in a JSON-like value to six significant digits; NaN and infinity become None (null in JSON)."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class Runs:
    """Executes the runs of one command, and writes its results to the folder `out`. A run is a setting with a seed.

    The results of finished runs are kept in COMMAND-HASH.unfinished.json until the command ends without an error. HASH
    depends on the command's options.
    """

    def __init__(self, command: str, out: Path, seeds: int, options: dict):
        self.out = out
        self.seeds = seeds
        self.device = options.get("device") or "cpu"
        self.options = {name: str(value) for name, value in options.items() if value is not None}
        recipe = json.dumps([command, self.options], sort_keys=True)
        self.log = out / f"{command}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}.unfinished.json"
        self.finished: dict[str, dict] = {}  # results of finished runs, by the repr() of (setting, seed)

    def __enter__(self) -> "Runs":
        if self.log.exists():
            self.finished = read_json_object(self.log)
            click.echo(f"{self.log}: skipping {len(self.finished)} finished runs\n")
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is None:
            self.log.unlink(missing_ok=True)

    def table(
        self,
        columns: Sequence[Column],
        settings: dict[str, object],
        do: Callable[[object, int], dict],
        *,
        once: Collection[str] = (),
        in_rounds: bool = False,
        at_a_time: int = 1,
    ) -> dict[str, dict[str, list]]:
        """Execute the runs, save the results of each when it ends, and print a line for each finished setting.

        `do(setting, seed)` executes a run and returns its results as a dictionary of JSON values. Settings with the
        same repr() share their runs. Settings whose labels are in `once` are run with one seed, all others with every
        seed. Runs are ordered by setting. If `in_rounds` is True, they are ordered by seed, so that a drift of the
        machine's speed affects all settings alike. See `execute` for `at_a_time`, and for what happens if a run fails.
        Returns the results by label, each as a list over the seeds.
        """
        seeds = {label: range(1 if label in once else self.seeds) for label in settings}
        plan = [(setting, seed) for label, setting in settings.items() for seed in seeds[label]]
        if in_rounds:
            plan.sort(key=lambda run: run[1])
        missing = {repr(run): run for run in plan if repr(run) not in self.finished}
        width = max(map(len, settings)) + 2
        titles = (f"{column.title:>{column.width}}" + f"{'±':>8}" * column.spread for column in columns)
        click.echo(" " * width + "".join(titles))
        rows: dict[str, dict[str, list]] = {}

        def print_new_rows() -> None:
            for label, setting in settings.items():
                runs = [self.finished.get(repr((setting, seed))) for seed in seeds[label]]
                if label not in rows and None not in runs:
                    rows[label] = {name: [run[name] for run in runs] for name in runs[0]}
                    click.echo(f"{label:{width}}" + "".join(cells(column, runs) for column in columns))

        print_new_rows()
        for key, result in execute(do, missing, at_a_time):
            self.finished[key] = json.loads(json.dumps(result))
            write_json(self.log, self.finished)
            print_new_rows()
        return {label: rows[label] for label in settings}

    def save(self, name: str, values: dict, figure: Figure | None = None) -> None:
        """Write NAME.json, and NAME.png if there is a figure. Print the paper's numbers if `values` contains them."""
        for title, published in values.get("paper", {}).items():
            click.echo(f"the paper, {title}: " + ", ".join(f"{key}: {number}" for key, number in published.items()))
        self.out.mkdir(parents=True, exist_ok=True)
        if figure is not None:
            with atomic_write(self.out / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=100)
        device, _ = select_device(self.device)
        about = {
            "command": f"python -m experiments {shlex.join(sys.argv[1:])}",
            "machine": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "seeds": self.seeds,
            "options": self.options,
        }
        write_json(self.out / f"{name}.json", about | rounded(values), allow_nan=False)
        click.echo(f"wrote {name}.json{'' if figure is None else f' and {name}.png'} to {printable(str(self.out))}\n")


def execute(do: Callable, runs: dict[str, tuple], at_a_time: int) -> Iterator[tuple[str, dict]]:
    """Call do(*run) for every run, and yield its key and its result when it has finished.

    If `at_a_time` is greater than 1, this number of processes run in parallel, with one thread each. If a run fails, no
    further runs are started, and those in progress are finished and yielded before the error is raised.
    """
    if at_a_time == 1:
        for key, run in runs.items():
            yield key, do(*run)
        return
    context = multiprocessing.get_context("spawn")
    waiting = iter(runs.items())
    keys = {}  # of the runs in progress, by their futures
    failure = None
    with ProcessPoolExecutor(at_a_time, context, initializer=partial(torch.set_num_threads, 1)) as pool:
        while True:
            if failure is None:
                keys |= {pool.submit(do, *run): key for key, run in islice(waiting, at_a_time - len(keys))}
            if not keys:
                break
            for future in wait(keys, return_when=FIRST_COMPLETED).done:
                key, error = keys.pop(future), future.exception()
                if error is None:
                    yield key, future.result()
                elif failure is None:
                    failure = error
                    if keys:
                        click.echo(f"a run failed ({error_line(error)}); waiting for those in progress", err=True)
    if failure is not None:
        raise failure


def cells(column: Column, runs: Sequence[dict]) -> str:
    """Format one row of a column: the mean, or "-" if a result is None, and the standard deviation if requested."""
    values = [run[column.name] for run in runs]
    if None in values:
        return f"{'-':>{column.width}}" + " " * 8 * column.spread
    mean = f"{statistics.mean(values):{column.form}}"
    return f" {mean:>{column.width - 1}}" + f"{spread(values):>8.1%}" * column.spread


# ---------------------------------------------------------------------------------------------------
# Commands and their options


def experiment(name: str, *groups: Callable, seeds: bool = True) -> Callable:
    """Return a decorator that turns a function into a command with the options of `groups`.

    The function is called with a Runs and the values of these options. The command also has --out and, if `seeds` is
    True, --seeds, whose values are in the Runs.
    """
    seeds_option = [option("--seeds", type=Count(), default=3, help="Number of seeds per setting.")] * seeds
    out = option("--out", type=PATH, default=RESULTS, show_default="experiments/results", help="Folder for results.")

    def decorate(function: Callable) -> click.Command:
        def command(out: Path, seeds: int = 1, **options) -> None:
            with one_line_errors(), Runs(name, out, seeds, options) as runs:
                function(runs, **options)

        for group in reversed((*groups, option_group("Runs", *seeds_option, out))):
            command = group(command)
        help = inspect.getdoc(function)
        return cloup.command(name, help=help, context_settings={"show_default": True})(command)

    return decorate


TRAINING_OPTIONS = {
    "layers": (Count(), "L, number of adapted layers."),
    "length": (Count(), "K, number of prompt embeddings per layer."),
    "rank": (Count(), "Rank of LoRA."),
    "epochs": (Count(2), "Number of passes over the training data."),
    "batch_size": (Count(), "Examples per optimizer step."),
    "lr": (Real(0, 1e3, min_open=True), "Peak learning rate."),
}


def training_options(**defaults) -> Callable:
    """Return an option group with the TRAINING_OPTIONS that are named in `defaults`.

    If a default is a string, it is only shown in the help, and the option's actual default is None.
    """
    made = []
    for name, default in defaults.items():
        type, help = TRAINING_OPTIONS[name]
        if isinstance(default, str):
            help = f"{help}  [default: {default}]"
            default = None
        made.append(option(f"--{name.replace('_', '-')}", type=type, default=default, help=help))
    return option_group("Training", *made)
