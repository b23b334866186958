"""What the methods cost and what they forget, Table 1 (v1: 3); and the learning rate that suits each of them."""

import statistics
from pathlib import Path

import click
from matplotlib.figure import Figure

import toy
from experiments.measures import base_measures, run_setting
from experiments.methods import FULL, LORA, ONE_SOFTMAX, ZERO_INIT, import_peft
from experiments.tables import compare_settings, draw_bars, percent, rounded, save_results, without_losses
from experiments.testbed import Testbed

# The best on a fifth of what the toy is tuned on, as `search_rates` finds them.
RATES = {ZERO_INIT: toy.TUNING["lr"], ONE_SOFTMAX: 0.05, LORA: 0.03, FULL: 0.001}


def rate_for(testbed: Testbed, method: str, factor: float = 1.0) -> float:
    """So many times the method's learning rate, in proportion to the testbed's own."""
    return rounded(testbed.default.lr / RATES[ZERO_INIT] * RATES[method] * factor)


def compare_methods(testbed: Testbed, seeds: int, out: Path) -> None:
    """Table 1 (v1: 3): full tuning, LoRA, the adapter, prompts without gates: parameters, bytes, time, forgetting."""
    import_peft()  # or say at once that it is missing
    settings = {method: testbed.default._replace(method=method, lr=rate_for(testbed, method)) for method in RATES}
    for seed in range(seeds):  # in rounds, so that their times can be compared
        for setting in settings.values():
            run_setting(testbed, setting, seed)
    rows, before = compare_settings(testbed, settings, seeds), base_measures(testbed)[0]
    print_forgetting(rows, before)
    paper = {
        "full tuning (Alpaca)": {"trained": "7B", "storage": "13 GB", "hours on 8 A100": 3},
        "LoRA (Alpaca-LoRA)": {"trained": "4.2M", "storage": "16.8 MB", "hours on 8 A100": 1.5},
        "LLaMA-Adapter": {"trained": "1.2M", "storage": "4.7 MB", "hours on 8 A100": 1},
    }

    figure = Figure(figsize=(14, 3), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    draw_bars(panels[0], {label: percent(row["accuracy"]) for label, row in rows.items()}, "answered exactly, %")
    draw_bars(panels[1], {label: row["trained"] for label, row in rows.items()}, "parameters trained")
    panels[1].set_xscale("log")
    draw_bars(panels[2], {label: row["seconds"] for label, row in rows.items()}, "seconds")
    if before is not None:
        draw_bars(panels[3], {label: row["perplexity"] for label, row in rows.items()}, "perplexity of the base's text")
        panels[3].axvline(before, color="black", linewidth=1)
    values = {"paper": paper, "perplexity_before": before, "rows": without_losses(rows)}
    save_results(out, "methods", values, figure)


def print_forgetting(rows: dict[str, dict], before: float | None) -> None:
    """Perplexity of the base's own text, and whether the base is had again; "-" where that was not measured."""
    click.echo(f"\n{'':36}{'bytes':>12}{'own text, before':>18}{'after':>9}{'base again':>12}{'after merging':>15}")
    for label, row in rows.items():
        after = "-" if before is None else f"{statistics.mean(row['perplexity']):.2f}"
        again, merged = (
            "-" if None in row[name] else "yes" if all(row[name]) else "no"
            for name in ("recovered", "recovered_after_merging")
        )
        ours = "-" if before is None else f"{before:.2f}"
        click.echo(f"{label:36}{row['bytes'][0]:>12,}{ours:>18}{after:>9}{again:>12}{merged:>15}")


def search_rates(testbed: Testbed, seeds: int, out: Path) -> None:
    """Which learning rate suits each method of Table 1, and what it costs the base; no held-out question is used."""
    import_peft()
    settings = {}
    for method in RATES:
        tried = [rate_for(testbed, method, factor) for factor in (0.1, 0.3, 1, 3, 10)]
        settings |= {f"{method}, {lr:.3g}": testbed.default._replace(method=method, lr=lr) for lr in tried}
    rows = compare_settings(testbed, settings, seeds)
    save_results(out, "rates", {"rows": without_losses(rows)}, draw_rates(rows) if len(testbed.text) else None)


def draw_rates(rows: dict[str, dict]) -> Figure:
    """Accuracy against perplexity: up is what is learnt, to the right what is forgotten."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in RATES:
        ours = [row for row in rows.values() if row["setting"]["method"] == method]
        xs, ys = ([statistics.mean(row[name]) for row in ours] for name in ("perplexity", "accuracy"))
        axes.plot(xs, percent(ys), "o-", label=method)
    least = min(statistics.mean(row["perplexity"]) for row in rows.values())
    axes.set(xlabel="perplexity of the base's text", xscale="log", xlim=(0.9 * least, 15 * least))
    axes.set(ylabel="answered exactly, %", title="A point for each learning rate, the lowest first")
    axes.legend()
    return figure
