"""Handwritten digits, a small vision encoder that classifies them, and questions about them.

The vision encoder is trained here and then frozen, like CLIP's. To answer a question, the model has to combine the
features of the picture with what the almanac's LLaMA knows about numbers. That LLaMA was pretrained without pictures
and without instructions: prompts, gates and projection have to learn to use both.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data import Example
from encoders.media import open_image, preprocess
from encoders.models import ViT, ViTConfig
from toy.almanac import KINDS, NUMBERS, ExamQuestion, capitalized
from toy.pretraining import one_thread, pretrain, warmup_cosine

ENCODER = Path(__file__).with_name("vision_encoder")  # part of the repository, made by `python -m toy`
CONFIG = ViTConfig(image_size=16, patch_size=4, dim=64, n_layers=4, n_heads=4, hidden_dim=128)
BATCH, EPOCHS = 64, 30
SCHEDULE = {"peak": 3e-3, "warmup": 50}
OPTIMIZER = {"betas": (0.9, 0.999), "weight_decay": 0.05}
TRAINED_ON, HELD_OUT = (
    400,
    200,
)  # numbers of pictures: to train the adapter, and held out; the vision encoder is trained on all that are not held out

ANSWERS = {
    "Which digit is this?": "This is {e}.",
    "Is it even?": "{e} is {parity}.",
    "Name the number after it.": "The number after {e} is {after}.",
}


def write_pictures(folder: Path) -> None:
    """Write scikit-learn's digits as pictures/DIGIT-NUMBER.png into the folder.

    Raises ValueError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the handwritten digits need a package that is not installed: pip install scikit-learn"
        ) from None
    digits = load_digits()
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i, (ink, digit) in enumerate(zip(digits.images, digits.target)):  # ink is (8, 8), from 0 to 16
        paper = np.round(255 * (1 - ink / 16)).astype(np.uint8)
        Image.fromarray(paper).save(folder / "pictures" / f"{digit}-{i:04}.png")


def pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the paths of the pictures for training, and of the held-out ones, both in a fixed random order."""
    files = sorted((folder / "pictures").iterdir(), key=lambda file: file.stem[2:])
    order = np.random.default_rng(0).permutation(len(files))
    return [files[i] for i in order[HELD_OUT:]], [files[i] for i in order[:HELD_OUT]]


@one_thread()
def train_vision_encoder(folder: Path) -> ViT:
    """Train a vision transformer to classify the folder's pictures for training; its linear head is discarded."""
    files, _ = pictures(folder)
    images = torch.stack([preprocess(open_image(file), CONFIG) for file in files])  # (B, 3, S, S)
    labels = torch.tensor([int(file.name[0]) for file in files])
    pixel, steps = CONFIG.image_size // 8, EPOCHS * math.ceil(len(files) / BATCH)
    torch.manual_seed(0)
    vision_encoder, head = ViT(CONFIG), nn.Linear(CONFIG.dim, 10)

    def losses() -> Iterator[Tensor]:
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(files)).split(BATCH):
                # Shift the batch by up to one pixel of the 8 x 8, because 1,597 pictures are few.
                shift = tuple((pixel * torch.randint(-1, 2, (2,))).tolist())
                states = vision_encoder(torch.roll(images[batch], shift, dims=(2, 3)))[-1]  # (B, T, Cv)
                yield F.cross_entropy(head(vision_encoder.norm(states[:, 0])), labels[batch])

    learning_rate, loss_iterator = partial(warmup_cosine, total=steps, **SCHEDULE), losses()
    parameters = [*vision_encoder.parameters(), *head.parameters()]
    options = {"steps": steps, "desc": "training the vision encoder"} | OPTIMIZER
    pretrain(parameters, lambda step: next(loss_iterator), learning_rate, **options)
    return vision_encoder


def questions(files: list[Path]) -> list[ExamQuestion]:
    """Return three questions about each picture. Every answer names the digit, so about 10 % of guesses are right."""
    result = []
    for file in files:
        digit = NUMBERS[int(file.name[0])]
        facts = {"e": digit, "parity": KINDS["parity"].facts[digit], "after": KINDS["after"].facts[digit]}
        for instruction, answer in ANSWERS.items():
            output = capitalized(answer.format(**facts))
            example = Example(instruction, "", output, f"pictures/{file.name}", file.name)
            result.append(ExamQuestion(example, instruction, file.name, digit))
    return result
