"""Sounds in the prompts: which word is spoken, heard by another's Keyword Transformer (docs/examples).

espeak-ng speaks the words, in voices to train on and in others that are held out. The questions are put with the sound,
without it, and with a sound of another word; to be right without hearing is to guess one word of 14.
"""

import os
import shutil
import statistics
import subprocess
import tempfile
import time
import wave
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
from toy.almanac import capitalised
from toy.exam import greedy_answers
from train import TrainConfig, make_optimizer

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SCORES = "its 12 scores"
ENCODERS = {
    "four class tokens": "keyword_transformer.py:class_tokens",
    SCORES: "keyword_transformer.py:label_scores",
    "no model: a spectrum": "spectrum.py:rows",
}

KEYWORDS = ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]  # that the Keyword Transformer tells
WORDS = KEYWORDS + ["visual", "eight", "dog", "one"]  # these four are all "unknown" to it
LABELS = ["silence", "unknown", *KEYWORDS]  # in the order of its scores
NUMBERS = {"one", "eight"}
QUESTIONS = {"Which word do you hear?": "I hear the word {word}.", "Is it a number?": "{capital} is {number}."}

# espeak-ng's accents and speakers. Of the held-out voices neither the one nor the other is trained on.
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
SPEEDS, PITCHES = (120, 180), (30, 70)  # words a minute; of 0 to 99

# ---------------------------------------------------------------------------------------------------
# Speech, and questions about it


def utterances() -> list[tuple[str, str, str, int, int]]:
    """Part, word, voice, speed and pitch of all that is spoken: every word in every voice."""
    random = np.random.default_rng(0)
    return [
        (part, word, f"{accent}+{speaker}", int(random.integers(*SPEEDS)), int(random.integers(*PITCHES)))
        for part, (accents, speakers) in VOICES.items()
        for accent in accents
        for speaker in speakers
        for word in WORDS
    ]


def make_speech() -> Path:
    """The folder of PART/WORD-VOICE-SPEED-PITCH.wav, and sounds.json for train.py; made at the first call.

    Raises ValueError where espeak-ng is missing, or fails.
    """

    def make(folder: Path) -> None:
        if shutil.which("espeak-ng") is None:
            raise ValueError("the words are spoken by espeak-ng: apt install espeak-ng; or name a folder with --speech")
        for part, word, voice, speed, pitch in tqdm(utterances(), unit="word"):
            (folder / part).mkdir(exist_ok=True)
            file = folder / part / f"{word}-{voice}-{speed}-{pitch}.wav"
            command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(file), word]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode or not file.is_file():
                raise ValueError(f"espeak-ng failed at {file.name}: {result.stderr.strip()}")
        asked = questions_about(wav_files(folder / "tuned"))
        records = [{"instruction": q.instruction, "output": q.output, "audio": f"tuned/{q.name}"} for q in asked]
        write_json(folder / "sounds.json", records)

    return cached_folder("toy-speech", [utterances(), QUESTIONS], make)


def wav_files(folder: Path) -> list[Path]:
    """Raises ValueError where the folder has none."""
    files = sorted(folder.glob("*-*.wav"))
    if not files:
        raise ValueError(f"{folder}: has no sounds named WORD-ANYTHING.wav")
    return files


def spoken(file: Path) -> str:
    """The word that its name begins with."""
    return file.name.split("-")[0]


def questions_about(files: Sequence[Path]) -> list[Example]:
    """Two about every sound; both answers name the word."""
    asked = []
    for file in files:
        word = spoken(file)
        facts = {"word": word, "capital": capitalised(word), "number": "a number" if word in NUMBERS else "no number"}
        asked += [
            Example(question, "", answer.format(**facts), str(file), file.name)
            for question, answer in QUESTIONS.items()
        ]
    return asked


def write_clips(archive: Path, folder: Path) -> list[Path]:
    """A WAV for each of the `waves` (N, samples) in an .npz, in [-1, 1] at 16 kHz; beside them are their `words` (N,).

    Raises OSError or ValueError.
    """
    try:
        with np.load(archive, allow_pickle=False) as arrays:
            waves, words = arrays["waves"], arrays["words"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{archive}: is no archive of `waves` and `words`: {error}") from None
    files = [folder / f"{word}-clip{i}.wav" for i, word in enumerate(words)]
    for samples, path in zip(waves, files):
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((32767 * samples.clip(-1, 1)).round().astype("<i2").tobytes())
    return files


def encode_sounds(speech: Path, clips: Path | None) -> dict[str, dict[str, list[Example]]]:
    """The questions with the features (F,) of their sounds, by encoder, and by part: tuned, held-out, real clips.

    Raises OSError or ValueError where sounds, the model or a package is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {part: wav_files(speech / part) for part in VOICES}
        if clips is not None:
            files["real clips"] = write_clips(clips, Path(folder))
        asked = {part: questions_about(found) for part, found in files.items()}
        heard = {}
        for label, name in ENCODERS.items():
            encoder = FunctionEncoder(str(EXAMPLES / name))
            heard[label] = {part: attach_features(examples, folder, encoder) for part, examples in asked.items()}
    return heard


# ---------------------------------------------------------------------------------------------------
# Training, and the exam


def train_on_sounds(examples: list[Example], model: LLaMA, tokenizer: Tokenizer, config: TrainConfig) -> ImageAdapter:
    """An adapter of all layers, trained by train.py's loop on examples that have features."""
    adapter = make_image_adapter(model, len(examples[0].features), config)
    tokens, _ = tokenize(AlpacaTemplate(tokenizer), examples, 512)
    for _ in finite_steps(Trainable(model, adapter, make_optimizer(adapter, WEIGHT_DECAY)), tokens, config):
        pass
    return adapter


def other_sounds(examples: Sequence[Example]) -> list[Tensor]:
    """For each example the features (F,) of a sound with another word."""
    random, words = np.random.default_rng(0), [spoken(Path(example.name)) for example in examples]
    others = [[i for i, other in enumerate(words) if other != word] for word in words]
    return [examples[random.choice(choice)].features for choice in others]


def evaluate_sounds(
    examples: Sequence[Example], model: LLaMA, tokenizer: Tokenizer, adapter: ImageAdapter
) -> dict[str, list[bool]]:
    """Which questions are answered exactly: the sound heard, withheld, and a sound of another word in its place."""
    withheld = [Request(example.instruction, adapter="adapter") for example in examples]
    sounds = {"heard": [example.features for example in examples], "another": other_sounds(examples)}
    asked = {
        name: [request._replace(features=one) for request, one in zip(withheld, features)]
        for name, features in sounds.items()
    }
    right = {}
    for name, requests in (asked | {"withheld": withheld}).items():
        answers = greedy_answers(model, tokenizer, adapter, requests)
        right[name] = [text == example.output for text, example in zip(answers, examples)]
    return right


def share_by_word(right: Sequence[bool], examples: Sequence[Example]) -> dict[str, float]:
    """Of each word's questions those answered exactly."""
    words = [spoken(Path(example.name)) for example in examples]
    return {
        word: statistics.mean(one for one, other in zip(right, words) if other == word) for word in sorted(set(words))
    }


def label_matches(examples: Sequence[Example]) -> list[bool]:
    """Return True where the model's own most likely label is the word, or "unknown" for a word that has no label.

    The features are its scores (F,), normed, which leaves the largest the largest.
    """
    heard = [LABELS[example.features.argmax()] for example in examples]
    words = [spoken(Path(example.name)) for example in examples]
    return [label == (word if word in LABELS else "unknown") for label, word in zip(heard, words)]


def train_and_evaluate(
    heard: dict[str, dict[str, list[Example]]],
    model: LLaMA,
    tokenizer: Tokenizer,
    config: TrainConfig,
    encoder: str,
    seed: int,
) -> dict:
    """Train with the sounds as a key of ENCODERS hears them.

    Returns the shares of questions that are answered exactly, "PART: heard", "withheld" and "another" for every part
    but the one trained on, and of the heard also those of each word.
    """
    adapter = train_on_sounds(heard[encoder]["tuned"], model, tokenizer, replace(config, seed=seed))
    values: dict = {}
    for part, examples in heard[encoder].items():
        if part != "tuned":
            right = evaluate_sounds(examples, model, tokenizer, adapter)
            values |= {f"{part}: {name}": statistics.mean(found) for name, found in right.items()}
            values[f"{part}: words"] = share_by_word(right["heard"], examples)
    return values


# ---------------------------------------------------------------------------------------------------
# The command


@experiment(
    "sounds",
    option_group(
        "Sounds",
        option("--model", type=PATH, required=True, envvar="KWT_MODEL", help="KWT-1, a .tflite; or $KWT_MODEL."),
        option("--speech", type=PATH, help="Folders tuned, held-out of WORD-ANY.wav.  [default: espeak-ng's]"),
        option("--clips", type=PATH, help="Real sounds to ask about too: an .npz of waves and words."),
    ),
    option_group(
        "Model",
        option("--base", type=PATH, help="The base model.  [default: the toy's]"),
        device_options[0],
    ),
    training_options(epochs=24, lr=toy.TRAINING["lr"]),
)
def sounds(runs: Runs, model, speech, clips, base, epochs, lr, device) -> None:
    """Ask which word a sound is.

    An adapter hears through a third-party Keyword Transformer: words by espeak-ng, in held-out voices, and real ones.
    """
    os.environ["KWT_MODEL"] = str(model)  # which docs/examples/keyword_transformer.py reads
    device, _ = select_device(device, "float32")
    start = time.perf_counter()
    heard = encode_sounds(speech or make_speech(), clips)  # before a base is made: something may be missing
    counts = {part: len(examples) // len(QUESTIONS) for part, examples in heard[SCORES].items()}
    click.echo(", ".join(f"{count} sounds {part}" for part, count in counts.items()) + ", two questions each")
    labels = {}
    for part, examples in heard[SCORES].items():
        right = label_matches(examples)
        labels[part] = {"all": statistics.mean(right), "words": share_by_word(right, examples)}
    shares = ", ".join(f"{part} {found['all']:.1%}" for part, found in labels.items())
    click.echo(f"its own most likely label is right: {shares}\n")
    llama, tokenizer = load_llama(base or toy_base(), device=device)
    config = TrainConfig(epochs=epochs, warmup_epochs=1, batch_size=32, lr=lr)
    parts = [part for part in counts if part != "tuned"]
    columns = [
        Column(f"{part}: {name}", f"{part}: {name}", spread=name == "heard")
        for part in parts
        for name in ("heard", "withheld", "another")
    ]
    click.echo("answered exactly:")
    settings = {encoder: encoder for encoder in ENCODERS}
    rows = runs.table(columns, settings, partial(train_and_evaluate, heard, llama, tokenizer, config))
    minutes = (time.perf_counter() - start) / 60
    values = {"sounds": counts, "minutes": minutes, "labels": labels, "rows": rows}
    runs.save("sounds", values, draw_sounds(rows, parts))


def draw_sounds(rows: dict[str, dict[str, list]], parts: Sequence[str]) -> Figure:
    """What is answered exactly when heard, a panel for held-out voices and one for real clips."""
    figure = Figure(figsize=(5 * len(parts), 2.2), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), sharey=True, squeeze=False)[0], parts):
        draw_bars(axes, {label: percent(row[f"{part}: heard"]) for label, row in rows.items()}, f"{part}: heard, %")
        axes.set_xlim(0, 100)
    return figure
