"""A small RoBERTa that is pre-trained here, for want of a trained one: masked-language modelling of any text."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.models import Roberta, RobertaConfig
from formats.encoders import save_roberta
from formats.roberta_tokenizer import RobertaTokenizer
from runtime.files import read_text, write_text
from toy.cache import cached_folder
from toy.pretraining import pretrain
from train import learning_rate

SMALL = RobertaConfig(vocab_size=50265, max_positions=130, dim=128, n_layers=4, n_heads=4, hidden_dim=512)
MASK = 50264  # RoBERTa's <mask>
ROW, ROWS, STEPS = 64, 32, 1000  # tokens in a row, rows in a step
SCHEDULE = {"peak": 1e-3, "warmup": 100}
OPTIMIZER = {"betas": (0.9, 0.98), "weight_decay": 0.01, "clip": 1.0}
TOKENIZER_FILES = ("merges.txt", "vocab.json", "vocab.bpe", "encoder.json", "dict.txt")  # those of them that are there


def make_roberta(paths: Sequence[Path], tokenizer: Path) -> Path:
    """The folder of a small RoBERTa that has read these texts, with its tokenizer; made at the first call.

    Raises OSError or ValueError.
    """
    texts = [read_text(path) for path in paths]
    files = {name: read_text(tokenizer / name) for name in TOKENIZER_FILES if (tokenizer / name).exists()}

    def make(folder: Path) -> None:
        rows = masked_rows(texts, RobertaTokenizer(tokenizer))
        for name, text in files.items():
            write_text(folder / name, text)
        save_roberta(pretrain_roberta(rows), folder)

    numbers = [asdict(SMALL), ROW, ROWS, STEPS, SCHEDULE, OPTIMIZER]
    return cached_folder("toy-roberta", [*numbers, texts, files], make)


def masked_rows(texts: Sequence[str], tokenizer: RobertaTokenizer) -> Tensor:
    """Text cut into rows (number, ROW), each from <s> to </s>. Raises ValueError where it fills none."""
    ids = [id for text in texts for id in tokenizer.encode(text)]
    number = len(ids) // (ROW - 2)
    if not number:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than a row of {ROW - 2}")
    rows = torch.tensor(ids[: number * (ROW - 2)]).view(number, -1)
    edge = torch.ones(number, 1, dtype=torch.long)
    return torch.cat([tokenizer.bos_id * edge, rows, tokenizer.eos_id * edge], dim=1)


def pretrain_roberta(rows: Tensor, steps: int = STEPS, config: RobertaConfig = SMALL) -> Roberta:
    """Masked-language modelling of rows (number, ROW), with a head that is thrown away."""
    torch.manual_seed(0)
    model = Roberta(config)
    for embedding in (model.words, model.positions, model.types):
        nn.init.normal_(embedding.weight, std=0.02)
    dense, norm = nn.Linear(config.dim, config.dim), nn.LayerNorm(config.dim)
    bias = nn.Parameter(torch.zeros(config.vocab_size))

    def losses() -> Iterator[Tensor]:
        random = torch.Generator().manual_seed(0)
        for _ in range(steps):
            ids = rows[torch.randint(len(rows), (ROWS,), generator=random)]  # (B, T)
            shown, masked = mask_words(ids, random)
            hidden = norm(F.gelu(dense(model.encode(shown)[masked])))  # (R, C)
            yield F.cross_entropy(hidden @ model.words.weight.T + bias, ids[masked])

    parameters = [*model.parameters(), *dense.parameters(), *norm.parameters(), bias]
    schedule = partial(learning_rate, total=steps, **SCHEDULE)
    pretrain(parameters, losses(), schedule, steps=steps, desc="pre-training RoBERTa", **OPTIMIZER)
    return model


def mask_words(ids: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the model is shown of ids (B, T), and which of them it is asked.

    15 % of the words are asked: eight of ten of them masked, one as it was, one another.
    """
    masked = (torch.rand(ids.shape, generator=random) < 0.15) & (ids > 3)
    lot = torch.rand(ids.shape, generator=random)
    shown = ids.masked_fill(masked & (lot < 0.8), MASK)
    other = torch.randint(4, MASK, ids.shape, generator=random)
    return torch.where(masked & (lot >= 0.9), other, shown), masked
