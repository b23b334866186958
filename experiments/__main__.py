"""Run the paper's experiments at a scale that is feasible on two CPU cores: python -m experiments all.

Every command prints a table, and writes its results (JSON) and usually a plot (PNG) to the folder --out, by default
experiments/results/, or experiments/results/real/ for `real`. Only `vit --search` and `roberta --search` write no
results. The JSON file also contains the paper's numbers where there are any. `all`, its six experiments and `rates`
train on the toy's base and instructions or, with --base and --data, on a different base and other data. If a command is
interrupted and started again with the same options, it skips the runs that have finished.
"""

import inspect
import time
from collections.abc import Callable

import click
import cloup

from experiments.ablations import (
    compare_designs,
    compare_epochs,
    compare_inits,
    compare_methods,
    compare_shapes,
    plot_gates,
    search_rates,
)
from experiments.bits import bits
from experiments.encoders import roberta, vit
from experiments.few_examples import few
from experiments.instructions import stories
from experiments.real import real
from experiments.runs import Runs, experiment
from experiments.sounds import sounds
from experiments.stages import stages
from experiments.testbed import TestbedOptions, read_testbed, testbed_options

EXPERIMENTS = {  # `all` runs them in this order
    "methods": compare_methods,
    "zero-init": compare_inits,
    "layers": compare_shapes,
    "epochs": compare_epochs,
    "design": compare_designs,
    "gates": plot_gates,
}


def on_testbed(name: str, compare: Callable) -> click.Command:
    """Create the command `name`, which calls `compare` with a Runs and the testbed that the options describe."""

    def run(runs: Runs, **options) -> None:
        compare(runs, read_testbed(TestbedOptions(**options), searching=compare is search_rates))

    run.__doc__ = compare.__doc__
    return experiment(name, *testbed_options)(run)


@experiment("all", *testbed_options)
def run_all(runs: Runs, **options) -> None:
    """Run the six main experiments.

    These are methods, zero-init, layers, epochs, design and gates. Runs that several of them share are executed once.
    """
    start = time.perf_counter()
    testbed = read_testbed(TestbedOptions(**options))
    for name, compare in EXPERIMENTS.items():
        click.echo(f"{name}. {' '.join(inspect.getdoc(compare).split())}\n")
        compare(runs, testbed)
    minutes = (time.perf_counter() - start) / 60
    runs.save("all", {"minutes": minutes})
    click.echo(f"all experiments: {minutes:.1f} minutes")


@cloup.group(
    commands=[
        *(on_testbed(name, compare) for name, compare in EXPERIMENTS.items()),
        on_testbed("rates", search_rates),
        vit,
        roberta,
        few,
        bits,
        stages,
        stories,
        sounds,
        real,
        run_all,
    ],
    context_settings={"show_default": True},
)
def main():
    """Reproduce the paper's experiments. Each command prints a table, and writes its results to files."""


if __name__ == "__main__":
    main()
