"""Table 5 on its own data, ScienceQA, as far as a base goes that is at hand."""

import statistics
from pathlib import Path

import click
from matplotlib.figure import Figure

from adapter import Adapter
from data import Request
from experiments.ablations import rate_for
from experiments.measures import tune_setting
from experiments.methods import ONE_SOFTMAX, ZERO_INIT
from experiments.tables import draw_bars, percent, save_results, spread
from experiments.testbed import Testbed
from formats.bases import load_llama
from generate import Responder
from model import LLaMA
from tasks.answering import likeliest_answers, written_answers
from tasks.scienceqa import Problem, score
from train import TrainConfig, mean_loss


def answer_problems(
    testbed: Testbed, problems: list[Problem], model: LLaMA, adapter: Adapter | None
) -> dict[str, list[str | None]]:
    """To every problem, what is written, and what is held for the likeliest of its answers."""
    name, adapters = ("base", {}) if adapter is None else ("adapter", {"adapter": adapter})
    responder = Responder(model, testbed.tokenizer, adapters, max_new_tokens=16)
    requests = [Request(problem.instruction, problem.input, name) for problem in problems]
    choices = [problem.answers() for problem in problems]
    return {
        "written": written_answers(responder, requests, unit="problem"),
        "likeliest": likeliest_answers(responder, requests, choices, unit="problem"),
    }


def compare_on_scienceqa(testbed: Testbed, seeds: int, out: Path, problems: list[Problem]) -> None:
    """Compare inits on ScienceQA.

    Table 5 on its own data, the validation split; of a problem with an image, the text alone.
    """
    chance = statistics.mean(1 / len(problem.choices) for problem in problems)
    click.echo(
        f"{len(testbed.tuning):,} problems to learn from, {len(problems):,} to be asked, chance {chance:.1%}\n"
        f"{'':36}{'written':>9}{'±':>7}{'likeliest':>11}{'±':>7}{'loss held out':>15}"
    )
    rows = {}
    for method in ("base", ZERO_INIT, ONE_SOFTMAX):
        rows[method] = scienceqa_row(testbed, problems, method, seeds if method != "base" else 1)
        print_row(method, rows[method])
    paper = {"validation, %": {"zero-init attention": 83.85, "random-init attention": 40.77}}
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, {method: percent(row["likeliest"]) for method, row in rows.items()}, "likeliest answer right, %")
    axes.axvline(100 * chance, color="black", linewidth=1)
    values = {"paper": paper, "chance": chance, "problems": len(problems), "tuned_on": len(testbed.tuning)}
    save_results(out, "scienceqa", values | {"rows": rows}, figure)


def scienceqa_row(testbed: Testbed, problems: list[Problem], method: str, seeds: int) -> dict[str, list]:
    """Accuracies by how answers are found, seed by seed; all columns for the likeliest; the held-out loss."""
    row: dict[str, list] = {"written": [], "likeliest": [], "columns": [], "val_loss": []}
    for seed in range(seeds):
        if method == "base":
            (model, _), adapter = load_llama(testbed.base, testbed.dtype, testbed.device), None
        else:
            setting = testbed.default._replace(method=method, lr=rate_for(testbed, method))
            (model, adapter, _, _), _, _ = tune_setting(testbed, setting, seed)
            row["val_loss"].append(mean_loss(model, adapter, testbed.held_out, TrainConfig()))
        for way, answers in answer_problems(testbed, problems, model, adapter).items():
            columns = score(problems, answers)
            row[way].append(columns["Avg"] / 100)
        row["columns"].append(columns)  # of the likeliest
    return row


def print_row(method: str, row: dict[str, list]) -> None:
    loss = f"{statistics.mean(row['val_loss']):.4f}" if row["val_loss"] else "-"
    means = "".join(
        f"{statistics.mean(row[way]):>{width}.1%}{spread(row[way]):>7.1%}"
        for way, width in (("written", 9), ("likeliest", 11))
    )
    click.echo(f"{method:36}{means}{loss:>15}")
