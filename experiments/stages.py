"""Two stages of tuning on images (section 3.3 of the final version): captions, then questions, on the toy's digits."""

import io
import statistics
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import click
import cloup
import torch
from cloup import option, option_group
from matplotlib.figure import Figure

import toy
from data import AlpacaTemplate, Example, Tokenizer, Tokens, tokenize
from experiments.cached import cached_folder, toy_base
from experiments.methods import WEIGHT_DECAY, Tunable, finite_steps, make_image_adapter
from experiments.tables import draw_bars, out_option, percent, save_results, spread
from formats.bases import load_llama
from formats.image_encoders import TowerEncoder
from model import LLaMA
from runtime.cli import Count, device_options, one_line_errors
from runtime.device import select_device
from tasks.images import attach_features
from toy import digits
from toy.almanac import NUMBERS
from toy.exam import evaluate_digits
from train import TrainConfig, freeze_parts, make_optimizer

# What is learnt in each stage, and what stays as it is meanwhile.
RUNS: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "questions alone": [(("questions",), ())],
    "captions and questions at once": [(("captions", "questions"), ())],
    "captions, then questions": [(("captions",), ()), (("questions",), ())],
    "the same, the projection frozen": [(("captions",), ()), (("questions",), ("projection",))],
}


def captions(files: list[Path]) -> list[Example]:
    """What each picture shows."""
    shown = [f"The picture shows a {NUMBERS[int(file.name[0])]}." for file in files]
    return [
        Example("Describe the picture.", "", text, f"pictures/{file.name}", file.name)
        for text, file in zip(shown, files)
    ]


def tune_in_stages(
    stages: list, data: dict[str, list[Tokens]], model: LLaMA, tokenizer: Tokenizer, config: TrainConfig
) -> tuple[dict[str, float], float]:
    """The scores of `evaluate_digits` after all stages, and their seconds. A later one begins where the last ended."""
    adapter = make_image_adapter(model, len(data["questions"][0].features), config)
    start = time.perf_counter()
    for names, frozen in stages:
        freeze_parts(adapter, frozen)
        examples = [example for name in names for example in data[name]]
        tunable = Tunable(model, adapter, make_optimizer(adapter, WEIGHT_DECAY))
        for _ in finite_steps(tunable, examples, config):
            pass
    seconds = time.perf_counter() - start
    with redirect_stdout(io.StringIO()):
        return evaluate_digits(model, tokenizer, adapter), seconds


@cloup.command("stages", context_settings={"show_default": True})
@option_group(
    "Options",
    option("--pictures", type=Count(), default=50, help="Tune on questions about so many, of 400 with captions."),
    option("--epochs", type=Count(2), default=12, help="Of each stage."),
    option("--seeds", type=Count(), default=3, help="Runs of everything."),
    device_options[0],
    out_option,
)
@one_line_errors()
def compare_stages(pictures, epochs, seeds, device, out):
    """Compare one stage and two.

    The toy's digits: captions, then questions, against both at once, and questions alone.
    """
    device, _ = select_device(device, "float32")
    folder = cached_folder("digits", [], digits.write_pictures)
    files = digits.pictures(folder)[0][: digits.TUNED_ON]
    model, tokenizer = load_llama(toy_base(), device=device)
    asked = [question.example for question in digits.questions(files[:pictures])]
    encoder = TowerEncoder(str(digits.ENCODER), torch.float32, device)
    data = {}
    for name, examples in (("captions", captions(files)), ("questions", asked)):
        data[name], _ = tokenize(AlpacaTemplate(tokenizer), attach_features(examples, folder, encoder), 512)
    click.echo(f"{len(data['captions'])} captions, questions about {pictures} pictures: {len(data['questions'])}\n")
    click.echo(
        f"{'600 questions, answered exactly':36}{'image':>9}{'±':>7}{'withheld':>10}{'another':>9}{'seconds':>9}"
    )
    rows = {}
    for label, stages in RUNS.items():
        config = TrainConfig(epochs=epochs, warmup_epochs=1, batch_size=32, lr=toy.TUNING["lr"])
        runs = [tune_in_stages(stages, data, model, tokenizer, replace(config, seed=seed)) for seed in range(seeds)]
        columns = {"accuracy": "image", "withheld": "no_image", "another": "another_image"}
        rows[label] = {name: [scores[f"picture_accuracy_{key}"] for scores, _ in runs] for name, key in columns.items()}
        rows[label]["seconds"] = [seconds for _, seconds in runs]
        means = {name: statistics.mean(values) for name, values in rows[label].items()}
        click.echo(
            f"{label:36}{means['accuracy']:>9.1%}{spread(rows[label]['accuracy']):>7.1%}{means['withheld']:>10.1%}"
            f"{means['another']:>9.1%}{means['seconds']:>9.1f}"
        )
    figure = Figure(figsize=(8, 2.5), layout="constrained")
    draw_bars(
        figure.subplots(), {label: percent(row["accuracy"]) for label, row in rows.items()}, "answered exactly, %"
    )
    save_results(out, "stages", {"pictures": pictures, "epochs": epochs, "rows": rows}, figure)
