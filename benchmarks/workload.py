"""Workloads of the benchmarks: model configurations, random weights, and examples with realistic lengths."""

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
    "15M": Config(288, 6, 6, 6, 48, 768, 32000),  # llama2.c's stories15M, but with untied embeddings: 24M parameters
    "110M": Config(768, 12, 12, 12, 64, 2048, 32000),
    "1.1B": SIZES["TinyLlama-1.1B"],
    "7B": SIZES["LLaMA-7B"],
}
LENGTH = 10  # K


@dataclass(frozen=True)
class Workload:
    """The model, the data and the choice of contestants of a benchmark, from the options that the commands share."""

    size: str  # a key of CONFIGS
    base: Path | None  # a base with real weights, used instead of `size`
    data: str | None  # a file in Alpaca's format; None means the toy's data
    tokenizer: str | None  # a SentencePiece model, required if `data` is given without `base`
    repeat: int  # number of rounds
    peers: bool  # also measure other implementations
    compiled: bool  # also measure this implementation with torch.compile
    precisions: bool  # also measure this implementation in the other of float32 and bfloat16, and quantized
    device: torch.device
    dtype: torch.dtype  # dtype of the base

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
        """Read at most `number` examples, spread evenly over the data, and the tokenizer.

        Raises OSError or ValueError if a file is missing or invalid.
        """
        if self.data is None:
            examples = [question.example for question in instructions()["training"]]
            tokenizer = load_tokenizer(self.base or BASE)
        elif self.base:
            examples, tokenizer = read_examples(self.data), load_tokenizer(self.base)
        elif self.tokenizer is None:
            raise ValueError(f"--data {self.data} requires --tokenizer FILE or --base")
        else:
            examples, tokenizer = read_examples(self.data), SentencePieceTokenizer(self.tokenizer)
        return examples[:: max(1, len(examples) // number)][:number], tokenizer

    def examples(self, number: int) -> list[TokenizedExample]:
        """Read and tokenize at most `number` examples. Raises OSError or ValueError if a file is missing or invalid."""
        examples, tokenizer = self.read(number)
        return tokenize(AlpacaTemplate(tokenizer), examples, 512)[0]


compile_option = option("--compile", "compiled", is_flag=True, help="Also time this implementation with torch.compile.")
precisions_option = option(
    "--precisions",
    is_flag=True,
    help="Also time this implementation in the other of float32 and bfloat16, and with 8-bit and 4-bit layers.",
)


def precisions(workload: Workload, variant: Variant) -> dict[str, Variant]:
    """Return the variants of this implementation in the other of float32 and bfloat16, and in 8 and 4 bits.

    Returns {} if the workload does not include them.
    """
    if not workload.precisions:
        return {}
    other = torch.float32 if workload.dtype == torch.bfloat16 else torch.bfloat16
    return {
        f"ours, {str(other)[6:]}": variant._replace(dtype=other),
        "ours, 8 bits": variant._replace(bits="8"),
        "ours, 4 bits": variant._replace(bits="4"),
    }


def workload_options(*own_options):
    """Return a decorator that adds the options of `prepare_workload`, a command's own options, and --json."""
    return option_group(
        "Options",
        option(
            "--size", type=click.Choice(list(CONFIGS)), default="15M", help="Size of the model; its weights are random."
        ),
        option("--base", type=PATH, help="Base with real weights, used instead of --size."),
        *device_options,
        option("--data", type=click.Path(), help="Examples in Alpaca's format.  [default: the toy's]"),
        option(
            "--tokenizer", type=click.Path(), help="SentencePiece model to tokenize --data, if --base is not given."
        ),
        option("--repeat", type=Count(), default=5, help="Number of rounds; all contestants run once in each round."),
        option("--peers", is_flag=True, help="Also time other implementations whose packages are installed."),
        *own_options,
        json_option,
    )


def prepare_workload(device: str, dtype: str, compiled: bool = False, precisions: bool = False, **options) -> Workload:
    """Create the workload that the options describe. Raises ValueError if the device, or a compiler, is missing."""
    device, dtype = select_device(device, dtype)
    if compiled:
        prepare_to_compile(device)
    return Workload(device=device, dtype=dtype, compiled=compiled, precisions=precisions, **options)


def random_model(config: Config, device: torch.device, dtype: torch.dtype) -> LLaMA:
    """Create a frozen model with random weights directly on the device, with the memory layout of `load_llama`."""
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
    """Create examples of random tokens with these lengths. The second half of each example is the response."""
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
    """Create an adapter with random prompts and zero gates for the topmost `layers` layers, by default all but two."""
    return Adapter(
        layers=layers or max(1, config.n_layers - 2),
        length=LENGTH,
        dim=config.dim,
        heads=config.n_heads,
        generator=torch.Generator().manual_seed(0),
    ).to(device)
