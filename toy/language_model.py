"""A tiny LLaMA and its tokenizer, both trained on the almanac."""

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
from formats.hugging_face import config_values, to_hugging_face
from formats.tokenizers import SentencePieceTokenizer
from model import Config, LLaMA
from runtime.compilation import transpose_output_head
from runtime.files import atomic_write, write_json, write_tensors
from toy.almanac import documents
from toy.pretraining import one_thread, pretrain, warmup_cosine

BASE = Path(__file__).with_name("base")  # part of the repository, made by `python -m toy`

N_LAYERS = 4
TOKENIZER = {  # LLaMA's settings, except for the smaller vocabulary
    "model_type": "bpe",
    "vocab_size": 1024,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
ROW, ROWS, TOKENS = 128, 4, 1_500_000  # tokens per row, rows per step, tokens in total
SCHEDULE = {"peak": 6e-3, "warmup": 100, "floor": 0.1}
OPTIMIZER = {"betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 1.0}


def make_base(folder: Path, seed: int = 0, n_layers: int = N_LAYERS) -> list[float]:
    """Pretrain a base, write it to a folder in Hugging Face's layout, and return the losses.

    This takes about four minutes on one core.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(folder / "tokenizer.model", seed)
    model, losses = pretrain_base(tokenizer, seed, n_layers)
    config = model.config
    tensors = {name: tensor.contiguous() for name, tensor in to_hugging_face(model.state_dict(), config).items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | config_values(config)
    values |= {
        "rope_theta": config.rope_theta,
        "bos_token_id": tokenizer.start_ids[0],
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", values, indent=2)
    return losses


def tokenizer_text(seed: int) -> Iterator[str]:
    """Yield lines of the pretraining text and of Alpaca's template, so that the template needs few tokens."""
    for document in islice(documents(seed), 4000):
        yield from document.splitlines()
    yield from [line for template in ALPACA.values() for line in template.splitlines()] * 500


def train_tokenizer(path: Path, seed: int) -> Tokenizer:
    """Train a SentencePiece model, write it to `path`, and load it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_text(seed), model_writer=model, minloglevel=2, **TOKENIZER
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


@one_thread()
def pretrain_base(
    tokenizer: Tokenizer, seed: int = 0, n_layers: int = N_LAYERS, stop_after: int | None = None
) -> tuple[LLaMA, list[float]]:
    """Pretrain a LLaMA to predict the next token of the documents; return the model and the losses.

    `stop_after` ends training after this many steps, with the learning rates of the whole schedule.
    """
    steps = TOKENS // (ROW * ROWS)
    needed = ROW * ROWS * (stop_after or steps)
    source, stream = documents(seed), []
    while len(stream) <= needed:
        stream += [*tokenizer.start_ids, *tokenizer.encode(next(source)), tokenizer.eos_id]
    batches = torch.tensor(stream[:needed]).view(-1, ROWS, ROW)

    torch.manual_seed(seed)
    model = LLaMA(Config(128, n_layers, 4, 4, 32, 344, tokenizer.vocab_size))
    transpose_output_head(model.output)

    def loss_fn(step: int) -> Tensor:
        rows = batches[step]
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    options = {"steps": len(batches), "desc": "pretraining the toy's base"} | OPTIMIZER
    losses = pretrain(model.parameters(), loss_fn, partial(warmup_cosine, total=steps, **SCHEDULE), **options)
    return model, losses
