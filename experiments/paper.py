"""The paper's experiments, at a scale that fits two cores: python experiments.py all.

Every command prints a table and writes its figures and a picture to experiments/, the paper's own figures beside. It
tunes toy.py's base on toy.py's instructions, or any --base on any --data.
"""

import inspect
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toy import almanac as toy
from adapter import Adapter
from runtime.files import atomic_write
from formats.bases import load_llama, read_base
from runtime.cli import Real, device_options, one_line_errors
from experiments.comparison import (
    FULL,
    GATES_AT_ONE,
    LORA,
    ONE_SOFTMAX,
    POSITIONS,
    WARMUP_EPOCHS,
    ZERO_INIT,
    Setting,
    World,
    run,
    tune,
    untouched,
)
from data import Example, load_tokenizer, read_text, tokenize
from evaluate import likeliest_answers, written_answers
from generate import Question, Responder
from encoder_tuning.heads import some
from model import LLaMA, select_device
from training.prepare import split
from training.runs import paint_gates
from training.step import mean_loss
from tasks import TASKS, Problem, accuracies, read_problems, read_task

# ---------------------------------------------------------------------------------------------------
# Tables and pictures


def compare(world: World, settings: dict[str, Setting], seeds: int) -> dict[str, dict[str, list]]:
    """Every setting with every seed, a line printed for each; returns lists of what `run` says, seed by seed."""
    click.echo(f"{'':36}{'trained':>12}{'exact':>9}{'±':>7}{'loss held out':>15}{'last epoch':>12}{'seconds':>9}")
    rows = {}
    for label, setting in settings.items():
        runs = [run(world, setting, seed) for seed in range(seeds)]
        rows[label] = {name: [one[name] for one in runs] for name in runs[0]} | {"setting": setting._asdict()}
        exact, held_out, last, seconds = (
            statistics.mean(rows[label][name]) for name in ("accuracy", "val_loss", "train_loss", "seconds")
        )
        click.echo(
            f"{label:36}{runs[0]['trained']:>12,}{exact:>9.1%}{spread(rows[label]['accuracy']):>7.1%}"
            f"{held_out:>15.4f}{last:>12.4f}{seconds:>9.1f}"
        )
    return rows


def spread(values: Sequence[float]) -> float:
    """Their standard deviation."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def rounded(value: object) -> object:
    """A value with its numbers to six digits; None (null in JSON) where a run came to no finite one."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def report(out: Path, name: str, values: dict, figure: Figure | None = None) -> None:
    """NAME.json and NAME.png in the folder; what is known from the paper is printed as well."""
    for what, published in values.get("paper", {}).items():
        click.echo(f"the paper, {what}: " + ", ".join(f"{key}: {number}" for key, number in published.items()))
    if figure is not None:
        with atomic_write(out / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=100)
    with atomic_write(out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(rounded(values), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    click.echo(f"wrote {name}.json{'' if figure is None else f' and {name}.png'} to {out}\n")


def table(rows: dict[str, dict]) -> dict[str, dict]:
    """Rows as they are written: without the loss of every step, but with mean and standard deviation."""
    written = {label: {name: value for name, value in row.items() if name != "losses"} for label, row in rows.items()}
    for row in written.values():
        row |= {"mean": statistics.mean(row["accuracy"]), "standard_deviation": spread(row["accuracy"])}
    return written


def draw_bars(axes: Axes, values: dict[str, Sequence[float]], xlabel: str) -> None:
    """A bar for the mean of each list, a dot for each of its values."""
    labels = list(values)
    axes.barh(labels, [statistics.mean(row) for row in values.values()], color="#9ecae1")
    for i, row in enumerate(values.values()):
        axes.plot(row, [i] * len(row), "o", color="#08519c", markersize=4)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first on top
    axes.set_xlabel(xlabel)


def draw_line(axes: Axes, xs: Sequence[float], rows: Sequence[Sequence[float]], label: str | None = None) -> None:
    """Means over seeds, joined, and a dot for each seed."""
    (line,) = axes.plot(xs, [statistics.mean(row) for row in rows], label=label)
    for x, row in zip(xs, rows):
        axes.plot([x] * len(row), row, "o", color=line.get_color(), markersize=4)


def percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


# ---------------------------------------------------------------------------------------------------
# The experiments: each is given a world, the number of seeds, and the folder for what it writes


def zero_init(world: World, seeds: int, out: Path) -> None:
    """Figure 5 and Table 5: zero-init attention against random init, at four learning rates."""
    inits = (ZERO_INIT, ONE_SOFTMAX, GATES_AT_ONE)
    lrs = [rounded(factor * world.default.lr) for factor in (0.1, 1, 3, 10)]
    settings = {f"{method}, {lr:.3g}": world.default._replace(method=method, lr=lr) for lr in lrs for method in inits}
    rows = compare(world, settings, seeds)
    paper = {"ScienceQA, validation, %": {"zero-init attention": 83.85, "random-init attention": 40.77}}

    figure = Figure(figsize=(4 * (len(lrs) + 1), 4), layout="constrained")
    *panels, last = figure.subplots(1, len(lrs) + 1)
    all_losses = np.array([row["losses"] for row in rows.values()])  # (rows, seeds, steps)
    limits = np.nanmin(all_losses), np.nanmax(all_losses)
    for axes, lr in zip(panels, lrs):
        for method in inits:
            losses = np.array(rows[f"{method}, {lr:.3g}"]["losses"])  # (seeds, steps)
            axes.plot(losses.mean(axis=0), label=method, linewidth=1)
        axes.set(title=f"learning rate {lr:.3g}", xlabel="step", ylabel="training loss", yscale="log", ylim=limits)
    panels[0].legend()
    for method in inits:
        draw_line(last, lrs, [percent(rows[f"{method}, {lr:.3g}"]["accuracy"]) for lr in lrs])
    last.set(title="held-out questions", xlabel="learning rate", xscale="log", ylabel="answered exactly, %")
    per_epoch = math.ceil(len(world.tuning) / world.batch_size)
    curves = {label: [epoch_means(losses, per_epoch) for losses in row["losses"]] for label, row in rows.items()}
    report(out, "zero_init", {"paper": paper, "rows": table(rows), "loss_by_epoch": curves}, figure)


def epoch_means(losses: Sequence[float], per_epoch: int) -> list[float]:
    return [statistics.mean(losses[start : start + per_epoch]) for start in range(0, len(losses), per_epoch)]


def layers(world: World, seeds: int, out: Path) -> None:
    """Table 4: the number of adapted layers, which they are, and the prompts' length.

    (The lowest layers' runs take longer than they need: the layers above have prompts as well, behind shut gates.)
    """
    N, default = world.layers, world.default
    counts = sorted({max(1, round(N * quarter / 4)) for quarter in (1, 2, 3, 4)} | {default.layers})
    lengths = sorted({1, 2, 5, 10, 20, 50} | {default.length})
    names = {L: f"topmost {L} of {N} layers" for L in counts}
    low = {L: f"lowest {L} of {N} layers" for L in counts if L < N}
    settings = {names[L]: default._replace(layers=L) for L in counts}
    settings |= {name: default._replace(layers=L, where="bottom") for L, name in low.items()}
    settings |= {f"K = {K}": default._replace(length=K) for K in lengths}
    rows = compare(world, settings, seeds)
    paper = {"ScienceQA, validation, %, by topmost layers of 32": {10: 55.95, 20: 73.36, 30: 83.85}}

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_line(left, counts, [percent(rows[names[L]]["accuracy"]) for L in counts], "topmost")
    low |= {N: names[N]}  # all
    draw_line(left, list(low), [percent(rows[name]["accuracy"]) for name in low.values()], "lowest")
    left.set(xlabel=f"adapted layers of {N}", ylabel="answered exactly, %", xticks=counts)
    left.legend()
    draw_line(right, lengths, [percent(rows[f"K = {K}"]["accuracy"]) for K in lengths])
    right.set(xlabel="K, prompt vectors per layer", xscale="log", ylabel="answered exactly, %")
    right.set_xticks(lengths, list(map(str, lengths)), minor=False)
    report(out, "layers", {"paper": paper, "rows": table(rows)}, figure)


EPOCHS = (15, 30, 60)


def epochs(world: World, seeds: int, out: Path) -> None:
    """Table 6: does it over-fit? Training loss, held-out loss and accuracy after 15, 30 and 60 epochs."""
    rows = compare(world, {f"{n} epochs": world.default._replace(epochs=n) for n in EPOCHS}, seeds)
    columns = ("training loss", "validation loss", "ScienceQA, validation, %")
    published = {15: (0.022, 0.136, 82.08), 30: (0.004, 0.241, 83.85), 60: (0.001, 0.282, 83.94)}
    paper = {f"{n} epochs": dict(zip(columns, figures)) for n, figures in published.items()}

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("train_loss", "last epoch of training"), ("val_loss", "held out")):
        draw_line(left, EPOCHS, [rows[f"{n} epochs"][name] for n in EPOCHS], label)
    left.set(xlabel="epochs", ylabel="loss", xticks=EPOCHS, yscale="log")
    left.legend()
    draw_line(right, EPOCHS, [percent(rows[f"{n} epochs"]["accuracy"]) for n in EPOCHS])
    right.set(xlabel="epochs", ylabel="answered exactly, %", xticks=EPOCHS)
    report(out, "epochs", {"paper": paper, "rows": table(rows)}, figure)


# The best on a fifth of what the toy is tuned on, as `rates` finds them.
RATES = {ZERO_INIT: toy.TUNING["lr"], ONE_SOFTMAX: 0.05, LORA: 0.03, FULL: 0.001}


def rate_for(world: World, method: str, factor: float = 1.0) -> float:
    """So many times the method's learning rate, in proportion to the world's own."""
    return rounded(world.default.lr / RATES[ZERO_INIT] * RATES[method] * factor)


def methods(world: World, seeds: int, out: Path) -> None:
    """Table 3: full tuning, LoRA and the adapter, and prompts without gates: parameters, storage, time, forgetting."""
    settings = {method: world.default._replace(method=method, lr=rate_for(world, method)) for method in RATES}
    for seed in range(seeds):  # in rounds, so that their times can be compared
        for setting in settings.values():
            run(world, setting, seed)
    rows, before = compare(world, settings, seeds), untouched(world)[0]
    click.echo(f"\n{'':36}{'bytes':>12}{'own text, before':>18}{'after':>9}{'base again':>12}{'after merging':>15}")
    for label, row in rows.items():
        after = "-" if before is None else f"{statistics.mean(row['perplexity']):.2f}"
        again, merged = (
            "-" if None in row[name] else "yes" if all(row[name]) else "no"
            for name in ("recovered", "recovered_after_merging")
        )
        ours = "-" if before is None else f"{before:.2f}"
        click.echo(f"{label:36}{row['bytes'][0]:>12,}{ours:>18}{after:>9}{again:>12}{merged:>15}")
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
    report(out, "methods", {"paper": paper, "perplexity_before": before, "rows": table(rows)}, figure)


def rates(world: World, seeds: int, out: Path) -> None:
    """Which learning rate suits each method of Table 3, and what it costs the base; no held-out question is used."""
    settings = {}
    for method in RATES:
        tried = [rate_for(world, method, factor) for factor in (0.1, 0.3, 1, 3, 10)]
        settings |= {f"{method}, {lr:.3g}": world.default._replace(method=method, lr=lr) for lr in tried}
    rows = compare(world, settings, seeds)
    report(out, "rates", {"rows": table(rows)}, draw_rates(rows) if len(world.text) else None)


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


def design(world: World, seeds: int, out: Path) -> None:
    """What readers ask: how prompts start, tanh or not, a gate for each head or layer, its decay, the learning rate."""
    default = world.default
    settings = {"as it is": default}
    settings |= {f"prompts start {scale:g} times as large": default._replace(scale=scale) for scale in (0.02, 0.2, 5)}
    settings |= {
        "gates without tanh": default._replace(activation="identity"),
        "one gate per layer": default._replace(gate_per="layer"),
        "weight decay 0.02 on gates": default._replace(gate_decay=0.02),
        "weight decay 1 on gates": default._replace(gate_decay=1.0),
    }
    factors = (0.1, 0.3, 3, 10)
    settings |= {f"learning rate {default.lr * f:.3g}": default._replace(lr=rounded(default.lr * f)) for f in factors}
    rows = compare(world, settings, seeds)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    draw_bars(
        figure.subplots(), {label: percent(row["accuracy"]) for label, row in rows.items()}, "answered exactly, %"
    )
    report(out, "design", {"rows": table(rows)}, figure)


def gates(world: World, seeds: int, out: Path) -> None:
    """How the gates open: pictures of layers x heads at several steps. One seed."""
    openings = []  # (L, H) each

    def look_on(adapter: Adapter, step: int) -> None:
        openings.append(adapter.gate_values().detach().cpu().numpy().copy())

    tune(world, world.default, 0, look_on)
    N, L, last = world.layers, len(openings[0]), len(openings) - 1
    shown = sorted({round(last * share) for share in (0, 0.05, 0.1, 0.2, 0.4, 1)})
    bound = max(np.abs(opening).max() for opening in openings)

    figure = Figure(figsize=(2.2 * len(shown) + 4, 2.8), layout="constrained")
    first, *panels = figure.subplots(1, len(shown) + 1, width_ratios=[2] + [1] * len(shown))
    for i in range(L):
        first.plot([np.abs(opening[i]).mean() for opening in openings], label=f"layer {N - L + i}")
    first.set(xlabel="step", ylabel="mean |tanh g|")
    if L <= 8:
        first.legend(fontsize="small")
    for axes, step in zip(panels, shown):
        image = paint_gates(axes, openings[step], N - L, bound)
        axes.set(title=f"step {step}")
    figure.colorbar(image, ax=panels)

    report(out, "gates", {"steps": shown, "opening": [openings[step].tolist() for step in shown]}, figure)
    click.echo(f"{'step':>8}" + "".join(f"{f'layer {N - L + i}':>10}" for i in range(L)) + "   (mean |tanh g|)")
    for step in shown:
        click.echo(f"{step:>8}" + "".join(f"{np.abs(openings[step][i]).mean():>10.3f}" for i in range(L)))


def choices(world: World, problems: list[Problem], model: LLaMA, adapter: Adapter | None) -> dict[str, list]:
    """Which answer to every problem is written, and which is held for the likeliest."""
    name = "base" if adapter is None else "adapter"
    speakers = {} if adapter is None else {"adapter": adapter}
    how = {"max_new_tokens": 16, "eos_id": world.tokenizer.eos_id}
    responder = Responder(model, world.tokenizer, speakers, strength=1.0, raw=False, **how)
    questions = [Question(problem.text(), "", name, None) for problem in problems]
    texts = written_answers(responder, questions, 64, "problem")
    likeliest = likeliest_answers(responder, questions, [problem.answers() for problem in problems], 64, "problem")
    return {
        "written": [None if text is None else problem.chosen(text) for problem, text in zip(problems, texts)],
        "likeliest": likeliest,
    }


def science_qa(world: World, seeds: int, out: Path, problems: list[Problem]) -> None:
    """Table 5 on its own data: ScienceQA's validation split; of a problem with an image, the text alone."""
    chance = statistics.mean(1 / len(problem.choices) for problem in problems)
    click.echo(
        f"{len(world.tuning):,} problems to learn from, {len(problems):,} to be asked, chance {chance:.1%}\n"
        f"{'':36}{'written':>9}{'±':>7}{'likeliest':>11}{'±':>7}{'loss held out':>15}"
    )
    rows: dict[str, dict] = {}
    base, _ = load_llama(world.base, world.dtype, world.device)
    for method in ("base", ZERO_INIT, ONE_SOFTMAX):
        row = rows[method] = {"written": [], "likeliest": [], "columns": [], "val_loss": []}
        for seed in range(seeds if method != "base" else 1):
            model, adapter = base, None
            if method != "base":
                setting = world.default._replace(method=method, lr=rate_for(world, method))
                model, adapter, _, _ = tune(world, setting, seed)
                row["val_loss"].append(mean_loss(model, adapter, world.held_out, POSITIONS))
            for way, chosen in choices(world, problems, model, adapter).items():
                marks = accuracies(problems, chosen)
                row[way].append(marks["Avg"] / 100)
                if way == "likeliest":
                    row["columns"].append(marks)
        loss = f"{statistics.mean(row['val_loss']):.4f}" if row["val_loss"] else "-"
        click.echo(
            f"{method:36}"
            + "".join(
                f"{statistics.mean(row[way]):>{width}.1%}{spread(row[way]):>7.1%}"
                for way, width in (("written", 9), ("likeliest", 11))
            )
            + f"{loss:>15}"
        )
    paper = {"validation, %": {"zero-init attention": 83.85, "random-init attention": 40.77}}
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, {method: percent(row["likeliest"]) for method, row in rows.items()}, "likeliest answer right, %")
    axes.axvline(100 * chance, color="black", linewidth=1)
    values = {"paper": paper, "chance": chance, "problems": len(problems), "tuned_on": len(world.tuning), "rows": rows}
    report(out, "scienceqa", values, figure)


# ---------------------------------------------------------------------------------------------------
# The commands


def toy_examples(searching: bool) -> tuple[list[Example], list[Example]]:
    """toy.py's, to tune on and to be asked. A search asks nothing held out, but a fifth of what tuning is about."""
    sets = toy.instructions()
    tuning, asked = sets["tuning"], [question for name in toy.HELD_OUT for question in sets[name]]
    if searching:

        def about(question: toy.Question) -> str:
            return min(question.entity, question.answer) if question.kind == "opposite" else question.entity

        things = sorted(set(map(about, tuning)))
        fifth = set(np.random.default_rng(0).permutation(things)[: len(things) // 5])
        asked = [question for question in tuning if about(question) in fifth]
        tuning = [question for question in tuning if about(question) not in fifth]
    return [question.example for question in tuning], [question.example for question in asked]


def make_world(
    base: Path,
    tuning: list[Example],
    asked: list[Example],
    documents: Iterable[str],
    default: Setting,
    batch_size: int,
    max_seq_len: int,
    device: torch.device,
    dtype: torch.dtype,
) -> World:
    """Of the examples, those that fit; `documents` are of the base's own kind. ValueError where nothing is left."""
    config, _ = read_base(base)
    if default.layers > config.n_layers:
        raise ValueError(f"--layers {default.layers}: {base} has only {config.n_layers}")
    tokenizer = load_tokenizer(base if base.is_dir() else base.parent)
    length = min(max_seq_len, config.max_seq_len or max_seq_len)
    tokens, _ = tokenize(tokenizer, tuning, length)
    fitting = [(example, found[0]) for example in asked if (found := tokenize(tokenizer, [example], length)[0])]
    if not tokens or not fitting:
        raise ValueError(
            f"within {length} tokens there are {len(tokens)} of {len(tuning)} examples to learn from, "
            f"and {len(fitting)} of {len(asked)} to be asked"
        )
    questions, held_out = map(list, zip(*fitting))
    stream = [id for document in documents for id in (tokenizer.bos_id, *tokenizer.encode(document), tokenizer.eos_id)]
    row = min(toy.ROW, length)
    if 0 < len(stream) < row:
        raise ValueError(f"--text has {len(stream)} tokens, fewer than a row of {row}")
    rows = torch.tensor(stream[: min(64, len(stream) // row) * row], dtype=torch.long).view(-1, row)
    shape = {"layers": config.n_layers, "batch_size": batch_size, "default": default, "device": device, "dtype": dtype}
    return World(base, tokenizer, tokens, held_out, questions, rows, **shape)


def read_world(
    base: Path | None,
    data: Path | None,
    task: str | None,
    text: Path | None,
    limit: int | None,
    held_out: int | None,
    batch_size: int | None,
    max_seq_len: int,
    device: str,
    dtype: str,
    searching: bool = False,
    asked: list[Example] | None = None,
    **changed,
) -> World:
    """As the options say; what is asked is held out of the data, or given. Raises OSError or ValueError."""
    place = select_device(device, dtype)
    if (base is None) != (data is None):
        raise ValueError("--base and --data go together; without them it is toy.py's")
    if base is None:
        if task or text:
            raise ValueError("--task and --text need --base and --data: the toy brings all that it needs")
        base, batch_size = toy.make_base(), batch_size or toy.TUNING["batch_size"]
        default = Setting(layers=toy.TUNING["layers"], lr=toy.TUNING["lr"])
        tuning, asked = toy_examples(searching)
        documents = islice(toy.documents(seed=1), 500)  # the base was pre-trained on those of seed 0
    else:
        config, _ = read_base(base)
        batch_size, held_out = batch_size or 64, held_out or 200
        default = Setting(layers=max(1, config.n_layers - 2), lr=9e-3 * batch_size / 256)
        examples = read_task(task or "instructions", data, data.parent)
        tuning = [example._replace(image="") for example in examples]
        for _ in range((asked is None) + searching):  # a search has its own questions, from what is tuned on
            if len(tuning) < 2:
                raise ValueError(f"{data}: {len(examples)} examples are too few to learn from some and ask others")
            tuning, asked = split(tuning, max(1, len(tuning) // 10), seed=0)
        documents = [] if text is None else [read_text(text)[:100_000]]
    default = default._replace(**{name: value for name, value in changed.items() if value is not None})
    return make_world(
        base, some(tuning, limit), some(asked, held_out), documents, default, batch_size, max_seq_len, *place
    )


HERE = Path(__file__).parent / "experiments"


def world_options(command):
    """What all commands take."""
    options = [
        click.option("--base", type=click.Path(path_type=Path), help="Another base.  [default: toy.py's]"),
        click.option("--data", type=click.Path(path_type=Path), help="What to tune it on.  [default: toy.py's]"),
        click.option("--task", type=click.Choice(TASKS), help="What the data is, as for train.py."),
        click.option("--text", type=click.Path(path_type=Path), help="Text of the kind that the base was made of."),
        click.option("--limit", type=click.IntRange(1), help="Tune on so many examples only, drawn from all."),
        click.option("--held-out", type=click.IntRange(1), help="Ask so many.  [default: all; 200 of --data]"),
        click.option("--batch-size", type=click.IntRange(1), help="[default: 64; toy.py's 32]"),
        click.option("--max-seq-len", type=click.IntRange(2), default=512),
        click.option("--lr", type=Real(0, 1e3, min_open=True), help="[default: 9e-3 * batch size/256; toy.py's 0.05]"),
        click.option("--layers", type=click.IntRange(1), help="[default: all but two; toy.py's 4]"),
        click.option("--length", type=click.IntRange(1), help="K.  [default: 10]"),
        click.option("--epochs", type=click.IntRange(WARMUP_EPOCHS + 1), help="[default: 5]"),
        device_options,
        click.option("--seeds", type=click.IntRange(1), default=3),
        click.option("--out", type=click.Path(path_type=Path), default=HERE, show_default="experiments"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


EXPERIMENTS = {  # `all` runs them in this order; methods come first, while nothing is known yet and all must be timed
    "methods": methods,
    "zero-init": zero_init,
    "layers": layers,
    "epochs": epochs,
    "design": design,
    "gates": gates,
}


@click.group(context_settings={"show_default": True})
def main():
    """Run the paper's experiments again: each prints a table, and writes figures and a picture."""


ERRORS = OSError, ValueError, torch.OutOfMemoryError  # which are said in one line


def add_command(name: str, function: Callable) -> None:
    @main.command(name, help=function.__doc__, context_settings={"show_default": True})
    @world_options
    def command(seeds: int, out: Path, **options) -> None:
        with one_line_errors(*ERRORS):
            world = read_world(**options, searching=function is rates)
            out.mkdir(parents=True, exist_ok=True)
            function(world, seeds, out)


for name, function in (EXPERIMENTS | {"rates": rates}).items():
    add_command(name, function)


@main.command("all", context_settings={"show_default": True})
@world_options
def run_all(seeds: int, out: Path, **options) -> None:
    """All that follow but rates and scienceqa; what several need is done once."""
    with one_line_errors(*ERRORS):
        start, world = time.perf_counter(), read_world(**options)
        out.mkdir(parents=True, exist_ok=True)
        for name, function in EXPERIMENTS.items():
            click.echo(f"{name}. {inspect.getdoc(function)}\n")
            function(world, seeds, out)
        minutes = (time.perf_counter() - start) / 60
        report(out, "all", {"minutes": minutes, "threads": torch.get_num_threads(), "torch": torch.__version__})
        click.echo(f"{minutes:.1f} minutes, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")


@main.command("scienceqa", help=science_qa.__doc__, context_settings={"show_default": True})
@world_options
def science_qa_command(seeds: int, out: Path, **options) -> None:
    with one_line_errors(*ERRORS):
        data, task = options["data"], options.pop("task")
        if options["base"] is None or data is None or task not in (None, "scienceqa"):
            raise ValueError("this needs --base and --data, ScienceQA's problems.json, and no other --task")
        problems = some(read_problems(data, "val", data.parent), options["held_out"])
        asked = [Example(problem.text(), "", problem.answers()[problem.answer]) for problem in problems]
        world = read_world(**options | {"held_out": len(problems)}, task="scienceqa", asked=asked)
        out.mkdir(parents=True, exist_ok=True)
        science_qa(world, seeds, out, problems)


if __name__ == "__main__":
    main()
