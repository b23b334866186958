"""A tiny LLaMA that knows the almanac by heart, and its tokenizer."""

import io
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from data import ALPACA, Tokenizer
from formats.meta import meta_config
from formats.tokenizers import SentencePieceTokenizer
from model import LLaMA
from runtime.compilation import transpose_output_head
from runtime.files import atomic_write, write_json
from toy.almanac import documents
from toy.cache import cached_folder
from toy.pretraining import one_thread, pretrain, warmup_cosine

PARAMS = {"dim": 128, "n_layers": 4, "n_heads": 4, "multiple_of": 8, "norm_eps": 1e-5, "vocab_size": -1}  # params.json
TOKENIZER = {  # LLaMA's settings
    "model_type": "bpe",
    "vocab_size": 1024,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
ROW, ROWS, TOKENS = 128, 4, 1_500_000  # tokens in a row, rows in a step, tokens in all
SCHEDULE = {"peak": 6e-3, "warmup": 100, "floor": 0.1}
OPTIMIZER = {"betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 1.0}


def make_base(seed: int = 0, n_layers: int = PARAMS["n_layers"]) -> Path:
    """The folder of the pre-trained base, in Meta's layout; made at the first call, in about three minutes."""
    params = PARAMS | {"n_layers": n_layers}

    def make(folder: Path) -> None:
        tokenizer = train_tokenizer(folder / "tokenizer.model", seed)
        write_json(folder / "params.json", params)
        model = pretrain_base(tokenizer, seed, TOKENS, params, kept=folder / "pretraining.pt")
        with atomic_write(folder / "consolidated.00.pth") as temporary:
            torch.save(model.state_dict(), temporary)
        (folder / "pretraining.pt").unlink(missing_ok=True)

    numbers = [params, TOKENIZER, ROW, ROWS, TOKENS, SCHEDULE, OPTIMIZER, seed, "one thread"]
    return cached_folder("toy-base", [*numbers, list(tokenizer_text(seed))], make)


def tokenizer_text(seed: int) -> Iterator[str]:
    """Lines of what the base will read, and of the template, so that prompts are short."""
    for document in islice(documents(seed), 4000):
        yield from document.splitlines()
    yield from [line for template in ALPACA.values() for line in template.splitlines()] * 500


def train_tokenizer(path: Path, seed: int) -> Tokenizer:
    """A SentencePiece model, written to `path`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_text(seed), model_writer=model, minloglevel=2, **TOKENIZER
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


@one_thread()
def pretrain_base(
    tokenizer: Tokenizer, seed: int, tokens: int, params: dict = PARAMS, kept: Path | None = None
) -> LLaMA:
    """Plain next-token training on rows cut from a stream of documents; `kept` as for `pretrain`."""
    source, stream = documents(seed), []
    while len(stream) <= tokens:
        stream += [*tokenizer.start_ids, *tokenizer.encode(next(source)), tokenizer.eos_id]
    steps = tokens // (ROW * ROWS)
    batches = torch.tensor(stream[: steps * ROWS * ROW]).view(steps, ROWS, ROW)

    torch.manual_seed(seed)
    model = LLaMA(meta_config(params, tokenizer.vocab_size))
    transpose_output_head(model.output)

    def loss_of(step: int) -> Tensor:
        rows = batches[step]
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    options = {"steps": steps, "desc": "pre-training the toy base", "kept": kept} | OPTIMIZER
    pretrain(model.parameters(), loss_of, partial(warmup_cosine, total=steps, **SCHEDULE), **options)
    return model
