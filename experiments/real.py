"""Reproduce the paper's tables on a real LLaMA of 30 layers: python -m experiments real --base SMOLLM2 ...

Each part writes PART.json, and most parts a plot, to --out, by default experiments/results/real/. A part is skipped if
its JSON file exists, and so are runs that have finished. Except in `digits` and `price`, an interrupted training run
resumes from its checkpoint in experiments/cache/.
"""

from collections.abc import Callable
from typing import NamedTuple

import click
import cloup
from cloup import option, option_group

from experiments.methods import import_peft
from experiments.real_tasks import compare_on_problems, mix_experts, train_on_digits, train_on_alpaca
from experiments.reviews import (
    Sources,
    compare_layers,
    compare_methods,
    compare_samples,
    measure_price,
    search_rates,
)
from experiments.runs import RESULTS, Runs
from runtime.cli import PATH, Count, device_options, one_line_errors


class Part(NamedTuple):
    """A part of the experiment: its function, its number of seeds, and the name of the optional input that it reads."""

    do: Callable[[Runs, Sources], None]
    seeds: int
    reads: str = ""


PARTS = {
    "rates": Part(search_rates, 1),
    "methods": Part(compare_methods, 2),
    "layers": Part(compare_layers, 2),
    "samples": Part(compare_samples, 2),
    "scienceqa": Part(compare_on_problems, 1, "problems"),
    "experts": Part(mix_experts, 1, "problems"),
    "alpaca": Part(train_on_alpaca, 1, "alpaca"),
    "digits": Part(train_on_digits, 1),
    "price": Part(measure_price, 3),
}


@cloup.command("real", context_settings={"show_default": True})
@option_group(
    "Data and model",
    option("--base", type=PATH, required=True, help="Base to adapt, a LLaMA such as SmolLM2-135M-Instruct."),
    option("--reviews", type=PATH, required=True, help="Folder with SST-2's train.tsv and dev.tsv."),
    option(
        "--text",
        type=PATH,
        required=True,
        help="File of text to measure the perplexity on: WikiText-2's validation set.",
    ),
    option("--problems", type=PATH, help="ScienceQA's problems.json, required by the parts scienceqa and experts."),
    option("--alpaca", type=PATH, help="Stanford Alpaca's JSON file, required by the part alpaca."),
    *device_options,
)
@option_group(
    "Runs",
    option(
        "--part",
        "parts",
        type=click.Choice(list(PARTS)),
        multiple=True,
        help="Part to run; repeatable.  [default: all]",
    ),
    option(
        "--at-a-time",
        type=Count(),
        default=2,
        help="Number of processes; if several, each has one thread. The parts experts and price ignore it.",
    ),
    option(
        "--out",
        type=PATH,
        default=RESULTS / "real",
        show_default="experiments/results/real",
        help="Folder for results.",
    ),
)
def real(parts, out, **options):
    """Reproduce the paper's tables on a real LLaMA.

    Experiments on film reviews compare learning rates, methods, adapted layers, numbers of training sentences, and time
    and memory per step. The other parts train on ScienceQA, Alpaca and images of digits, and evaluate three adapters in
    mixed batches.
    """
    sources = Sources(**options)
    with one_line_errors():
        import_peft()  # fail before training if PEFT is missing
        for part in parts or PARTS:
            if (out / f"{part}.json").exists():
                click.echo(f"{out} already contains {part}.json; this part is skipped")
                continue
            click.echo(f"{part}. {PARTS[part].do.__doc__.strip()}\n")
            # Finished runs are identified by the options on which their results depend.
            unused = {"problems", "alpaca", "at_a_time"} - {PARTS[part].reads}
            relevant = {name: value for name, value in options.items() if name not in unused}
            with Runs(f"real-{part}", out, PARTS[part].seeds, relevant) as runs:
                PARTS[part].do(runs, sources)
