"""The embedded default with images: handwritten digits, a small vision tower that knows them, questions about them.

The tower is trained here to tell digits apart, and then frozen, as CLIP's would be. The questions need both: what the
tower sees, and what toy.py's LLaMA has read of numbers. Nobody ever showed that LLaMA a picture, or told it what an
instruction is; prompts, gates and a projection have to learn both.
"""

import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from toy import almanac as toy
from data import Example
from formats.encoders import save_vit
from encoders.models import ViT, ViTConfig
from multimodal import open_image, preprocess

# What train.py takes for its options on this data, where the user says nothing.
TUNING = {"layers": 4, "epochs": 12, "warmup_epochs": 1, "batch_size": 32, "lr": 0.05}

TOWER = ViTConfig(image_size=16, patch_size=4, dim=64, n_layers=4, n_heads=4, hidden_dim=128)
BATCH, EPOCHS, PEAK_LR, WARMUP = 64, 30, 3e-3, 50
TUNED_ON, HELD_OUT = 400, 200  # pictures; the tower learns from all that are not held out

ANSWERS = {
    "Which digit is this?": "This is {e}.",
    "Is it even?": "{e} is {parity}.",
    "Name the number after it.": "The number after {e} is {after}.",
}


def make() -> Path:
    """The folder of the pictures, DIGIT-NUMBER.png, and of the tower, in Hugging Face's layout; made at the first call.

    Its name carries a hash of this file, so that another recipe makes another tower. Raises ValueError where
    scikit-learn, whose digits these are, is missing.
    """
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    folder = Path(__file__).parent / f"toy-digits-{recipe}"
    if not (folder / "tower" / "config.json").exists():
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError("the handwritten digits are scikit-learn's: pip install scikit-learn") from None
        digits = load_digits()
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        for i, (ink, digit) in enumerate(zip(digits.images, digits.target)):  # 8 x 8, 0 to 16
            paper = np.round(255 * (1 - ink / 16)).astype(np.uint8)
            Image.fromarray(paper).save(folder / "pictures" / f"{digit}-{i:04}.png")
        save_vit(train_tower(folder), folder / "tower")
    return folder


def pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """To learn from, and held out."""
    files = sorted((folder / "pictures").iterdir(), key=lambda file: file.stem[2:])
    order = np.random.default_rng(0).permutation(len(files))
    return [files[i] for i in order[HELD_OUT:]], [files[i] for i in order[:HELD_OUT]]


def train_tower(folder: Path) -> ViT:
    """A vision transformer and a linear head, which is thrown away, learn to tell digits apart."""
    files, _ = pictures(folder)
    images = torch.stack([preprocess(open_image(file), TOWER.image_size) for file in files])  # (B, 3, S, S)
    labels = torch.tensor([int(file.name[0]) for file in files])
    pixel, steps = TOWER.image_size // 8, EPOCHS * math.ceil(len(files) / BATCH)
    torch.manual_seed(0)
    tower, head = ViT(TOWER), nn.Linear(TOWER.dim, 10)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], weight_decay=0.05, fused=True)
    batches = (batch for _ in range(EPOCHS) for batch in torch.randperm(len(files)).split(BATCH))
    for step, batch in enumerate(tqdm(batches, total=steps, desc="training the tower", unit="step", file=sys.stderr)):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(step / WARMUP, (1 + math.cos(math.pi * step / steps)) / 2)
        # by up to a pixel, for 1,597 pictures are few
        moved = torch.roll(images[batch], tuple((pixel * torch.randint(-1, 2, (2,))).tolist()), dims=(2, 3))
        loss = F.cross_entropy(head(tower.norm(tower(moved)[-1][:, 0])), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tower


def questions(files: list[Path]) -> list[toy.Question]:
    """All three about every picture; each answer names the digit, so that chance is a tenth."""
    kinds = toy.kinds()
    asked = []
    for file in files:
        digit = toy.NUMBERS[int(file.name[0])]
        facts = {"e": digit, "parity": kinds["parity"].facts[digit], "after": kinds["after"].facts[digit]}
        for instruction, answer in ANSWERS.items():
            output = toy.capitalised(answer.format(**facts))
            example = Example(instruction, "", output, f"pictures/{file.name}", file.name)
            asked.append(toy.Question(example, instruction, file.name, digit))
    return asked


def tuning(folder: Path) -> list[Example]:
    """About pictures, and toy.py's text instructions."""
    files, _ = pictures(folder)
    return [q.example for q in questions(files[:TUNED_ON]) + toy.instructions()["tuning"]]
