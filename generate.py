"""Ask a LLaMA, with or without an adapter: python generate.py --adapter out/adapter.safetensors "prompt".

In this order: sampling, the two forward passes, the loop; then an answer, a conversation, files, and the command.
Notation as in adapter.py.
"""

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TextIO

import click
import torch
from cloup import command
from torch import Tensor
from tqdm import tqdm

from adapter import ATTENTIONS, Adapter, Prompt
from data import Template, Tokenizer, Turn
from encoders.media import files_in
from formats.chat_templates import NAMES, load_template, question
from formats.loading import load_with_adapters
from formats.requests import Request, attach_images, read_requests, write_answers
from formats.tensors import named
from model import KVCache, LLaMA
from runtime.asking import batch_options, check_question, model_options, question_options
from runtime.asking import sampling_options, speed_options
from runtime.cli import one_line_errors
from runtime.compilation import compile_decoding, prepare_to_compile
from runtime.device import select_device
from runtime.distributed import answering_ranks, broadcast_from_rank0
from runtime.errors import printable
from runtime.terminal import read_commands


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits (B, V), as (B,). Temperature 0 takes the likeliest.

    Otherwise nucleus sampling (Holtzman et al., 2020): from the fewest likeliest tokens that sum to top_p.
    """
    if temperature < 1e-6:  # in float32 the division would overflow, and the likeliest be all there is
        return logits.argmax(dim=-1)
    probabilities, tokens = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    # Of the likelier tokens alone; in float64, for a GPU's sums differ in the last bits, and ranks must not.
    before = probabilities.double().cumsum(dim=-1) - probabilities
    probabilities[before >= max(top_p, 1e-6)] = 0  # never the first
    # The least of exponential variables with these rates (the Gumbel-max trick) is a draw like torch.multinomial's,
    # which makes a GPU wait for the host.
    exponential = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = (probabilities / exponential).argmax(dim=-1, keepdim=True)  # (B, 1)
    return tokens.gather(-1, choice).squeeze(-1)


def prefill(model: LLaMA, tokens: Sequence[list[int]], prompts: Sequence[Prompt], cache: KVCache) -> Tensor:
    """Read B rows of ids, which may differ in length, behind what the cache holds: logits (B, V) of what follows."""
    device = model.device
    lengths = torch.tensor([len(row) for row in tokens], device=device)
    longest = int(lengths.max())
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=device)  # (B, T)
    hidden = model.hidden_states(padded, prompts, cache)  # (B, T, C)
    cache.lengths += lengths  # so that what the padding wrote will be overwritten
    return model.output(hidden[torch.arange(len(tokens), device=device), lengths - 1])


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
    cache: KVCache | None = None,
) -> Iterator[list[int | None]]:
    """Continue each of B rows of token ids; the rows may differ in length.

    Yields, step by step, B ids, None for a row that has ended: with one of `end_ids`, which is not yielded. All end
    after `max_new_tokens` steps, or when every row has. `decode` is the one above, plain or compiled. A `cache` holds
    what stands before the rows, read with the same prompts, and has room for what is to come.
    """
    if not all(tokens):
        raise ValueError("a row without a token has nothing to continue: begin with <bos>")
    if cache is None:
        cache = KVCache(model, batch=len(tokens), capacity=max(map(len, tokens)) + max_new_tokens)
    logits = prefill(model, tokens, prompts, cache)
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


def text_pieces(ids: Iterator[list[int | None]], tokenizer: Tokenizer, so_far: list[int]) -> Iterator[str]:
    """Decode a stream of one row piece by piece, holding back a character whose bytes are not all there.

    `so_far` is an empty list, which gets all ids.
    """
    shown = ""
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


class Responder:
    """A base, the adapters over it by name, and how to sample: what makes an answer of a request.

    `prompt_sets` are the prompts of every adapter, and none for "base"; `templates` are those that the adapters were
    tuned with, unless one is named; the base has the first adapter's. `sampling` is as for `stream`.
    """

    def __init__(
        self,
        model: LLaMA,
        tokenizer: Tokenizer,
        adapters: dict[str, Adapter],
        *,
        gate_scale: float = 1.0,
        raw: bool = False,
        template: str | None = None,
        **sampling,
    ):
        self.model, self.tokenizer, self.raw = model, tokenizer, raw
        self.adapters, self.gate_scale = adapters, gate_scale
        self.prompt_sets: dict[str, Sequence[Prompt]] = {"base": ()}
        for name, adapter in adapters.items():
            with torch.no_grad():
                self.prompt_sets[name] = adapter(gate_scale=gate_scale, dtype=model.dtype)
        tuned_with = {name: adapter.metadata.get("prompt_template", "alpaca") for name, adapter in adapters.items()}
        tuned_with |= {"base": next(iter(tuned_with.values()), "alpaca")}
        kinds = {kind: load_template(kind, tokenizer) for kind in {template or kind for kind in tuned_with.values()}}
        self.templates: dict[str, Template] = {name: kinds[template or kind] for name, kind in tuned_with.items()}
        self.sampling = {"end_ids": {id for kind in kinds.values() for id in kind.end_ids}} | sampling

    def has_turns(self, adapter: str) -> bool:
        """Whether its answers may be followed by another question."""
        return self.templates[adapter].has_turns and not self.raw

    @torch.no_grad()
    def prompts(self, request: Request) -> Sequence[Prompt]:
        """Of the adapter that is asked, shifted by the image if there is one."""
        if request.features is None:
            return self.prompt_sets[request.adapter]
        features = request.features[None].to(self.model.device)  # (1, F)
        return self.adapters[request.adapter](features, gate_scale=self.gate_scale, dtype=self.model.dtype)

    def tokens(self, request: Request) -> list[int]:
        """<bos> and the instruction, in its template, behind what was said before. Raises ValueError."""
        if request.history and not self.has_turns(request.adapter):
            how = "without a template" if self.raw else f"the template {self.templates[request.adapter].name}"
            raise ValueError(f"{how} has no turns: --template auto, llama-2, llama-3 or chatml")
        if self.raw:
            return [*self.tokenizer.start_ids, *self.tokenizer.encode(request.instruction)]
        return self.templates[request.adapter].prompt(request.instruction, request.input, request.history)

    def tokens_and_limit(self, request: Request) -> tuple[list[int], int]:
        """And how many tokens its answer may have. Raises ValueError where the base's context leaves no room."""
        tokens, context = self.tokens(request), self.model.config.max_seq_len or math.inf
        if len(tokens) >= context:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the base sees only {context}")
        return tokens, min(self.sampling["max_new_tokens"], context - len(tokens))

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

    def answer_all(self, requests: Sequence[Request], batch_size: int, unit: str) -> Iterator[str]:
        """In their order, so many at once, with a progress bar."""
        with tqdm(total=len(requests), unit=unit, file=sys.stderr) as bar:
            for start in range(0, len(requests), batch_size):
                for answer in self.answer_batch(requests[start : start + batch_size], bar):
                    with bar.external_write_mode(file=sys.stdout):
                        yield answer


class Conversation:
    """With one adapter, or the base alone: what was said so far, where the template has turns; the cache of it."""

    def __init__(self, responder: Responder, adapter: str):
        self.responder, self.adapter = responder, adapter
        self.system = ""  # what its first turn says, if there is one
        self.turns: list[Turn] = []
        self.ids: list[int] = []  # the cache holds as many of them as its length says
        self.cache = KVCache(responder.model, batch=1, capacity=0)

    def answer(self, instruction: str, input: str = "") -> Iterator[str]:
        """Piece by piece; of what stands before it only that is read which the cache does not hold."""
        history = [Turn("system", self.system)] * bool(self.system) + self.turns
        request = Request(instruction, input, self.adapter, history=history)
        tokens, limit = self.responder.tokens_and_limit(request)
        known, new = self.continue_cache(tokens, limit), []
        options = self.responder.sampling | {"max_new_tokens": limit, "cache": self.cache}
        ids = stream(self.responder.model, [tokens[known:]], self.responder.prompts(request), **options)
        yield from text_pieces(ids, self.responder.tokenizer, new)
        self.ids = tokens + new
        if self.responder.has_turns(self.adapter):
            answer = self.responder.tokenizer.decode(new)
            self.turns += [Turn("user", question(instruction, input)), Turn("assistant", answer)]

    def continue_cache(self, tokens: list[int], limit: int) -> int:
        """How many of the tokens the cache holds, with room for the others and as many new ones as `limit`."""
        same = [old == new for old, new in zip(self.ids, tokens[:-1])] + [False]
        known, needed, old = min(same.index(False), int(self.cache.lengths)), len(tokens) + limit, self.cache
        if old.capacity < needed:
            self.cache = KVCache(self.responder.model, batch=1, capacity=needed + old.capacity)
            for layer, before in zip(self.cache.layers, old.layers):
                layer.k[:, :, : old.capacity], layer.v[:, :, : old.capacity] = before.k, before.v
                layer.prompt = before.prompt
        self.cache.lengths.fill_(known)
        self.ids = tokens
        return known


def print_answers(conversations: Sequence[Conversation], instruction: str, input: str, one_line: bool = False) -> None:
    """Of all of them, labelled where there are several; on one line, parted by tabs, if asked."""
    for number, conversation in enumerate(conversations, start=1):
        click.echo(f"{conversation.adapter}: " if len(conversations) > 1 else "", nl=False)
        for piece in conversation.answer(instruction, input):
            click.echo(piece.replace("\n", "\\n") if one_line else piece, nl=False)
        click.echo("\t" if one_line and number < len(conversations) else "\n", nl=False)


def chat(responder: Responder, input: str, names: Sequence[str], stdin: TextIO) -> None:
    """Answer every line; on a terminal some are commands, and what was said is remembered where the template has turns.

    Raises ValueError where nothing comes out of a pipe.
    """
    conversations = {name: Conversation(responder, name) for name in responder.prompt_sets}
    terminal = broadcast_from_rank0(stdin.isatty)
    for order, text in read_commands(stdin, terminal, responder.has_turns(names[0])):
        try:
            if order in ("/adapter", "/none"):
                name = text if order == "/adapter" else "base"
                if name not in conversations:
                    raise ValueError(f"no adapter {name!r}; there are {', '.join(conversations)}")
                names = [name]
            elif order in ("/reset", "/system"):
                if not all(map(responder.has_turns, names)):
                    raise ValueError(f"{order} is for templates with turns; here every line is an instruction")
                for conversation in conversations.values():
                    if order == "/system":
                        conversation.system = text
                    else:
                        conversation.turns = []
            elif terminal:
                print_answers([conversations[name] for name in names], text, input)
            else:  # each by itself
                print_answers([Conversation(responder, name) for name in names], text, input, one_line=True)
        except ValueError as error:  # with this line alone
            click.echo(f"error: {error}", err=True)
            click.echo()


def check_requests(responder: Responder, requests: Sequence[Request], path: str) -> None:
    """Raise ValueError, naming the record, where the context has no room, or adapters cannot share a batch."""
    for index, request in enumerate(requests):
        with named(f"{path}: record {index}"):
            responder.tokens_and_limit(request)
    asked = {request.adapter: responder.prompt_sets[request.adapter] for request in requests}
    lengths = {name: len(prompts[0].tokens[0]) for name, prompts in asked.items() if prompts}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: adapters of different lengths cannot share a batch: {lengths}")


# ---------------------------------------------------------------------------------------------------
# The command


@command(context_settings={"show_default": True})
@click.argument("prompt", required=False)
@model_options
@question_options(NAMES)
@sampling_options
@batch_options
@speed_options([*ATTENTIONS])
def main(prompt, input, adapter_paths, compare, images, folder, tower, encoder, jsonl, out, batch_size, **options):
    """Answer PROMPT. The answer goes to standard output, everything else to standard error.

    Without PROMPT, a terminal becomes a conversation, in which /adapter NAME or /none says who is to answer. It
    remembers what was said where the template is one of conversations; in alpaca's every line is an instruction of its
    own. From a pipe, every line is answered by exactly one line, line breaks within it as \\n. With --prompts, records
    that name different adapters (or null, the base) share a batch.
    """
    with one_line_errors(), answering_ranks():
        check_question(prompt, input, adapter_paths, compare, images, jsonl, out, options)
        responder = make_responder(adapter_paths, **options)
        first = next(iter(responder.adapters), "base")
        names = ["base", *responder.adapters] if compare else [first]
        if images:
            paths = files_in(images, of_any_kind=encoder is not None)
            requests = [Request(prompt, input, first)] * len(paths)
            requests = attach_images(
                requests, dict(enumerate(paths)), responder.adapters, responder.model, tower, encoder
            )
            for path, answer in zip(paths, responder.answer_all(requests, batch_size, "image")):
                several = f"{printable(str(path))}: " + answer.replace("\n", "\\n")
                click.echo(several if len(paths) > 1 else answer)
        elif jsonl is not None:
            records, requests, pictures = read_requests(jsonl, responder.prompt_sets, first, folder)
            check_requests(responder, requests, jsonl)
            requests = attach_images(requests, pictures, responder.adapters, responder.model, tower, encoder)
            write_answers(out, records, responder.answer_all(requests, batch_size, "record"))
        elif prompt is not None:
            print_answers([Conversation(responder, name) for name in names], prompt, input)
        elif sys.stdin is not None:
            chat(responder, input, names, sys.stdin)
        else:
            raise ValueError("no PROMPT, and no standard input to read one from")


def make_responder(
    adapter_paths, base, device, dtype, attention, bits, compile, greedy, temperature, seed, **options
) -> Responder:
    """As the options say. Raises OSError or ValueError."""
    device, dtype = select_device(device, dtype)
    if compile:
        prepare_to_compile(device, bits)
    model, tokenizer, adapters = load_with_adapters(adapter_paths, base, device, dtype, attention, bits)
    return Responder(
        model,
        tokenizer,
        adapters,
        **options,
        temperature=0.0 if greedy else temperature,
        generator=torch.Generator(device).manual_seed(seed),
        decode=compile_decoding(decode, model) if compile else decode,
    )


if __name__ == "__main__":
    main()
