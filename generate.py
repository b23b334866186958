"""Ask a LLaMA, with or without an adapter: python generate.py --adapter out/adapter.safetensors "prompt".

In this order: sampling, the two forward passes, the loop; then an answer, a conversation, files, and the command.
Notation as in adapter.py.
"""

import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import click
import torch
from cloup import command
from torch import Tensor
from tqdm import tqdm

from adapter import ATTENTIONS, Adapter, Prompt
from data import Tokenizer, check_record, read_records, tokenize_prompt
from encoders.media import files_in
from formats.image_encoders import load_image_encoder
from formats.loading import load_with_adapters
from model import KVCache, LLaMA
from runtime.asking import batch_options, model_options, question_options, sampling_options, speed_options
from runtime.cli import one_line_errors
from runtime.compilation import compile_decoding, prepare_to_compile
from runtime.device import select_device
from runtime.errors import printable
from runtime.files import atomic_write, path_inside, require_file, require_writable
from runtime.quantization import quantize_int8


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits (B, V), as (B,). Temperature 0 takes the likeliest.

    Otherwise nucleus sampling (Holtzman et al., 2020): from the fewest likeliest tokens that sum to top_p.
    """
    if temperature < 1e-6:  # in float32 the division would overflow, and the likeliest be all there is
        return logits.argmax(dim=-1)
    probabilities, tokens = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # of the likelier tokens alone
    probabilities[before >= max(top_p, 1e-6)] = 0  # never the first
    # The least of exponential variables with these rates (the Gumbel-max trick) is a draw like torch.multinomial's,
    # which makes a GPU wait for the host.
    exponential = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = (probabilities / exponential).argmax(dim=-1, keepdim=True)  # (B, 1)
    return tokens.gather(-1, choice).squeeze(-1)


def prefill(
    model: LLaMA, tokens: Sequence[list[int]], prompts: Sequence[Prompt], max_new_tokens: int
) -> tuple[Tensor, KVCache]:
    """Read B rows of ids, which may differ in length: logits (B, V) of what follows, and the cache to go on with."""
    device = model.tok_embeddings.weight.device
    lengths = torch.tensor([len(row) for row in tokens], device=device)
    longest = int(lengths.max())
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=device)  # (B, T)
    cache = KVCache(model, batch=len(tokens), capacity=longest + max_new_tokens)
    hidden = model.hidden_states(padded, prompts, cache)  # (B, T, C)
    cache.lengths += lengths  # so that what the padding wrote will be overwritten
    return model.output(hidden[torch.arange(len(tokens), device=device), lengths - 1]), cache


def decode(model: LLaMA, ids: Tensor, prompts: Sequence[Prompt], cache: KVCache) -> Tensor:
    """Read the newest token of every row, ids (B,): logits (B, V) of what follows."""
    hidden = model.hidden_states(ids[:, None], prompts, cache)  # (B, 1, C)
    cache.lengths += 1
    return model.output(hidden[:, 0])


@torch.inference_mode()
def stream(
    model: LLaMA,
    tokens: Sequence[list[int]],
    prompts: Sequence[Prompt] = (),
    *,
    max_new_tokens: int,
    end_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    decode: Callable[..., Tensor] = decode,
) -> Iterator[list[int | None]]:
    """Continue each of B rows of token ids; the rows may differ in length.

    Yields, step by step, B ids, None for a row that has ended: with one of `end_ids`, which is not yielded. All end after
    `max_new_tokens` steps, or when every row has. `decode` is the one above, plain or compiled.
    """
    if not all(tokens):
        raise ValueError("a row without a token has nothing to continue: begin with <bos>")
    logits, cache = prefill(model, tokens, prompts, max_new_tokens)
    newest, ended = None, [False] * len(tokens)
    at_once = 8 if logits.device.type == "cuda" else 1  # a GPU goes on meanwhile, and is not waited for at each token
    for start in range(0, max_new_tokens, at_once):
        new = []
        for step in range(start, min(start + at_once, max_new_tokens)):
            if step:
                logits = decode(model, newest, prompts, cache)  # (B, V)
            newest = sample(logits, temperature, top_p, generator)  # (B,)
            new.append(newest)
        for ids in torch.stack(new).tolist():
            ended = [done or id in end_ids for done, id in zip(ended, ids)]
            if all(ended):
                return
            yield [None if done else id for done, id in zip(ended, ids)]


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


def concat_prompts(sets: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """The prompts of a batch whose samples each have an adapter of their own: a concatenation along B.

    All have the same K. Where a sample has fewer layers than another, or none (the base), its gates are closed.
    """
    deepest, batch = max(sets, key=len), []
    for depth, filler in enumerate(deepest):
        closed = filler._replace(gate=torch.zeros_like(filler.gate))
        layer = [prompts[depth - len(deepest)] if len(deepest) - depth <= len(prompts) else closed for prompts in sets]
        batch.append(Prompt(*(torch.cat(parts) for parts in zip(*layer))))
    return batch


# ---------------------------------------------------------------------------------------------------
# Answers


class Request(NamedTuple):
    """What is asked, and of whom."""

    instruction: str
    input: str = ""
    adapter: str = "base"  # its name
    features: Tensor | None = None  # (F,), of the image that it is about


class Responder:
    """A base, the adapters over it by name, and how to sample: what makes an answer of a request.

    `prompt_sets` are the prompts of every adapter, and none for "base". `sampling` is as for `stream`.
    """

    def __init__(
        self,
        model: LLaMA,
        tokenizer: Tokenizer,
        adapters: dict[str, Adapter],
        *,
        gate_scale: float = 1.0,
        raw: bool = False,
        **sampling,
    ):
        self.model, self.tokenizer, self.raw, self.sampling = model, tokenizer, raw, sampling
        self.adapters, self.gate_scale = adapters, gate_scale
        self.prompt_sets: dict[str, Sequence[Prompt]] = {"base": ()}
        self.templates = {"base": "alpaca"}
        for name, adapter in adapters.items():
            with torch.no_grad():
                self.prompt_sets[name] = adapter(gate_scale=gate_scale, dtype=model.tok_embeddings.weight.dtype)
            self.templates[name] = adapter.metadata.get("prompt_template", "alpaca")

    @torch.no_grad()
    def prompts(self, request: Request) -> Sequence[Prompt]:
        """Of the adapter that is asked, shifted by the image if there is one."""
        if request.features is None:
            return self.prompt_sets[request.adapter]
        weight, adapter = self.model.tok_embeddings.weight, self.adapters[request.adapter]
        return adapter(request.features[None].to(weight.device), gate_scale=self.gate_scale, dtype=weight.dtype)

    def tokens(self, request: Request) -> list[int]:
        """<bos> and the instruction, in its template."""
        if self.raw:
            return [*self.tokenizer.start_ids, *self.tokenizer.encode(request.instruction)]
        return tokenize_prompt(self.tokenizer, request.instruction, request.input, self.templates[request.adapter])

    def tokens_and_limit(self, request: Request) -> tuple[list[int], int]:
        """And how many tokens its answer may have. Raises ValueError where the base's context leaves no room."""
        tokens, context = self.tokens(request), self.model.config.max_seq_len or math.inf
        if len(tokens) >= context:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the base sees only {context}")
        return tokens, min(self.sampling["max_new_tokens"], context - len(tokens))

    def answer(self, request: Request) -> Iterator[str]:
        """Piece by piece, as it is made."""
        tokens, limit = self.tokens_and_limit(request)
        ids = stream(self.model, [tokens], self.prompts(request), **self.sampling | {"max_new_tokens": limit})
        return text_pieces(ids, self.tokenizer)

    def answer_batch(self, requests: Sequence[Request], bar: tqdm) -> list[str]:
        """Of as many requests, adapters and images mixed; the bar moves on by all of them at the end."""
        tokens, limits = zip(*map(self.tokens_and_limit, requests))
        prompts = concat_prompts(list(map(self.prompts, requests)))
        answers: list[list[int]] = [[] for _ in requests]
        for ids in stream(self.model, tokens, prompts, **self.sampling | {"max_new_tokens": max(limits)}):
            for answer, id, limit in zip(answers, ids, limits):
                if id is not None and len(answer) < limit:
                    answer.append(id)
            bar.set_postfix_str(f"{sum(map(len, answers))} tokens", refresh=False)
        bar.update(len(requests))
        return [self.tokenizer.decode(ids) for ids in answers]


def print_answers(responder: Responder, request: Request, names: Sequence[str], one_line: bool = False) -> None:
    """Of all the adapters named, labelled where there are several; on one line, parted by tabs, if asked."""
    answers = {name: responder.answer(request._replace(adapter=name)) for name in names}
    for number, (name, pieces) in enumerate(answers.items(), start=1):
        click.echo(f"{name}: " if len(names) > 1 else "", nl=False)
        for piece in pieces:
            click.echo(piece.replace("\n", "\\n") if one_line else piece, nl=False)
        click.echo("\t" if one_line and number < len(names) else "\n", nl=False)


HELP = "Every line is an instruction of its own. /adapter NAME or /none: who answers. /quit: end. /help: this line."


def chat(responder: Responder, input: str, names: Sequence[str], stdin: TextIO) -> None:
    """Answer every line; on a terminal, some are commands. Raises ValueError where nothing comes out of a pipe."""
    terminal, line = stdin.isatty(), None
    click.echo(f"{HELP}\n" if terminal else "", nl=False, err=True)
    while True:
        click.echo("> " if terminal else "", nl=False, err=True)
        before, line = line, stdin.readline()
        if not line and not terminal and before is None:
            raise ValueError("no PROMPT, and nothing on standard input")
        if not line or (terminal and line.strip() in ("exit", "quit", "/exit", "/quit")):
            return
        line = line.rstrip("\r\n")
        try:
            if terminal and line.strip() == "/help":
                click.echo(HELP, err=True)
            elif terminal and line.split(" ")[0] in ("/adapter", "/none"):
                name = line.removeprefix("/adapter").strip() if line != "/none" else "base"
                if name not in responder.prompt_sets:
                    raise ValueError(f"no adapter {name!r}; there are {', '.join(responder.prompt_sets)}")
                names = [name]
            elif line or not terminal:
                print_answers(responder, Request(line, input), names, one_line=not terminal)
        except ValueError as error:  # with this line alone
            click.echo(f"error: {error}", err=True)
            click.echo()


def answer_about_images(responder: Responder, paths: list[Path], requests: list[Request], batch_size: int) -> None:
    """Print the answer about an image; about several, each on a line behind the image's path, line breaks as \\n."""
    if len(requests) == 1:
        click.echo("".join(responder.answer(requests[0])))
        return
    with tqdm(total=len(requests), unit="image", file=sys.stderr) as bar:
        for start in range(0, len(requests), batch_size):
            batch = slice(start, start + batch_size)
            for path, answer in zip(paths[batch], responder.answer_batch(requests[batch], bar)):
                bar.write(f"{printable(str(path))}: " + answer.replace("\n", "\\n"), file=sys.stdout)


def attach_images(
    responder: Responder, requests: Sequence[Request], images: dict[int, Path], tower: str | None, encoder: str | None
) -> list[Request]:
    """The requests, those that have an image with its features, as the adapter that is asked was tuned on.

    Raises OSError or ValueError, where an adapter cannot see images, too.
    """
    weight, requests = responder.model.tok_embeddings.weight, list(requests)
    for name in dict.fromkeys(requests[i].adapter for i in images):
        image_encoder = load_image_encoder(tower, encoder, weight.dtype, weight.device, responder.adapters.get(name))
        ours = [i for i in images if requests[i].adapter == name]
        for i, features in zip(ours, image_encoder.encode([images[i] for i in ours])):
            requests[i] = requests[i]._replace(features=features)
    return requests


# ---------------------------------------------------------------------------------------------------
# Files of requests


def read_requests(
    path: str, responder: Responder, default: str, folder: str | None
) -> tuple[list[dict], list[Request], dict[int, Path]]:
    """The records of a JSONL file, what each asks, and the images of those that have one, in the folder or beside the
    file. Raises OSError or ValueError, naming the record."""
    records, requests, images = read_records(path), [], {}
    for index, record in enumerate(records):
        where = f"record {index}"
        example = check_record(record, path, where, needed=["instruction"])
        name = record.get("adapter", default)
        name = "base" if name is None else name
        if not isinstance(name, str) or name not in responder.prompt_sets:
            raise ValueError(f"{path}: {where}: adapter {name!r} is none of {list(responder.prompt_sets)}")
        requests.append(Request(example.instruction, example.input, name))
        try:
            responder.tokens_and_limit(requests[-1])
            if example.image and name == "base":
                raise ValueError("an image needs an adapter with a projection, and the base alone has none")
            if example.image:
                images[index] = require_file(path_inside(folder or Path(path).parent, example.image), "image")
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{path}: {where}: {error}") from None
    asked = {request.adapter: responder.prompt_sets[request.adapter] for request in requests}
    lengths = {name: len(prompts[0].tokens[0]) for name, prompts in asked.items() if prompts}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: adapters of different lengths cannot share a batch: {lengths}")
    return records, requests, images


def answer_file(responder: Responder, records: list[dict], requests: list[Request], out: str, batch_size: int) -> None:
    """Write the records again as JSONL, each with its output; all of them or none. Raises OSError."""
    bar = tqdm(total=len(records), unit="record", file=sys.stderr)
    # What UTF-8 cannot say (half a character) is written as its escape, which is what JSON reads.
    with atomic_write(out) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file, bar:
        for start in range(0, len(records), batch_size):
            batch = slice(start, start + batch_size)
            for record, output in zip(records[batch], responder.answer_batch(requests[batch], bar)):
                file.write(json.dumps(record | {"output": output}, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------
# The command


@command(context_settings={"show_default": True})
@click.argument("prompt", required=False)
@model_options
@question_options
@sampling_options
@batch_options
@speed_options([*ATTENTIONS])
def main(prompt, input, adapter_paths, compare, images, folder, tower, encoder, jsonl, out, batch_size, **options):
    """Answer PROMPT. The answer goes to standard output, everything else to standard error.

    Without PROMPT, a terminal becomes a conversation in which every line is an instruction of its own, and
    /adapter NAME or /none says who is to answer; from a pipe, every line is answered by exactly one line, line breaks
    within it as \\n. With --prompts, records that name different adapters (or null, the base) share a batch.
    """
    with one_line_errors():
        if compare and not adapter_paths:
            raise ValueError("--compare needs --adapter FILE")
        if options["raw"] and input:
            raise ValueError("--input is a field of the template that --raw does without")
        if (jsonl is None) != (out is None):
            raise ValueError("--prompts and --out go together")
        if jsonl is not None and (prompt is not None or compare or input):
            raise ValueError("--prompts names all there is to answer: no PROMPT, --input or --compare beside it")
        if images and (prompt is None or compare or len(adapter_paths) != 1):
            raise ValueError("--image goes with a PROMPT and one --adapter")
        if out is not None:
            require_writable(out)
        responder = make_responder(adapter_paths, **options)
        first = next(iter(responder.adapters), "base")
        names = ["base", *responder.adapters] if compare else [first]
        if images:
            paths = files_in(images, of_any_kind=encoder is not None)
            requests = [Request(prompt, input, first)] * len(paths)
            requests = attach_images(responder, requests, dict(enumerate(paths)), tower, encoder)
            answer_about_images(responder, paths, requests, batch_size)
        elif jsonl is not None:
            records, requests, pictures = read_requests(jsonl, responder, first, folder)
            requests = attach_images(responder, requests, pictures, tower, encoder)
            answer_file(responder, records, requests, out, batch_size)
        elif prompt is not None:
            print_answers(responder, Request(prompt, input), names)
        elif sys.stdin is not None:
            chat(responder, input, names, sys.stdin)
        else:
            raise ValueError("no PROMPT, and no standard input to read one from")


def make_responder(
    adapter_paths, base, device, dtype, attention, int8, compile, greedy, temperature, seed, **options
) -> Responder:
    """As the options say. Raises OSError or ValueError."""
    device, dtype = select_device(device, dtype)
    if compile:
        prepare_to_compile(device, int8)
    model, tokenizer, adapters = load_with_adapters(adapter_paths, base, device, dtype, attention)
    if int8:
        quantize_int8(model.layers)
    return Responder(
        model,
        tokenizer,
        adapters,
        **options,
        temperature=0.0 if greedy else temperature,
        generator=torch.Generator(device).manual_seed(seed),
        end_ids=tokenizer.end_ids,
        decode=compile_decoding(decode, model) if compile else decode,
    )


if __name__ == "__main__":
    main()
