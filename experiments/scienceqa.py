"""Reproduce Table 5 on the paper's data set, ScienceQA, with any base."""

import statistics
from functools import partial

import click
from matplotlib.figure import Figure

from adapter import Adapter
from data import Request
from encoder_tuning.labeled import subset
from experiments.ablations import rate_for
from experiments.drawing import draw_bars, percent
from experiments.measures import train_setting
from experiments.methods import ONE_SOFTMAX, ZERO_INIT, Setting
from experiments.runs import Column, Runs, experiment
from experiments.testbed import Testbed, TestbedOptions, read_testbed, testbed_options
from formats.bases import load_llama
from generate import Responder
from model import LLaMA
from tasks.responses import most_likely_choices, generate_responses
from tasks.scienceqa import Problem, score
from tasks.scienceqa import read as read_problems
from train import TrainConfig, mean_loss


def answer_problems(
    testbed: Testbed, problems: list[Problem], model: LLaMA, adapter: Adapter | None
) -> dict[str, list[str | None]]:
    """Return the generated response ("written") and the most likely answer ("most_likely") for every problem.

    A response or answer is None if the problem does not fit into the context.
    """
    name, adapters = ("base", {}) if adapter is None else ("adapter", {"adapter": adapter})
    responder = Responder(model, testbed.tokenizer, adapters, max_new_tokens=16)
    requests = [Request(problem.instruction, problem.input, name) for problem in problems]
    choices = [problem.answers() for problem in problems]
    return {
        "written": generate_responses(responder, requests, unit="problem"),
        "most_likely": most_likely_choices(responder, requests, choices, unit="problem"),
    }


COLUMNS = (
    Column("written", "written", spread=True),
    Column("most_likely", "most likely", spread=True),
    Column("val_loss", "held-out loss", ".4f"),
)


def train_and_score(testbed: Testbed, problems: list[Problem], setting: Setting | None, seed: int) -> dict:
    """Train with one seed, or take the base without an adapter if `setting` is None, and answer the problems.

    Returns the accuracies of generated and of most likely answers, all of ScienceQA's scores of the latter ("columns"),
    and the held-out loss.
    """
    if setting is None:
        model, _ = load_llama(testbed.base, testbed.dtype, testbed.device)
        adapter, val_loss = None, None
    else:
        (model, adapter, _, _), _, _ = train_setting(testbed, setting, seed)
        val_loss = mean_loss(model, adapter, testbed.held_out, TrainConfig())
    answers = answer_problems(testbed, problems, model, adapter)
    columns = {way: score(problems, found) for way, found in answers.items()}
    accuracies = {way: found["Avg"] / 100 for way, found in columns.items()}
    return accuracies | {"columns": columns["most_likely"], "val_loss": val_loss}


@experiment("scienceqa", *testbed_options)
def scienceqa(runs: Runs, base, data, task, held_out, **options) -> None:
    """Compare initializations on ScienceQA.

    Reproduces Table 5 on the validation split. Only the text of a problem is used, not its image.
    """
    if base is None or data is None or task not in (None, "scienceqa"):
        raise ValueError(
            "scienceqa requires --base and --data (ScienceQA's problems.json), and no --task except scienceqa"
        )
    problems = subset(read_problems(data, split="val"), held_out)
    how = TestbedOptions(base=base, data=data, task="scienceqa", held_out=len(problems), **options)
    testbed = read_testbed(how, questions=problems)
    chance = statistics.mean(1 / len(problem.choices) for problem in problems)
    click.echo(
        f"{len(testbed.training):,} training problems, {len(problems):,} held-out problems, chance {chance:.1%}\n"
    )
    settings: dict[str, Setting | None] = {"base": None}
    for method in (ZERO_INIT, ONE_SOFTMAX):
        settings[method] = testbed.default._replace(method=method, lr=rate_for(testbed, method))
    rows = runs.table(COLUMNS, settings, partial(train_and_score, testbed, problems), once=["base"])
    paper = {"validation, %": {"zero-init attention": 83.85, "random-init attention": 40.77}}
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    axes = figure.subplots()
    draw_bars(
        axes, {method: percent(row["most_likely"]) for method, row in rows.items()}, "most likely answer right, %"
    )
    axes.axvline(100 * chance, color="black", linewidth=1)
    values = {"paper": paper, "chance": chance, "problems": len(problems), "trained_on": len(testbed.training)}
    runs.save("scienceqa", values | {"rows": rows}, figure)
