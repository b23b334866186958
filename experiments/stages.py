"""Compare training in one stage with training on captions first (section 3.3), on the toy's images of digits."""

import io
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch
from cloup import option, option_group
from matplotlib.figure import Figure

import toy
from data import AlpacaTemplate, Example, Tokenizer, TokenizedExample, tokenize
from experiments.cached import cached_folder, toy_base
from experiments.drawing import draw_bars, percent
from experiments.methods import WEIGHT_DECAY, Trainable, finite_steps, make_image_adapter
from experiments.runs import Column, Runs, experiment, training_options
from formats.bases import load_llama
from formats.image_encoders import VisionEncoder
from model import LLaMA
from runtime.cli import Count, device_options
from runtime.device import select_device
from tasks.images import attach_features
from toy import digits
from toy.almanac import NUMBERS
from toy.exam import evaluate_digits
from train import TrainConfig, freeze_parts, make_optimizer

# Each schedule is a list of stages. A stage names the data to train on, and the parts of the adapter that are frozen.
STAGES: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "questions alone": [(("questions",), ())],
    "captions and questions at once": [(("captions", "questions"), ())],
    "captions, then questions": [(("captions",), ()), (("questions",), ())],
    "the same, the projection frozen": [(("captions",), ()), (("questions",), ("projection",))],
}


def captions(files: list[Path]) -> list[Example]:
    """Return one example per image; its instruction asks for a caption."""
    texts = [f"The picture shows a {NUMBERS[int(file.name[0])]}." for file in files]
    return [
        Example("Describe the picture.", "", text, f"pictures/{file.name}", file.name)
        for text, file in zip(texts, files)
    ]


def train_in_stages(
    data: dict[str, list[TokenizedExample]],
    model: LLaMA,
    tokenizer: Tokenizer,
    config: TrainConfig,
    stages: list,
    seed: int,
) -> dict[str, float]:
    """Train an adapter in the given stages, one after another; `stages` is a value of STAGES.

    Returns the accuracies from `evaluate_digits` after the last stage, and the training time in seconds.
    """
    config = replace(config, seed=seed)
    adapter = make_image_adapter(model, len(data["questions"][0].features), config)
    start = time.perf_counter()
    for names, frozen in stages:
        freeze_parts(adapter, frozen)
        examples = [example for name in names for example in data[name]]
        trainable = Trainable(model, adapter, make_optimizer(adapter, WEIGHT_DECAY))
        for _ in finite_steps(trainable, examples, config):
            pass
    seconds = time.perf_counter() - start
    with redirect_stdout(io.StringIO()):
        scores = evaluate_digits(model, tokenizer, adapter)
    keys = {"accuracy": "image", "withheld": "no_image", "another": "another_image"}
    return {name: scores[f"picture_accuracy_{key}"] for name, key in keys.items()} | {"seconds": seconds}


COLUMNS = (
    Column("accuracy", "image", spread=True),
    Column("withheld", "no image"),
    Column("another", "another image"),
    Column("seconds", "seconds", ".1f"),
)


@experiment(
    "stages",
    option_group(
        "Data",
        option(
            "--pictures",
            type=Count(),
            default=50,
            help="Number of images with questions. All 400 images have captions.",
        ),
        device_options[0],
    ),
    training_options(epochs=12),
)
def stages(runs: Runs, pictures, epochs, device) -> None:
    """Compare training on images in one stage and in two stages.

    The adapters are trained on the toy's images of digits: on questions alone, on captions and questions at once, and
    on captions followed by questions, with the image projection trained or frozen in the second stage.
    """
    device, _ = select_device(device, "float32")
    folder = cached_folder("digits", [], digits.write_pictures)
    files = digits.pictures(folder)[0][: digits.TRAINED_ON]
    model, tokenizer = load_llama(toy_base(), device=device)
    questions = [question.example for question in digits.questions(files[:pictures])]
    encoder = VisionEncoder(str(digits.ENCODER), torch.float32, device)
    data = {}
    for name, examples in (("captions", captions(files)), ("questions", questions)):
        data[name], _ = tokenize(AlpacaTemplate(tokenizer), attach_features(examples, folder, encoder), 512)
    click.echo(
        f"{len(data['captions'])} captions, {len(data['questions'])} questions about {len(files[:pictures])} images"
    )
    click.echo("Share of the 600 held-out questions that are answered exactly:\n")
    config = TrainConfig(epochs=epochs, warmup_epochs=1, batch_size=32, lr=toy.TRAINING["lr"])
    rows = runs.table(COLUMNS, STAGES, partial(train_in_stages, data, model, tokenizer, config))
    figure = Figure(figsize=(8, 2.5), layout="constrained")
    shares = {label: percent(row["accuracy"]) for label, row in rows.items()}
    draw_bars(figure.subplots(), shares, "answered exactly, %")
    runs.save("stages", {"rows": rows}, figure)
