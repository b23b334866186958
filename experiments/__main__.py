"""The paper's experiments, at a scale that fits two cores: python -m experiments all.

Every command prints a table and writes its figures and a picture to experiments/results/, the paper's own figures
beside. Most tune the toy's base on the toy's instructions, or any --base on any --data.
"""

import inspect
import time
from collections.abc import Callable
from pathlib import Path

import click
import cloup
import torch
from cloup import option, option_group

from encoder_tuning.data import subset
from experiments.ablations import (
    compare_designs,
    compare_epochs,
    compare_inits,
    compare_methods,
    compare_shapes,
    search_rates,
    watch_gates,
)
from experiments.bits import compare_bits
from experiments.encoders import roberta, vit
from experiments.few_examples import few_examples
from experiments.instructions import tell_stories
from experiments.methods import WARMUP_EPOCHS
from experiments.scienceqa import compare_on_scienceqa
from experiments.sounds import ask_about_sounds
from experiments.stages import compare_stages
from experiments.tables import out_option, save_results
from experiments.testbed import TestbedOptions, read_testbed
from runtime.cli import PATH, Count, Real, device_options, one_line_errors
from tasks import TASKS
from tasks.scienceqa import read as read_problems


def testbed_options(command):
    """What all commands take that tune a LLaMA."""
    groups = [
        option_group(
            "Data",
            option("--data", type=PATH, help="What to tune on.  [default: the toy's]"),
            option("--task", type=click.Choice(list(TASKS)), help="What the data is, as for train.py."),
            option("--text", type=PATH, help="Text of the kind that the base was made of."),
            option("--limit", type=Count(), help="Tune on so many examples only, drawn from all."),
            option("--held-out", type=Count(), help="Ask so many.  [default: all; 200 of --data]"),
            option("--max-seq-len", type=Count(2), default=512, help="In tokens; longer responses are cut."),
        ),
        option_group(
            "Model",
            option("--base", type=PATH, help="Another base.  [default: the toy's]"),
            option("--toy-layers", type=Count(), help="N of the toy's base, made at the first use.  [default: 4]"),
            *device_options,
        ),
        option_group(
            "Adapter and optimisation",
            option("--layers", type=Count(), help="L.  [default: all but two; the toy's 4]"),
            option("--length", type=Count(), help="K.  [default: 10]"),
            option("--epochs", type=Count(WARMUP_EPOCHS + 1), help="Of tuning.  [default: 5]"),
            option("--batch-size", type=Count(), help="Examples per step.  [default: 64; the toy's 32]"),
            option(
                "--lr",
                type=Real(0, 1e3, min_open=True),
                help="Peak.  [default: 9e-3 * batch size / 256; the toy's 0.05]",
            ),
        ),
        option_group(
            "Run",
            option("--seeds", type=Count(), default=3, help="Runs of everything."),
            out_option,
        ),
    ]
    for group in reversed(groups):
        command = group(command)
    return command


EXPERIMENTS = {  # `all` runs them in this order; methods come first, while nothing is known yet and all must be timed
    "methods": compare_methods,
    "zero-init": compare_inits,
    "layers": compare_shapes,
    "epochs": compare_epochs,
    "design": compare_designs,
    "gates": watch_gates,
}


@cloup.group(context_settings={"show_default": True})
def main():
    """Run the paper's experiments again: each prints a table, and writes figures and a picture."""


def add_command(name: str, experiment: Callable) -> None:
    @main.command(name, help=experiment.__doc__, context_settings={"show_default": True})
    @testbed_options
    def command(seeds: int, out: Path, **options) -> None:
        with one_line_errors():
            experiment(read_testbed(TestbedOptions(**options), searching=experiment is search_rates), seeds, out)


for name, experiment in (EXPERIMENTS | {"rates": search_rates}).items():
    add_command(name, experiment)
main.add_command(vit)
main.add_command(roberta)
main.add_command(few_examples)
main.add_command(compare_bits)
main.add_command(compare_stages)
main.add_command(tell_stories)
main.add_command(ask_about_sounds)


@main.command("all", context_settings={"show_default": True})
@testbed_options
def run_all(seeds: int, out: Path, **options) -> None:
    """Run methods to gates.

    Methods, zero-init, layers, epochs, design and gates; what several need is done once.
    """
    with one_line_errors():
        start, testbed = time.perf_counter(), read_testbed(TestbedOptions(**options))
        for name, experiment in EXPERIMENTS.items():
            click.echo(f"{name}. {' '.join(inspect.getdoc(experiment).split())}\n")
            experiment(testbed, seeds, out)
        minutes = (time.perf_counter() - start) / 60
        save_results(out, "all", {"minutes": minutes, "threads": torch.get_num_threads(), "torch": torch.__version__})
        click.echo(f"{minutes:.1f} minutes, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")


@main.command("scienceqa", help=compare_on_scienceqa.__doc__, context_settings={"show_default": True})
@testbed_options
def scienceqa(seeds: int, out: Path, **options) -> None:
    with one_line_errors():
        data = options["data"]
        if options["base"] is None or data is None or options["task"] not in (None, "scienceqa"):
            raise ValueError("this needs --base and --data, ScienceQA's problems.json, and no other --task")
        problems = subset(read_problems(data, split="val"), options["held_out"])
        options |= {"task": "scienceqa", "held_out": len(problems)}
        compare_on_scienceqa(read_testbed(TestbedOptions(**options), asked=problems), seeds, out, problems)


if __name__ == "__main__":
    main()
