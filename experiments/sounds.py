"""Train adapters to recognize spoken words from features of a third-party Keyword Transformer, or from a spectrum.

The encoders are in docs/examples. espeak-ng speaks the words, in training voices and in held-out voices. Each question
is evaluated with its sound, without a sound, and with the sound of a different word. Without a sound, an adapter can
only guess one of 14 words.
"""

import os
import shutil
import statistics
import subprocess
import tempfile
import time
import wave
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import numpy as np
from cloup import option, option_group
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import toy
from data import AlpacaTemplate, Example, Request, Tokenizer, tokenize
from experiments.cached import cached_folder, toy_base
from experiments.drawing import draw_bars, percent
from experiments.methods import WEIGHT_DECAY, Trainable, finite_steps, make_image_adapter
from experiments.runs import Column, Runs, experiment, training_options
from formats.bases import load_llama
from formats.image_encoders import FunctionEncoder
from model import LLaMA
from multimodal import ImageAdapter
from runtime.cli import PATH, device_options
from runtime.device import select_device
from runtime.files import write_json
from tasks.images import attach_features
from toy.almanac import capitalized
from toy.exam import greedy_answers
from train import TrainConfig, make_optimizer

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SCORES = "its 12 scores"
ENCODERS = {
    "four class tokens": "keyword_transformer.py:class_tokens",
    SCORES: "keyword_transformer.py:label_scores",
    "no model: a spectrum": "spectrum.py:rows",
}

KEYWORDS = ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]  # the Keyword Transformer's classes
WORDS = KEYWORDS + ["visual", "eight", "dog", "one"]  # the Keyword Transformer's label for the last four is "unknown"
LABELS = ["silence", "unknown", *KEYWORDS]  # in the order of the Keyword Transformer's 12 scores
NUMBERS = {"one", "eight"}
QUESTIONS = {"Which word do you hear?": "I hear the word {word}.", "Is it a number?": "{capital} is {number}."}

# Accents and speakers of espeak-ng. The held-out voices share no accent and no speaker with the training voices, which
# are named "tuned".
VOICES = {
    "tuned": (
        ["en-us", "en-gb", "en-gb-scotland", "en-029"],
        ["m1", "m3", "m5", "f1", "f2", "f3", "klatt2", "Annie", "David", "Zac"],
    ),
    "held-out": (
        ["en-gb-x-rp", "en-gb-x-gbcwmd", "en-us-nyc"],
        ["m7", "f5", "croak", "whisper", "Andy", "Steph"],
    ),
}
SPEEDS, PITCHES = (120, 180), (30, 70)  # ranges: words per minute, and pitch on espeak-ng's scale of 0 to 99

# ---------------------------------------------------------------------------------------------------
# Speech, and questions about it


def utterances() -> list[tuple[str, str, str, int, int]]:
    """Return (part, word, voice, speed, pitch) for each word in each voice; `part` is a key of VOICES."""
    random = np.random.default_rng(0)
    return [
        (part, word, f"{accent}+{speaker}", int(random.integers(*SPEEDS)), int(random.integers(*PITCHES)))
        for part, (accents, speakers) in VOICES.items()
        for accent in accents
        for speaker in speakers
        for word in WORDS
    ]


def make_speech() -> Path:
    """Return a folder with the sounds PART/WORD-VOICE-SPEED-PITCH.wav, and with sounds.json for train.py.

    The first call creates the folder; later calls reuse it. Raises ValueError if espeak-ng is missing or fails.
    """

    def make(folder: Path) -> None:
        if shutil.which("espeak-ng") is None:
            raise ValueError(
                "espeak-ng is not installed; run apt install espeak-ng, or give a folder of sounds with --speech"
            )
        for part, word, voice, speed, pitch in tqdm(utterances(), unit="word"):
            (folder / part).mkdir(exist_ok=True)
            file = folder / part / f"{word}-{voice}-{speed}-{pitch}.wav"
            command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(file), word]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode or not file.is_file():
                raise ValueError(f"espeak-ng did not write {file.name}; its error message is: {result.stderr.strip()}")
        questions = questions_about(wav_files(folder / "tuned"))
        records = [{"instruction": q.instruction, "output": q.output, "audio": f"tuned/{q.name}"} for q in questions]
        write_json(folder / "sounds.json", records)

    return cached_folder("toy-speech", [utterances(), QUESTIONS], make)


def wav_files(folder: Path) -> list[Path]:
    """Return the paths of the sounds in a folder. Raises ValueError if there are none."""
    files = sorted(folder.glob("*-*.wav"))
    if not files:
        raise ValueError(f"{folder}: contains no sounds; expected files named WORD-ANYTHING.wav")
    return files


def spoken_word(file: Path) -> str:
    """Return the spoken word, which is the first part of the sound file's name."""
    return file.name.split("-")[0]


def questions_about(files: Sequence[Path]) -> list[Example]:
    """Return two questions about every sound. The expected answers of both contain the spoken word."""
    questions = []
    for file in files:
        word = spoken_word(file)
        facts = {"word": word, "capital": capitalized(word), "number": "a number" if word in NUMBERS else "no number"}
        questions += [
            Example(question, "", answer.format(**facts), str(file), file.name)
            for question, answer in QUESTIONS.items()
        ]
    return questions


def write_clips(archive: Path, folder: Path) -> list[Path]:
    """Write WORD-clipI.wav to `folder` for each clip in an .npz archive. Return the paths of the files.

    The archive contains `waves` (N, samples), floats in [-1, 1] at 16 kHz, and their `words` (N,), strings. Raises
    OSError or ValueError if the archive cannot be read.
    """
    try:
        with np.load(archive, allow_pickle=False) as arrays:
            waves, words = arrays["waves"], arrays["words"]
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive}: is not an .npz archive with arrays `waves` and `words`: {error}") from None
    files = [folder / f"{word}-clip{i}.wav" for i, word in enumerate(words)]
    for samples, path in zip(waves, files):
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((32767 * samples.clip(-1, 1)).round().astype("<i2").tobytes())
    return files


def encode_sounds(speech: Path, clips: Path | None) -> dict[str, dict[str, list[Example]]]:
    """Return the questions with the features (F,) of their sounds, by encoder and part.

    The parts are "tuned" (the training voices), "held-out" and, if `clips` is given, "real clips". Raises OSError or
    ValueError if the sounds, the model or a required package are missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {part: wav_files(speech / part) for part in VOICES}
        if clips is not None:
            files["real clips"] = write_clips(clips, Path(folder))
        questions = {part: questions_about(found) for part, found in files.items()}
        encoded = {}
        for label, name in ENCODERS.items():
            encoder = FunctionEncoder(str(EXAMPLES / name))
            encoded[label] = {part: attach_features(examples, folder, encoder) for part, examples in questions.items()}
    return encoded


# ---------------------------------------------------------------------------------------------------
# Training and evaluation


def train_on_sounds(examples: list[Example], model: LLaMA, tokenizer: Tokenizer, config: TrainConfig) -> ImageAdapter:
    """Train an adapter for all layers on examples with features, using the training loop of train.py."""
    adapter = make_image_adapter(model, len(examples[0].features), config)
    tokens, _ = tokenize(AlpacaTemplate(tokenizer), examples, 512)
    for _ in finite_steps(Trainable(model, adapter, make_optimizer(adapter, WEIGHT_DECAY)), tokens, config):
        pass
    return adapter


def other_sounds(examples: Sequence[Example]) -> list[Tensor]:
    """Return the features (F,) of a random sound of a different word for each example."""
    random, words = np.random.default_rng(0), [spoken_word(Path(example.name)) for example in examples]
    others = [[i for i, other in enumerate(words) if other != word] for word in words]
    return [examples[random.choice(choice)].features for choice in others]


def evaluate_sounds(
    examples: Sequence[Example], model: LLaMA, tokenizer: Tokenizer, adapter: ImageAdapter
) -> dict[str, list[bool]]:
    """Return whether each question is answered exactly.

    The keys are "heard" (with the sound), "another" (with the sound of a different word) and "withheld" (no sound).
    """
    withheld = [Request(example.instruction, adapter="adapter") for example in examples]
    sounds = {"heard": [example.features for example in examples], "another": other_sounds(examples)}
    with_sounds = {
        name: [request._replace(features=row) for request, row in zip(withheld, features)]
        for name, features in sounds.items()
    }
    correct = {}
    for name, requests in (with_sounds | {"withheld": withheld}).items():
        answers = greedy_answers(model, tokenizer, adapter, requests)
        correct[name] = [text == example.output for text, example in zip(answers, examples)]
    return correct


def share_by_word(correct: Sequence[bool], examples: Sequence[Example]) -> dict[str, float]:
    """Return the share of correct examples for each word."""
    words = [spoken_word(Path(example.name)) for example in examples]
    return {
        word: statistics.mean(ok for ok, other in zip(correct, words) if other == word) for word in sorted(set(words))
    }


def label_matches(examples: Sequence[Example]) -> list[bool]:
    """Return whether the Keyword Transformer labels each example correctly.

    The correct label of a word that is not a keyword is "unknown". The features (F,) of the examples must be the 12
    scores of the Keyword Transformer. They are normalized, which does not change which of them is the largest.
    """
    labels = [LABELS[example.features.argmax()] for example in examples]
    words = [spoken_word(Path(example.name)) for example in examples]
    return [label == (word if word in LABELS else "unknown") for label, word in zip(labels, words)]


def train_and_evaluate(
    encoded: dict[str, dict[str, list[Example]]],
    model: LLaMA,
    tokenizer: Tokenizer,
    config: TrainConfig,
    encoder: str,
    seed: int,
) -> dict:
    """Train on the features of one encoder (a key of ENCODERS), and evaluate on all parts except the training voices.

    "PART: heard", "PART: withheld" and "PART: another" are the shares of questions that are answered exactly (see
    `evaluate_sounds`); "PART: words" contains the shares by word for the questions with their sounds.
    """
    adapter = train_on_sounds(encoded[encoder]["tuned"], model, tokenizer, replace(config, seed=seed))
    values: dict = {}
    for part, examples in encoded[encoder].items():
        if part != "tuned":
            correct = evaluate_sounds(examples, model, tokenizer, adapter)
            values |= {f"{part}: {name}": statistics.mean(found) for name, found in correct.items()}
            values[f"{part}: words"] = share_by_word(correct["heard"], examples)
    return values


# ---------------------------------------------------------------------------------------------------
# The command


@experiment(
    "sounds",
    option_group(
        "Sounds",
        option(
            "--model",
            type=PATH,
            required=True,
            envvar="KWT_MODEL",
            help="TFLite file of KWT-1; can also be set as $KWT_MODEL.",
        ),
        option(
            "--speech",
            type=PATH,
            help="Folder with tuned/WORD-*.wav, to train on, and held-out/WORD-*.wav.  [default: made by espeak-ng]",
        ),
        option(
            "--clips", type=PATH, help="Also evaluate on real recordings: an .npz archive with arrays waves and words."
        ),
    ),
    option_group(
        "Model",
        option("--base", type=PATH, help="Base model.  [default: the toy's]"),
        device_options[0],
    ),
    training_options(epochs=24, lr=toy.TRAINING["lr"]),
)
def sounds(runs: Runs, model, speech, clips, base, epochs, lr, device) -> None:
    """Train on sounds to recognize spoken words.

    A third-party Keyword Transformer encodes the sounds; a spectrum is the baseline. The sounds are words spoken by
    espeak-ng in training voices and in held-out voices, and real recordings if --clips is given.
    """
    os.environ["KWT_MODEL"] = str(model)  # read by docs/examples/keyword_transformer.py
    device, _ = select_device(device, "float32")
    start = time.perf_counter()
    encoded = encode_sounds(speech or make_speech(), clips)  # before the base is made, because files may be missing
    counts = {part: len(examples) // len(QUESTIONS) for part, examples in encoded[SCORES].items()}
    listed = ", ".join(f"{part} {count}" for part, count in counts.items())
    click.echo(f"sounds: {listed}; two questions about each")
    labels = {}
    for part, examples in encoded[SCORES].items():
        correct = label_matches(examples)
        labels[part] = {"all": statistics.mean(correct), "words": share_by_word(correct, examples)}
    shares = ", ".join(f"{part} {found['all']:.1%}" for part, found in labels.items())
    click.echo(f"accuracy of the Keyword Transformer's own labels: {shares}\n")
    llama, tokenizer = load_llama(base or toy_base(), device=device)
    config = TrainConfig(epochs=epochs, warmup_epochs=1, batch_size=32, lr=lr)
    parts = [part for part in counts if part != "tuned"]
    columns = [
        Column(f"{part}: {name}", f"{part}: {name}", spread=name == "heard")
        for part in parts
        for name in ("heard", "withheld", "another")
    ]
    click.echo("share of questions that are answered exactly:")
    settings = {encoder: encoder for encoder in ENCODERS}
    rows = runs.table(columns, settings, partial(train_and_evaluate, encoded, llama, tokenizer, config))
    minutes = (time.perf_counter() - start) / 60
    values = {"sounds": counts, "minutes": minutes, "labels": labels, "rows": rows}
    runs.save("sounds", values, draw_sounds(rows, parts))


def draw_sounds(rows: dict[str, dict[str, list]], parts: Sequence[str]) -> Figure:
    """Plot the exact-match accuracy with the correct sound: one panel per part, one bar per encoder."""
    figure = Figure(figsize=(5 * len(parts), 2.2), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), sharey=True, squeeze=False)[0], parts):
        draw_bars(axes, {label: percent(row[f"{part}: heard"]) for label, row in rows.items()}, f"{part}: heard, %")
        axes.set_xlim(0, 100)
    return figure
