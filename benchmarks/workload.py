"""What is run: the shape of a model, random weights for it, and examples whose lengths are real."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from cloup import option, option_group

from adapter import Adapter
from benchmarks.measuring import json_option
from benchmarks.peers import Variant
from benchmarks.sizes import SIZES
from data import AlpacaTemplate, Example, Tokenizer, TokenizedExample, read_examples, tokenize
from formats.bases import load_llama, read_base
from formats.tokenizers import SentencePieceTokenizer, load_tokenizer
from model import Config, LLaMA
from runtime.cli import PATH, Count, device_options
from runtime.compilation import prepare_to_compile, transpose_output_head
from runtime.device import select_device
from toy.almanac import instructions
from toy.language_model import BASE

CONFIGS = {
    #            dim layers heads kv D hidden vocab
    "15M": Config(288, 6, 6, 6, 48, 768, 32000),  # of llama2.c's stories15M, with a head of its own: 24M in all
    "110M": Config(768, 12, 12, 12, 64, 2048, 32000),
    "1.1B": SIZES["TinyLlama-1.1B"],
    "7B": SIZES["LLaMA-7B"],
}
LENGTH = 10  # K


@dataclass(frozen=True)
class Workload:
    """What contestants are timed on, and which there are: the options that the commands have in common."""

    size: str  # a key of CONFIGS
    base: Path | None  # a real base in its place
    data: str | None  # an Alpaca file, and the SentencePiece model to cut it with; None is the toy's
    tokenizer: str | None
    repeat: int  # rounds
    peers: bool  # others too
    compiled: bool  # ours under torch.compile too
    precisions: bool  # ours in other dtypes and in few bits too
    device: torch.device
    dtype: torch.dtype  # of the base

    @property
    def name(self) -> str:
        return self.base.stem if self.base else self.size

    def new_model(self) -> LLaMA:
        if self.base:
            return load_llama(self.base, self.dtype, self.device)[0]
        return random_model(CONFIGS[self.size], self.device, self.dtype)

    def new_adapter(self) -> Adapter:
        config = read_base(self.base)[0] if self.base else CONFIGS[self.size]
        return random_adapter(config, self.device)

    def read(self, number: int) -> tuple[list[Example], Tokenizer]:
        """So many, evenly spread over the file, and what cuts them. Raises OSError or ValueError."""
        if self.data is None:
            examples = [question.example for question in instructions()["training"]]
            tokenizer = load_tokenizer(self.base or BASE)
        elif self.base:
            examples, tokenizer = read_examples(self.data), load_tokenizer(self.base)
        elif self.tokenizer is None:
            raise ValueError(f"--data {self.data} needs --tokenizer FILE")
        else:
            examples, tokenizer = read_examples(self.data), SentencePieceTokenizer(self.tokenizer)
        return examples[:: max(1, len(examples) // number)][:number], tokenizer

    def examples(self, number: int) -> list[TokenizedExample]:
        """The same as ids. Raises OSError or ValueError."""
        examples, tokenizer = self.read(number)
        return tokenize(AlpacaTemplate(tokenizer), examples, 512)[0]


compile_option = option("--compile", "compiled", is_flag=True, help="Ours under torch.compile too.")
precisions_option = option("--precisions", is_flag=True, help="Ours in float32, bfloat16, 8 and 4 bits too.")


def precisions(workload: Workload, variant: Variant) -> dict[str, Variant]:
    """Return variants of ours in the other dtype, in 8 and in 4 bits, if the workload asks for them."""
    if not workload.precisions:
        return {}
    other = torch.float32 if workload.dtype == torch.bfloat16 else torch.bfloat16
    return {
        f"ours, {str(other)[6:]}": variant._replace(dtype=other),
        "ours, 8 bits": variant._replace(bits="8"),
        "ours, 4 bits": variant._replace(bits="4"),
    }


def workload_options(*of_command):
    """Those that `prepare_workload` makes sense of, and the command's own; a decorator."""
    return option_group(
        "Options",
        option(
            "--size", type=click.Choice(list(CONFIGS)), default="15M", help="Shape of the model, with random weights."
        ),
        option("--base", type=PATH, help="A base of real weights, in place of --size's."),
        *device_options,
        option("--data", type=click.Path(), help="Whose lengths to take.  [default: the almanac's]"),
        option("--tokenizer", type=click.Path(), help="A SentencePiece model, for --data."),
        option("--repeat", type=Count(), default=5, help="Rounds; the contestants take turns."),
        option("--peers", is_flag=True, help="The others too, as far as they are installed."),
        *of_command,
        json_option,
    )


def prepare_workload(device: str, dtype: str, compiled: bool = False, precisions: bool = False, **options) -> Workload:
    """As the options say. Raises ValueError."""
    device, dtype = select_device(device, dtype)
    if compiled:
        prepare_to_compile(device)
    return Workload(device=device, dtype=dtype, compiled=compiled, precisions=precisions, **options)


def random_model(config: Config, device: torch.device, dtype: torch.dtype) -> LLaMA:
    """Frozen, with weights of which only the size matters, made where they are to be, laid out as `load_llama` does."""
    with torch.device("meta"):
        model = LLaMA(config)
    if device.type == "cpu" and dtype == torch.float32:
        transpose_output_head(model.output)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        weight.fill_(1) if "norm" in name else weight.normal_(0, 0.02, generator=generator)
    return model


def random_examples(config: Config, lengths: Sequence[int]) -> list[TokenizedExample]:
    """Of so many tokens each, half of them response."""
    generator = torch.Generator().manual_seed(0)
    return [
        TokenizedExample(
            torch.randint(3, config.vocab_size, (length,), generator=generator).tolist(),
            [position >= length // 2 for position in range(length)],
            f"row {i}",
        )
        for i, length in enumerate(lengths)
    ]


def random_adapter(config: Config, device: torch.device, layers: int | None = None) -> Adapter:
    """Of all layers but two, unless `layers` says how many."""
    return Adapter(
        layers=layers or max(1, config.n_layers - 2),
        length=LENGTH,
        dim=config.dim,
        heads=config.n_heads,
        generator=torch.Generator().manual_seed(0),
    ).to(device)
