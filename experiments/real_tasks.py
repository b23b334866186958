"""Parts of `experiments real` beyond film reviews: ScienceQA, Alpaca, digits, and three adapters for one base."""

import io
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
from matplotlib.figure import Figure

from adapter import Adapter
from data import Example, Request, tokenize
from encoder_tuning.labeled import subset
from experiments.cached import cached_folder
from experiments.capitals import capital_examples, is_json
from experiments.drawing import draw_bars, percent
from experiments.measures import first_logits, share_equal, train_setting
from experiments.methods import LORA, WEIGHT_DECAY, ZERO_INIT, Setting, Trainable, finite_steps, make_image_adapter
from experiments.reviews import BATCH_SIZE, EPOCHS, SENTENCES, Sources, best_settings, cache_file, checkpoint_file
from experiments.reviews import review_testbed, schedule
from experiments.runs import Column, Runs, rounded
from experiments.testbed import Testbed, TestbedParts, make_testbed
from formats.adapters import load_adapter
from formats.bases import load_llama
from formats.chat_templates import load_template
from formats.hub import find_base
from formats.image_encoders import VisionEncoder
from generate import Responder
from runtime.device import select_device
from tasks.images import attach_features
from tasks.instructions import read as read_instructions
from tasks.responses import generate_responses, most_likely_choices
from tasks.scienceqa import read as read_problems
from tasks.scienceqa import score
from toy import digits
from toy.exam import evaluate_digits
from train import TrainConfig, make_optimizer, mean_loss

WRITTEN = 1000  # number of test problems with generated answers; the most likely option is chosen for all test problems
ASKED = 200  # number of held-out questions per adapter
ALPACA, ALPACA_HELD_OUT = 2000, 200  # training and held-out examples


class TaskRun(NamedTuple):
    """A training run on a task, or the base without an adapter if `setting` is None."""

    task: str
    setting: Setting | None


@cache
def task_testbed(sources: Sources, task: str) -> Testbed:
    """Return the testbed of a task, with its training and held-out examples.

    `task` is "reviews", "capitals", "scienceqa" or "alpaca". Raises OSError or ValueError if an input file is missing
    or invalid.
    """
    if task == "reviews":
        return review_testbed(sources, SENTENCES, False)
    if task == "capitals":
        training, held_out = capital_examples()
    elif task == "scienceqa":
        training = read_problems(required_path(sources.problems, "--problems"))
        held_out = subset(read_problems(sources.problems, split="val"), ASKED)
    else:
        examples = subset(read_instructions(required_path(sources.alpaca, "--alpaca")), ALPACA + ALPACA_HELD_OUT)
        training, held_out = examples[:ALPACA], examples[ALPACA:]
    base, settings = find_base(sources.base), schedule(len(training))
    default = review_testbed(sources, SENTENCES, False).default._replace(**settings)
    parts = TestbedParts(base, default, BATCH_SIZE, training, held_out, documents=[])
    return make_testbed(parts, 512, *select_device(sources.device, sources.dtype))


def required_path(path: Path | None, option: str) -> Path:
    """Return the path given by an option. Raises ValueError if the option was not given."""
    if path is None:
        raise ValueError(f"the option {option} is missing; give its file, or select other parts with --part")
    return path


def trained_adapter(sources: Sources, run: TaskRun, seed: int) -> Adapter:
    """Load an adapter from the cache. If it is not there, train it on the task, and save it there first."""
    path = cache_file(sources, run, seed, "safetensors")
    if not path.exists():
        with checkpoint_file(sources, run, seed) as checkpoint:
            trainable, _, _ = train_setting(task_testbed(sources, run.task), run.setting, seed, checkpoint)
            trainable.adapter.save(path)
    return load_adapter(path)


# ---------------------------------------------------------------------------------------------------
# ScienceQA


def answer_problems(sources: Sources, run: TaskRun, seed: int) -> dict:
    """Train, unless the run is the base alone, and answer the test problems. Return the scores by name.

    "written" is the accuracy of generated answers to WRITTEN of the problems. "most_likely" is the accuracy of the most
    likely option for all problems, "columns" contains the nine scores of these options by column of Table 2, and
    "chance" is the accuracy of random choices. "too_long" counts the problems that do not fit into the context, which
    count as wrong. "val_loss" is None for the base alone.
    """
    testbed = task_testbed(sources, "scienceqa")
    problems = read_problems(sources.problems, split="test")
    if run.setting is not None and run.setting.method == LORA:
        with checkpoint_file(sources, run, seed) as checkpoint:
            (model, adapter, _, _), _, _ = train_setting(testbed, run.setting, seed, checkpoint)
    else:
        model, _ = load_llama(testbed.base, testbed.dtype, testbed.device)
        adapter = None if run.setting is None else trained_adapter(sources, run, seed).to(testbed.device)
    adapters = {} if adapter is None else {"adapter": adapter}
    name = "base" if adapter is None else "adapter"
    responder = Responder(model, testbed.tokenizer, adapters, max_new_tokens=16)

    def requests(examples: Sequence[Example]) -> list[Request]:
        return [Request(example.instruction, example.input, name) for example in examples]

    sample = subset(problems, WRITTEN)
    written = generate_responses(responder, requests(sample), unit="problem")
    choices = [problem.answers() for problem in problems]
    chosen = most_likely_choices(responder, requests(problems), choices)
    fitting = [problem for problem, text in zip(problems, chosen) if text is not None]
    loss = None if adapter is None else mean_loss(model, adapter, testbed.held_out, TrainConfig())
    return {
        "written": score(sample, written)["Avg"] / 100,
        "most_likely": score(problems, chosen)["Avg"] / 100,
        "chance": sum(1 / len(problem.choices) for problem in fitting) / len(problems),
        "too_long": len(problems) - len(fitting),
        "val_loss": loss,
        "columns": score(problems, chosen),
    }


def compare_on_problems(runs: Runs, sources: Sources) -> None:
    """Train on the ScienceQA problems without their images, and answer the test problems."""
    testbed = task_testbed(sources, "scienceqa")
    click.echo(f"{len(testbed.training):,} training problems\n")
    best = best_settings(runs, sources)
    planned = {"base": TaskRun("scienceqa", None)}
    for method in (ZERO_INIT, LORA):
        planned[method] = TaskRun("scienceqa", best[method]._replace(**schedule(len(testbed.training))))
    columns = (
        Column("written", "written"),
        Column("most_likely", "most likely"),
        Column("chance", "chance"),
        Column("too_long", "too long", ",.0f"),
        Column("val_loss", "validation loss", ".4f"),
    )
    rows = runs.table(columns, planned, partial(answer_problems, sources), at_a_time=sources.at_a_time)
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    axes = figure.subplots()
    draw_bars(
        axes, {label: percent(row["most_likely"]) for label, row in rows.items()}, "most likely option correct, %"
    )
    axes.axvline(100 * rows["base"]["chance"][0], color="black", linewidth=1)
    paper = {"test, %": {"LLaMA-Adapter, text only": 78.31, "random choice": 39.83}}
    values = {"paper": paper, "trained_on": len(testbed.training), "written_problems": WRITTEN, "rows": rows}
    runs.save("scienceqa", values, figure)


# ---------------------------------------------------------------------------------------------------
# Three adapters for one base


def mix_experts(runs: Runs, sources: Sources) -> None:
    """Evaluate three adapters for one base: each alone, and all of them and the base in mixed batches."""
    setting = best_settings(runs, sources)[ZERO_INIT]
    settings = {name: setting._replace(**schedule(len(task_testbed(sources, name).training))) for name in EXPERTS}
    columns = (
        Column("alone", "alone"),
        Column("mixed", "mixed"),
        Column("same", "same text"),
        Column("switch_ms", "switch, ms", ".1f"),
        Column("file_bytes", "bytes", ",.0f"),
    )
    found = runs.table((), {"experts": settings}, partial(evaluate_experts, sources))["experts"]
    (rows,), (base,) = found["rows"], found["base"]
    for name, row in rows.items():
        click.echo(f"{name:12}" + "".join(f"{column.title} {row[column.name]:{column.form}}  " for column in columns))
    click.echo(
        f"base: logits unchanged bit for bit: {base['unchanged']}; same responses alone and mixed: {base['same']:.1%}"
    )
    figure = Figure(figsize=(7, 2.5), layout="constrained")
    shares = {f"{name}, {how}": percent([row[how]]) for name, row in rows.items() for how in ("alone", "mixed")}
    draw_bars(figure.subplots(), shares, "answered exactly, %")
    runs.save("experts", {"rows": rows, "base": base, "asked_of_each": ASKED}, figure)


EXPERTS = ("reviews", "capitals", "scienceqa")


def evaluate_experts(sources: Sources, settings: dict[str, Setting], seed: int) -> dict[str, dict]:
    """Train the adapters, or load them from the cache, and score each of them and the base, alone and in mixed batches.

    Returns "rows", the scores, switching time and file size of each adapter, and "base", the scores of the base.
    """
    testbeds = {name: task_testbed(sources, name) for name in EXPERTS}
    device, dtype = testbeds["reviews"].device, testbeds["reviews"].dtype
    adapters = {name: trained_adapter(sources, TaskRun(name, settings[name]), seed).to(device) for name in EXPERTS}
    model, tokenizer = load_llama(testbeds["reviews"].base, dtype, device)
    before = first_logits(testbeds["reviews"], model)
    questions = {name: subset(testbed.questions, ASKED) for name, testbed in testbeds.items()}
    questions["base"] = questions["capitals"]
    responder = Responder(model, tokenizer, adapters, max_new_tokens=32)
    requests = {name: [Request(q.instruction, q.input, name) for q in chosen] for name, chosen in questions.items()}

    alone = {name: generate_responses(responder, batch) for name, batch in requests.items()}
    shuffled = [(name, i) for name, batch in requests.items() for i in range(len(batch))]
    random.Random(0).shuffle(shuffled)  # so that a batch has requests to all adapters
    texts = {}
    for start in range(0, len(shuffled), 64):
        keys = shuffled[start : start + 64]
        texts |= zip(keys, responder.respond_batch([requests[name][i] for name, i in keys]))
    mixed = {name: [texts[name, i] for i in range(len(batch))] for name, batch in requests.items()}

    rows = {}
    for name in EXPERTS:
        start = time.perf_counter()
        for _ in range(10):
            with torch.no_grad():
                adapters[name](dtype=dtype)
        seconds = (time.perf_counter() - start) / 10
        expected = [question.output for question in questions[name]]
        rows[name] = {
            "alone": share_equal(alone[name], expected),
            "mixed": share_equal(mixed[name], expected),
            "same": share_equal(alone[name], mixed[name]),
            "switch_ms": 1000 * seconds,
            "file_bytes": cache_file(sources, TaskRun(name, settings[name]), seed, "safetensors").stat().st_size,
        }
    rows["capitals"]["json"] = statistics.mean(map(is_json, mixed["capitals"]))
    base = {
        "unchanged": torch.equal(before, first_logits(testbeds["reviews"], model)),
        "same": share_equal(alone["base"], mixed["base"]),
        "json": statistics.mean(map(is_json, alone["base"])),
        "capital_named": statistics.mean(
            question.output.split('"')[7] in (text or "") for text, question in zip(alone["base"], questions["base"])
        ),
    }
    return {"rows": rows, "base": base}


# ---------------------------------------------------------------------------------------------------
# Alpaca


def train_on_alpaca(runs: Runs, sources: Sources) -> None:
    """Train on 2,000 examples of Alpaca, and compare validation loss and responses to five prompts with the base's."""
    testbed = task_testbed(sources, "alpaca")
    best = best_settings(runs, sources)[ZERO_INIT]._replace(**schedule(len(testbed.training)))
    planned = {"base": TaskRun("alpaca", None)}
    for factor in (1 / 3, 1):
        setting = best._replace(lr=rounded(best.lr * factor))
        planned[f"{ZERO_INIT}, {setting.lr:.3g}"] = TaskRun("alpaca", setting)
    columns = (Column("val_loss", "validation loss", ".4f"), Column("own_template", "in own template", ".4f"))
    rows = runs.table(columns, planned, partial(alpaca_values, sources), at_a_time=sources.at_a_time)
    prompts = [f"{question.instruction}\n{question.input}".strip() for question in testbed.questions[:5]]
    runs.save("alpaca", {"trained_on": len(testbed.training), "asked": prompts, "rows": rows})


def alpaca_values(sources: Sources, run: TaskRun, seed: int) -> dict:
    """Return the validation loss in Alpaca's template, and five responses.

    If `run.setting` is None, the base alone is measured, and its loss ("own_template") and responses in its own chat
    template are returned as well.
    """
    testbed = task_testbed(sources, "alpaca")
    model, tokenizer = load_llama(testbed.base, testbed.dtype, testbed.device)
    own_template = None
    if run.setting is None:
        dimensions = {"layers": 1, "length": 1, "dim": model.config.dim, "heads": model.config.n_heads}
        adapter = Adapter(**dimensions)  # with zero gates
        own, _ = tokenize(load_template("auto", tokenizer), testbed.questions, 512)
        own_template = mean_loss(model, adapter, own, TrainConfig())
    else:
        adapter = trained_adapter(sources, run, seed).to(testbed.device)
    responses = {}
    for template in ("alpaca", "auto") if run.setting is None else ("alpaca",):
        responder = Responder(model, tokenizer, {"adapter": adapter}, template=template, max_new_tokens=80)
        requests = [Request(question.instruction, question.input, "adapter") for question in testbed.questions[:5]]
        responses[template] = generate_responses(responder, requests)
    loss = mean_loss(model, adapter, testbed.held_out, TrainConfig())
    return {"val_loss": loss, "own_template": own_template, "responses": responses}


# ---------------------------------------------------------------------------------------------------
# Digits


def train_on_digits(runs: Runs, sources: Sources) -> None:
    """Train on the toy's images of digits. Evaluate with the correct image, without an image, and with a random one."""
    best = best_settings(runs, sources)[ZERO_INIT]
    planned = {f"{factor:g} times the rate": best._replace(lr=best.lr * factor) for factor in (1, 3)}
    columns = (Column("image", "image"), Column("no_image", "withheld"), Column("another_image", "another"))
    rows = runs.table(columns, planned, partial(digit_scores, sources), at_a_time=sources.at_a_time)
    runs.save("digits", {"rows": rows, "epochs": DIGIT_EPOCHS})


DIGIT_EPOCHS = 2 * EPOCHS


def digit_scores(sources: Sources, setting: Setting, seed: int) -> dict[str, float]:
    """Train with one seed. Return the accuracies from `evaluate_digits`, including chance, and the learning rate."""
    device, dtype = select_device(sources.device, sources.dtype)
    folder = cached_folder("digits", [], digits.write_pictures)
    files = digits.pictures(folder)[0][: digits.TRAINED_ON]
    model, tokenizer = load_llama(find_base(sources.base), dtype, device)
    encoder = VisionEncoder(str(digits.ENCODER), dtype, device)
    questions = [question.example for question in digits.questions(files)]
    template = load_template("alpaca", tokenizer)
    examples, _ = tokenize(template, attach_features(questions, folder, encoder), 512)
    schedule = {"epochs": DIGIT_EPOCHS, "warmup_epochs": 1, "batch_size": BATCH_SIZE}
    config = TrainConfig(lr=setting.lr, seed=seed, **schedule)
    adapter = make_image_adapter(model, len(examples[0].features), config)
    trainable = Trainable(model, adapter, make_optimizer(adapter, WEIGHT_DECAY))
    for _ in finite_steps(trainable, examples, config):
        pass
    with redirect_stdout(io.StringIO()):
        scores = evaluate_digits(model, tokenizer, adapter)
    return {name.removeprefix("picture_accuracy_"): share for name, share in scores.items()} | {"lr": setting.lr}
