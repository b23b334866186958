"""Ask a LLaMA, with or without an adapter: python generate.py --adapter out/adapter.safetensors "prompt"."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

import click
import torch
from torch import Tensor

from adapter import Adapter, Prompt
from checkpoints import load_llama
from cli import SEED, Real, device_options, one_line_errors
from data import TEMPLATES, Tokenizer, tokenize_prompt
from model import KVCache, LLaMA, choose, fingerprint


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits (B, V), as (B,). Temperature 0 takes the likeliest.

    Otherwise nucleus sampling (Holtzman et al., 2020): from the smallest set of likeliest tokens
    whose probabilities sum to top_p.
    """
    if temperature < 1e-6:  # in float32 the division would overflow, and the likeliest be all there is
        return logits.argmax(dim=-1)
    probabilities, tokens = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # of the likelier tokens alone
    probabilities[before >= max(top_p, 1e-6)] = 0  # never the first
    choice = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
    return tokens.gather(-1, choice).squeeze(-1)


@torch.inference_mode()
def stream(
    model: LLaMA,
    tokens: Sequence[list[int]],
    prompts: Sequence[Prompt] = (),
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """Continue each of B rows of token ids; the rows may differ in length.

    Yields, step by step, B ids, None for a row that has ended. A row ends with `eos_id`, which is not
    yielded, and all of them after `max_new_tokens` steps or when all have ended.
    """
    if not all(tokens):
        raise ValueError("a row without a token has nothing to continue: begin with <bos>")
    device = model.tok_embeddings.weight.device
    lengths = torch.tensor([len(row) for row in tokens], device=device)
    longest = int(lengths.max())
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=device)  # (B, T)

    cache = KVCache(model, batch=len(tokens), length=longest + max_new_tokens)
    hidden = model.hidden_states(padded, prompts, cache)  # prefill: (B, T, C)
    hidden = hidden[torch.arange(len(tokens)), lengths - 1]  # at each row's last token: (B, C)
    cache.lengths += lengths
    ended = [False] * len(tokens)
    for step in range(max_new_tokens):
        new = sample(model.output(hidden), temperature, top_p, generator)  # (B,)
        ids = new.tolist()
        ended = [done or id == eos_id for done, id in zip(ended, ids)]
        if all(ended):
            return
        yield [None if done else id for done, id in zip(ended, ids)]
        if step + 1 < max_new_tokens:
            hidden = model.hidden_states(new[:, None], prompts, cache)[:, -1]
            cache.lengths += 1


def generate(model: LLaMA, tokens: Sequence[list[int]], prompts: Sequence[Prompt] = (), **options) -> list[list[int]]:
    """The new ids of every row, all at once; options as for `stream`."""
    answers: list[list[int]] = [[] for _ in tokens]
    for ids in stream(model, tokens, prompts, **options):
        for answer, id in zip(answers, ids):
            if id is not None:
                answer.append(id)
    return answers


def text_pieces(ids: Iterator[list[int | None]], tokenizer: Tokenizer) -> Iterator[str]:
    """Decode a stream of one row piece by piece, holding back a character whose bytes are not all there."""
    so_far, shown = [], ""
    for (id,) in ids:
        so_far.append(id)
        text = tokenizer.decode(so_far)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(so_far)[len(shown) :]


def load(
    adapter_path: str | None, base: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[LLaMA, Tokenizer, Adapter | None]:
    """What a command needs to answer. Raises OSError or ValueError where the files don't fit each other."""
    if adapter_path is None and base is None:
        raise ValueError("nothing to run: give --adapter FILE, or --base PATH, or both")
    adapter = None if adapter_path is None else Adapter.load(adapter_path)
    if base is None:
        base = adapter.metadata.get("base")
    if base is None:
        raise ValueError(f"{adapter_path}: does not say which base it is for; give --base PATH")
    model, tokenizer = load_llama(base, dtype, device)
    if adapter:
        try:
            adapter.check_base(layers=model.config.n_layers, dim=model.config.dim, heads=model.config.n_heads)
        except ValueError as error:
            raise ValueError(f"{adapter_path} does not fit {base}: {error}") from None
        if adapter.metadata.get("prompt_template", "alpaca") not in TEMPLATES:
            raise ValueError(f"{adapter_path}: unknown prompt template {adapter.metadata['prompt_template']!r}")
        if adapter.metadata.get("base_fingerprint", fingerprint(model)) != fingerprint(model):
            click.echo(f"warning: {adapter_path} was tuned on other weights than those of {base}", err=True)
        adapter.to(device)
    return model, tokenizer, adapter


@click.command(context_settings={"show_default": True})
@click.argument("prompt", required=False)
@click.option("--adapter", "adapter_path", type=click.Path(), help="An adapter file; without it the base runs alone.")
@click.option("--base", type=click.Path(), help="The base model.  [default: the one that the adapter's file names]")
@click.option("--input", "context", default="", help="Alpaca's input field: what the instruction is about.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, without the instruction template.")
@click.option("--strength", type=Real(0, 1e3), default=1.0, help="Scales the gates; 0 is the base alone.")
@click.option("--compare", is_flag=True, help="Answer twice: the base alone, and the base with the adapter.")
@click.option("--temperature", type=Real(0, 1e3), default=0.1, help="0 is greedy.")
@click.option("--top-p", type=Real(0, 1, min_open=True), default=0.75)
@click.option("--greedy", is_flag=True, help="Always the likeliest token: --temperature 0.")
@click.option("--seed", type=SEED, default=0)
@click.option("--max-new-tokens", type=click.IntRange(1, 2**17), default=256)
@device_options
def main(prompt, adapter_path, base, device, dtype, context, raw, strength, compare, seed, greedy, **sampling):
    """Answer PROMPT. The answer goes to standard output, everything else to standard error.

    Without PROMPT, a terminal becomes a conversation in which every line is an instruction of its own;
    from a pipe, every line is answered by exactly one line, line breaks within it as \\n.
    """
    with one_line_errors():
        if compare and adapter_path is None:
            raise ValueError("--compare needs --adapter FILE")
        if raw and context:
            raise ValueError("--input is a field of the template that --raw does without")
        device, dtype = choose(device, dtype)
        model, tokenizer, adapter = load(adapter_path, base, device, dtype)
    speakers = {"base": ()}
    template = "alpaca"
    if adapter:
        template = adapter.metadata.get("prompt_template", template)
        with torch.no_grad():
            speakers["adapter"] = adapter(strength=strength, dtype=dtype)
    if not compare:
        speakers = dict([speakers.popitem()])  # the last alone
    if greedy:
        sampling["temperature"] = 0.0
    generator = torch.Generator(device).manual_seed(seed)

    def answer(instruction: str, prompts: Sequence[Prompt]) -> Iterator[str]:
        if raw:
            tokens = [tokenizer.bos_id, *tokenizer.encode(instruction)]
        else:
            tokens = tokenize_prompt(tokenizer, instruction, context, template)
        room = (model.config.max_seq_len or math.inf) - len(tokens)
        if room < 1:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the base sees only {model.config.max_seq_len}")
        limit = min(sampling["max_new_tokens"], room)
        options = sampling | {"max_new_tokens": limit, "eos_id": tokenizer.eos_id, "generator": generator}
        return text_pieces(stream(model, [tokens], prompts, **options), tokenizer)

    def show(instruction: str, one_line: bool) -> None:
        answers = {name: answer(instruction, prompts) for name, prompts in speakers.items()}
        for number, (name, pieces) in enumerate(answers.items()):
            click.echo("\t" if one_line and number else "", nl=False)
            click.echo(f"{name}: " if compare else "", nl=False)
            for piece in pieces:
                click.echo(piece.replace("\n", "\\n") if one_line else piece, nl=False)
            click.echo("" if one_line else "\n", nl=False)
        click.echo("\n" if one_line else "", nl=False)

    with one_line_errors():
        if prompt is not None:
            show(prompt, one_line=False)
            return
        if sys.stdin is None:
            raise ValueError("no PROMPT, and no standard input to read one from")
        terminal = sys.stdin.isatty()
        for instruction in lines_of(sys.stdin, terminal):
            try:
                if instruction or not terminal:
                    show(instruction, one_line=not terminal)
            except ValueError as error:  # with this line alone
                click.echo(f"error: {error}", err=True)
                click.echo()


def lines_of(stdin: TextIO, terminal: bool) -> Iterator[str]:
    """Line by line, as they are typed; a terminal is shown where to type."""
    while True:
        click.echo("> " if terminal else "", nl=False, err=True)
        line = stdin.readline()
        if not line:
            return
        yield line.rstrip("\r\n")


if __name__ == "__main__":
    main()
