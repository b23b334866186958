"""Generate text, with or without an adapter: python generate.py --adapter out/adapter.safetensors "prompt".

This file contains, in this order: sampling; the two forward passes, prefill and decoding step; the decoding loop; the
responder, which turns a request into a response; the command; and its modes for images, files of records, and
conversations. The notation is that of adapter.py.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, TextIO

import click
import torch
from cloup import command, option, option_group
from torch import Tensor
from tqdm import tqdm

from adapter import ATTENTIONS, Adapter, AdaptionPrompt
from data import Request, Template, Tokenizer, Turn
from formats.chat_templates import NAMES, load_template
from formats.conversations import user_text
from formats.loading import load_with_adapters
from formats.tensors import prefix_errors
from model import KVCache, LLaMA
from runtime.cli import SEED, Count, Real, adapter_options, bits_options, compile_option
from runtime.cli import PromptCommand, encoder_options, ending_options, one_line_errors
from runtime.compilation import compile_decoding
from runtime.device import select_device
from runtime.distributed import inference_ranks, broadcast_from_rank0, rank, run_command
from runtime.errors import error_line, printable
from runtime.files import require_writable
from runtime.terminal import read_commands


class Sampling(NamedTuple):
    """Settings for choosing tokens and for ending a response."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # of the softmax; 0 is greedy decoding
    top_p: float = 1.0  # probability mass of nucleus sampling
    end_ids: Collection[int] = ()  # each of these tokens ends a response, and is not part of it
    repetition_penalty: float = 1.0  # a value above 1 makes tokens of the prompt and the response less likely
    generator: torch.Generator | None = None


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Choose one token for each row of logits (B, V); return the ids (B,). Temperature 0 chooses the argmax.

    Other temperatures use nucleus sampling (Holtzman et al., 2020): the token is drawn from the smallest set of most
    likely tokens whose probabilities sum to at least `top_p`.
    """
    if temperature < 1e-6:  # the division would overflow in float32
        return logits.argmax(dim=-1)
    probabilities, tokens = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    # Exclusive cumulative sum, in float64 except on MPS, which lacks float64: sums on a GPU differ in their last bits,
    # and all ranks must choose the same token.
    dtype = torch.float32 if probabilities.device.type == "mps" else torch.float64
    before = probabilities.cumsum(dim=-1, dtype=dtype) - probabilities
    probabilities[before >= max(top_p, 1e-6)] = 0  # this never excludes the most likely token
    # argmax(p / E) with E ~ Exp(1) is a draw from p (the Gumbel-max trick). torch.multinomial would make the host wait
    # for the GPU.
    exponential = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = (probabilities / exponential).argmax(dim=-1, keepdim=True)  # (B, 1)
    return tokens.gather(-1, choice).squeeze(-1)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (B, V), in float32, in which the tokens of the boolean mask `seen` (B, V) are less likely.

    Positive logits are divided by the penalty (CTRL; Keskar et al., 2019), negative ones are multiplied by it, as in
    transformers.
    """
    logits = logits.float()
    return logits.where(~seen, torch.where(logits > 0, logits / penalty, logits * penalty))


def prefill(
    model: LLaMA, tokens: Sequence[list[int]], adaption_prompts: Sequence[AdaptionPrompt], cache: KVCache
) -> Tensor:
    """Process B rows of token ids, which follow the tokens in the cache; return the logits of the next tokens (B, V).

    The rows may differ in length. `cache.lengths` is advanced by the length of each row.
    """
    lengths = torch.tensor([len(row) for row in tokens], device=model.device)
    longest = max(map(len, tokens))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=model.device)  # (B, T)
    hidden = model.hidden_states(padded, adaption_prompts, cache)  # (B, T, C)
    cache.lengths += lengths  # the next tokens overwrite the keys and values of the padding
    return model.output(hidden[torch.arange(len(tokens), device=model.device), lengths - 1])


def decode_step(model: LLaMA, ids: Tensor, adaption_prompts: Sequence[AdaptionPrompt], cache: KVCache) -> Tensor:
    """Process the newest token of every row, ids (B,), and advance `cache.lengths` by 1. Return logits (B, V)."""
    hidden = model.hidden_states(ids[:, None], adaption_prompts, cache)  # (B, 1, C)
    cache.lengths += 1
    return model.output(hidden[:, 0])


@torch.inference_mode()
def stream(
    model: LLaMA,
    tokens: Sequence[list[int]],
    adaption_prompts: Sequence[AdaptionPrompt] = (),
    sampling: Sampling = Sampling(),
    decode_step: Callable[..., Tensor] = decode_step,
    cache: KVCache | None = None,
    cached: Sequence[list[int]] = (),
) -> Iterator[list[int | None]]:
    """Continue each of B rows of token ids, which may differ in length.

    Yields B ids per step; the id of a row that has ended is None. Stops when all rows have ended, or after
    `sampling.max_new_tokens` steps. `decode_step` is the function above, plain or compiled. If a `cache` is given, it
    contains the tokens before the rows, processed with the same adaption prompts, and has room for the rows and the new
    tokens. `cached` are the ids of the tokens in the cache, for the repetition penalty. Raises ValueError if a row is
    empty.
    """
    if not all(tokens):
        raise ValueError("a prompt has no tokens; expected at least one, such as <bos>")
    limit = sampling.max_new_tokens
    if cache is None:
        cache = KVCache(model, batch=len(tokens), capacity=max(map(len, tokens)) + limit)
    logits = prefill(model, tokens, adaption_prompts, cache)
    penalty = sampling.repetition_penalty
    # (B, V), or empty without a penalty
    seen = torch.zeros(logits.shape if penalty != 1 else (0,), dtype=torch.bool, device=logits.device)
    for row, ids in [*zip(seen, cached), *zip(seen, tokens)]:
        row[ids] = True
    ended = [False] * len(tokens)
    newest = None
    # Reading a token makes the host wait for a CUDA GPU, so there the tokens of eight steps are read together.
    steps_at_once = 8 if logits.device.type == "cuda" else 1
    for start in range(0, limit, steps_at_once):
        new = []
        for step in range(start, min(start + steps_at_once, limit)):
            if step > 0:
                logits = decode_step(model, newest, adaption_prompts, cache)  # (B, V)
            if penalty != 1:
                logits = penalize_repetition(logits, seen, penalty)
            newest = sample(logits, sampling.temperature, sampling.top_p, sampling.generator)  # (B,)
            if penalty != 1:
                seen.scatter_(1, newest[:, None], True)
            new.append(newest)
        for ids in torch.stack(new).tolist():
            ended = [done or id in sampling.end_ids for done, id in zip(ended, ids)]
            if all(ended):
                return
            yield [None if done else id for done, id in zip(ended, ids)]


def generate(
    model: LLaMA,
    tokens: Sequence[list[int]],
    adaption_prompts: Sequence[AdaptionPrompt] = (),
    decode_step: Callable[..., Tensor] = decode_step,
    **sampling,
) -> list[list[int]]:
    """Return the generated ids of every row, without the end token. The keywords `sampling` are fields of Sampling."""
    responses: list[list[int]] = [[] for _ in tokens]
    for ids in stream(model, tokens, adaption_prompts, Sampling(**sampling), decode_step):
        for response, id in zip(responses, ids):
            if id is not None:
                response.append(id)
    return responses


def collect(
    steps: Iterator[list[int | None]], tokenizer: Tokenizer, limits: Sequence[int], stop: Sequence[str] = ()
) -> list[list[int]]:
    """Return the ids of each row of a `stream`, up to the row's limit or the token that completes a stop string."""
    rows: list[list[int]] = [[] for _ in limits]
    ended = [False] * len(rows)
    for ids in steps:
        for i, (row, id) in enumerate(zip(rows, ids)):
            if id is not None and not ended[i]:
                row.append(id)
                text = tokenizer.decode(row) if stop else ""
                ended[i] = len(row) == limits[i] or before_stop(text, stop) != text
        if all(ended):
            break
    return rows


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text, truncated before the first occurrence of a stop string."""
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


def text_pieces(
    steps: Iterator[list[int | None]], tokenizer: Tokenizer, response_ids: list[int], stop: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the text of a `stream` with a single row, piece by piece, up to the first stop string.

    A character is held back until all of its bytes have been generated. Text that may be the beginning of a stop string
    is held back, too. `response_ids` is an empty list, to which the new ids are appended.
    """
    beginnings = tuple(string[:length] for string in stop for length in range(1, len(string)))
    shown = ""
    for (id,) in steps:
        response_ids.append(id)
        text = tokenizer.decode(response_ids)
        if before_stop(text, stop) != text:
            break
        held_back = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        if not text.endswith("\ufffd") and len(text) - held_back > len(shown):
            yield text[len(shown) : len(text) - held_back]
            shown = text[: len(text) - held_back]
    yield before_stop(tokenizer.decode(response_ids), stop)[len(shown) :]


# ---------------------------------------------------------------------------------------------------
# From a request to a response


# Assumed context length, in tokens, of a base that does not state it. It limits the size of the KV cache.
UNSTATED_CONTEXT = 2**15


class LoadedAdapter(NamedTuple):
    """An adapter that is ready for generation, or the base alone, which has no adapter and no adaption prompts."""

    adapter: Adapter | None
    adaption_prompts: Sequence[AdaptionPrompt]  # one per adapted layer, in the base's dtype
    template: Template


class Responder:
    """Turn requests into responses, with a base and named adapters for it.

    The name "base" selects the base alone. A prompt is formatted with the template that its adapter was trained with;
    prompts to the base alone use the template of the first adapter, or alpaca if there is none. `template` names a
    different template for all prompts; with `raw`, prompts have no template. `gate_scale` multiplies the gate values. A
    response ends before the first occurrence of a string in `stop`. With `compiled`, the decoding step is compiled. The
    keywords `sampling` are fields of Sampling. Raises ValueError if a template cannot be used with the base, or if a
    stop string is empty.
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
        stop: Sequence[str] = (),
        compiled: bool = False,
        **sampling,
    ):
        if not all(stop):
            raise ValueError("--stop: the string is empty; expected at least one character")
        self.stop = stop
        self.model = model
        self.tokenizer = tokenizer
        self.gate_scale = gate_scale
        self.raw = raw
        self.decode_step = compile_decoding(decode_step, model) if compiled else decode_step
        self.loaded: dict[str, LoadedAdapter] = {}
        first = next(iter(adapters.values()), None)
        templates: dict[str, Template] = {}
        for name, adapter in ({"base": None} | adapters).items():
            trained = first if adapter is None else adapter
            kind = template or ("alpaca" if trained is None else trained.metadata.get("prompt_template", "alpaca"))
            if kind not in templates:
                templates[kind] = load_template(kind, tokenizer)
            adaption_prompts: Sequence[AdaptionPrompt] = ()
            if adapter is not None:
                with torch.no_grad():
                    adaption_prompts = adapter(gate_scale=gate_scale, dtype=model.dtype)
            self.loaded[name] = LoadedAdapter(adapter, adaption_prompts, templates[kind])
        end_ids = {id for each in templates.values() for id in each.end_ids}
        self.sampling = Sampling(end_ids=end_ids)._replace(**sampling)

    def respond(self, request: Request) -> Iterator[str]:
        """Yield the response, piece by piece. Raises ValueError as `prompt_ids_and_limit` does."""
        tokens, limit = self.prompt_ids_and_limit(request)
        sampling = self.sampling._replace(max_new_tokens=limit)
        steps = stream(self.model, [tokens], self.adaption_prompts(request), sampling, self.decode_step)
        return text_pieces(steps, self.tokenizer, [], self.stop)

    def prompt_ids_and_limit(self, request: Request) -> tuple[list[int], int]:
        """Return the ids of the prompt, and the maximum number of tokens of the response.

        Raises ValueError if the prompt fills the base's context, or as `prompt_ids` does.
        """
        tokens = self.prompt_ids(request)
        context = self.model.config.max_seq_len or UNSTATED_CONTEXT
        if len(tokens) >= context:
            raise ValueError(f"the prompt has {len(tokens)} tokens; expected fewer than {context}, the context length")
        return tokens, min(self.sampling.max_new_tokens, context - len(tokens))

    def prompt_ids(self, request: Request) -> list[int]:
        """Return the ids of the prompt in its template: <bos>, earlier turns, and the instruction.

        With `raw`, template and input are ignored. Raises ValueError if earlier turns are unsupported, or if the prompt
        cannot be encoded.
        """
        template = self.loaded[request.adapter].template
        if request.history and not self.has_turns(request.adapter):
            used = "a prompt of --raw" if self.raw else f"the template {template.name}"
            advice = "use --template auto, llama-2, llama-3 or chatml instead"
            raise ValueError(f"{used} cannot contain earlier turns; {advice}")
        if self.raw:
            return self.tokenizer.start_ids + self.tokenizer.encode(request.instruction)
        return template.encode_prompt(request.instruction, request.input, request.history)

    @torch.no_grad()
    def adaption_prompts(self, request: Request) -> Sequence[AdaptionPrompt]:
        """Return the adaption prompts of the request's adapter, shifted by the request's image if it has one."""
        adapter, adaption_prompts, _ = self.loaded[request.adapter]
        if request.features is None:
            return adaption_prompts
        features = request.features[None].to(self.model.device)  # (1, F)
        return adapter(features, gate_scale=self.gate_scale, dtype=self.model.dtype)

    def has_turns(self, adapter: str) -> bool:
        """Return True if the adapter's template supports conversations of several turns, and `raw` is False."""
        return self.loaded[adapter].template.has_turns and not self.raw

    def respond_batch(self, requests: Sequence[Request]) -> list[str]:
        """Return the responses to several requests. Images and adapters may differ, but not the adapters' K."""
        tokens, limits = zip(*map(self.prompt_ids_and_limit, requests))
        adaption_prompts = concat_adaption_prompts(list(map(self.adaption_prompts, requests)))
        sampling = self.sampling._replace(max_new_tokens=max(limits))
        steps = stream(self.model, tokens, adaption_prompts, sampling, self.decode_step)
        responses = collect(steps, self.tokenizer, limits, self.stop)
        return [before_stop(self.tokenizer.decode(ids), self.stop) for ids in responses]

    def respond_all(self, requests: Sequence[Request], batch_size: int, unit: str = "request") -> Iterator[str]:
        """Yield the responses in the order of the requests, with a progress bar."""
        with tqdm(total=len(requests), unit=unit, file=sys.stderr) as bar:
            for start in range(0, len(requests), batch_size):
                batch = requests[start : start + batch_size]
                responses = self.respond_batch(batch)
                bar.update(len(batch))
                for response in responses:
                    with bar.external_write_mode(file=sys.stdout):
                        yield response


def concat_adaption_prompts(sets: Sequence[Sequence[AdaptionPrompt]]) -> list[AdaptionPrompt]:
    """Concatenate the adaption prompts of a batch along B. The adapters of the samples must have the same K.

    A sample gets zero gates in layers that its adapter does not adapt, and in all layers if it has no adapter. If all
    samples share the same adaption prompts, these are returned without copies.
    """
    if all(prompts is sets[0] for prompts in sets):
        return list(sets[0])
    deepest = max(sets, key=len)
    zero = [prompt._replace(gate=torch.zeros_like(prompt.gate)) for prompt in deepest]
    padded = [zero[: len(deepest) - len(prompts)] + list(prompts) for prompts in sets]
    return [AdaptionPrompt(*map(torch.cat, zip(*layer))) for layer in zip(*padded)]


# ---------------------------------------------------------------------------------------------------
# The command


@command(cls=PromptCommand, context_settings={"show_default": True})
@click.argument("prompt", required=False)
@adapter_options
@option_group(
    "Prompt",
    option("--input", default="", show_default=False, help="Alpaca's input field: the context of the instruction."),
    option(
        "--image",
        "--video",
        "--audio",
        "media",
        type=click.Path(),
        multiple=True,
        help="An image, video or (with --encoder) sound that PROMPT is about, or a folder of them; repeatable.",
    ),
    *encoder_options,
    option("--template", type=click.Choice(NAMES), help="The prompt template.  [default: the adapter's, or alpaca]"),
    option(
        "--raw",
        is_flag=True,
        help="Continue the prompt as it is, without a template; the field input of --prompts is ignored.",
    ),
    option("--compare", is_flag=True, help="Respond with the base alone, and with every adapter."),
)
@option_group(
    "Sampling",
    option("--temperature", type=Real(0, 1e3), default=0.1, help="Temperature of the softmax; 0 is greedy decoding."),
    option("--top-p", type=Real(0, 1, min_open=True), default=0.75, help="Probability mass of nucleus sampling."),
    option("--greedy", is_flag=True, help="Same as --temperature 0."),
    option(
        "--strength", "gate_scale", type=Real(0, 1e3), default=1.0, help="Factor for the gates; 0 is the base alone."
    ),
    option("--max-new-tokens", type=Count(), default=256, help="Maximum number of tokens of a response."),
    *ending_options,
    option("--seed", type=SEED, default=0, help="Random seed for sampling."),
)
@option_group(
    "Many prompts",
    option(
        "--prompts",
        "jsonl",
        type=click.Path(),
        help="JSON or JSONL file of records with instruction or messages, and optionally input, image and adapter.",
    ),
    option("--images", "folder", type=click.Path(), help="Folder of the images.  [default: that of --prompts]"),
    option(
        "--out", type=click.Path(), help="JSONL file to write: the records, with each response in the field output."
    ),
    option("--batch-size", type=Count(), default=64, help="Number of prompts (or images) per batch."),
)
@option_group(
    "Memory and speed",
    *bits_options,
    compile_option,
    option(
        "--attention",
        type=click.Choice([*ATTENTIONS]),
        default="fused",
        help="Implementation of gated attention; the two are equivalent.",
    ),
)
def main(prompt, input, adapter_paths, base, compare, raw, template, jsonl, out, media, **options):
    """Respond to PROMPT. Responses go to standard output, or to the file --out, and messages to standard error.

    Without PROMPT, lines are read from standard input. On a terminal this is a conversation, in which /adapter NAME
    selects an adapter, and /none the base alone. Earlier turns are remembered if the template supports conversations;
    with alpaca, every line is a separate instruction. If the lines come from a pipe, the response to each is one line,
    with \\n for line breaks. With --prompts, records in a batch may name different adapters, or null for the base.
    """
    with one_line_errors(), inference_ranks():
        if compare and not adapter_paths:
            raise ValueError("--compare needs --adapter FILE")
        if raw and input:
            raise ValueError("--input is a field of the template, but --raw uses no template; omit one of them")
        if raw and template:
            raise ValueError(f"use only one of --template {template} and --raw")
        if media and (prompt is None or compare or len(adapter_paths) != 1):
            raise ValueError("--image, --video and --audio need PROMPT and exactly one --adapter, without --compare")
        if jsonl is not None or out is not None:
            check_file_options(jsonl, out, prompt, compare, input)

        device, dtype = select_device(options["device"], options["dtype"])
        loading = {"attention": options["attention"], "bits": options["bits"], "compiled": options["compile"]}
        model, tokenizer, adapters = load_with_adapters(adapter_paths, base, device, dtype, **loading)
        responder = Responder(
            model,
            tokenizer,
            adapters,
            gate_scale=options["gate_scale"],
            raw=raw,
            template=template,
            compiled=options["compile"],
            max_new_tokens=options["max_new_tokens"],
            temperature=0.0 if options["greedy"] else options["temperature"],
            top_p=options["top_p"],
            stop=options["stop"],
            repetition_penalty=options["repetition_penalty"],
            generator=torch.Generator(device).manual_seed(options["seed"]),
        )
        names = ["base", *adapters] if compare else [next(iter(adapters), "base")]
        if media:
            respond_about_media(responder, prompt, input, media, options)
        elif jsonl is not None:
            respond_to_file(responder, jsonl, out, options)
        elif prompt is not None:
            for name in names:
                click.echo(f"{printable(name)}: " if len(names) > 1 else "", nl=False)
                for piece in responder.respond(Request(prompt, input, name)):
                    click.echo(piece, nl=False)
                click.echo()
        elif sys.stdin is not None:
            chat(responder, input, names, sys.stdin)
        else:
            raise ValueError("there is no PROMPT, and no standard input to read one from")


# ---------------------------------------------------------------------------------------------------
# Images, and files of records


def respond_about_media(responder: Responder, prompt: str, input: str, media: Sequence[str], options: dict) -> None:
    """Print the response for every image, video or sound. With several, print one line each: path and response."""
    from encoders.media import files_in
    from formats.requests import attach_images

    paths = files_in(media, of_any_kind=options["encoder"] is not None)
    (name,) = responder.loaded.keys() - {"base"}
    requests = [Request(prompt, input, name)] * len(paths)
    requests = attach_images(requests, dict(enumerate(paths)), responder, options["vision_encoder"], options["encoder"])
    for path, response in zip(paths, responder.respond_all(requests, options["batch_size"], "image")):
        one_line = f"{printable(str(path))}: " + response.replace("\n", "\\n")
        click.echo(one_line if len(paths) > 1 else response)


def check_file_options(jsonl: str | None, out: str | None, prompt: str | None, compare: bool, input: str) -> None:
    """Raise ValueError if options contradict each other, and OSError or ValueError if --out is not writable."""
    if jsonl is None or out is None:
        raise ValueError("--prompts and --out must be used together")
    if prompt is not None or compare or input:
        raise ValueError("--prompts already contains all prompts; omit PROMPT, --input and --compare")
    if rank() == 0:
        require_writable(out)


def respond_to_file(responder: Responder, jsonl: str, out: str, options: dict) -> None:
    """Respond to the records of the file `jsonl`, and write them with the responses to the file `out`.

    Raises OSError or ValueError; the message names a record that is invalid, or whose prompt is too long.
    """
    from formats.requests import attach_images, read_requests, write_responses

    default = next((name for name in responder.loaded if name != "base"), "base")
    records, requests, images = read_requests(jsonl, responder.loaded, default, options["folder"])
    for index, request in enumerate(requests):
        with prefix_errors(f"{jsonl}: record {index}"):
            responder.prompt_ids_and_limit(request)
    used = {request.adapter: responder.loaded[request.adapter].adaption_prompts for request in requests}
    lengths = {name: len(prompts[0].embeddings[0]) for name, prompts in used.items() if prompts}
    if len(set(lengths.values())) > 1:
        found = f"adapters with different K (prompt embeddings per layer) cannot share a batch: {lengths}"
        raise ValueError(f"{jsonl}: {found}; put the records for each K in a separate file")
    requests = attach_images(requests, images, responder, options["vision_encoder"], options["encoder"])
    write_responses(out, records, responder.respond_all(requests, options["batch_size"], "record"))


# ---------------------------------------------------------------------------------------------------
# Conversations


class Conversation:
    """A conversation with one adapter, or with the base alone: its turns so far, and the KV cache of their tokens."""

    def __init__(self, responder: Responder, adapter: str):
        self.responder = responder
        self.adapter = adapter
        self.system = ""  # the system message
        self.turns: list[Turn] = []
        # The ids of the conversation. The cache contains a prefix of them, perhaps followed by discarded tokens.
        self.ids: list[int] = []
        self.cache = KVCache(responder.model, batch=1, capacity=0)

    def respond(self, instruction: str, input: str = "") -> Iterator[str]:
        """Yield the response in pieces; prefill only uncached tokens.

        Then store the two turns, if the template supports conversations. Raises ValueError if the prompt is too long.
        """
        responder = self.responder
        history = [Turn("system", self.system)] * bool(self.system) + self.turns
        request = Request(instruction, input, self.adapter, history=history)
        tokens, limit = responder.prompt_ids_and_limit(request)
        start = self.reuse_cached_prefix(tokens, limit)
        sampling = responder.sampling._replace(max_new_tokens=limit)
        new: list[int] = []
        adaption_prompts = responder.adaption_prompts(request)
        cached = {"cache": self.cache, "cached": [tokens[:start]]}
        steps = stream(responder.model, [tokens[start:]], adaption_prompts, sampling, responder.decode_step, **cached)
        yield from text_pieces(steps, responder.tokenizer, new, responder.stop)
        self.ids = tokens + new
        if responder.has_turns(self.adapter):
            self.turns.append(Turn("user", user_text(instruction, input)))
            self.turns.append(Turn("assistant", before_stop(responder.tokenizer.decode(new), responder.stop)))

    def reuse_cached_prefix(self, tokens: list[int], limit: int) -> int:
        """Keep the cached prefix of `tokens`; return its length. Make room for the rest and `limit` new tokens."""
        same = [old == new for old, new in zip(self.ids, tokens[:-1])] + [False]
        num_cached = min(same.index(False), int(self.cache.lengths))
        needed = len(tokens) + limit
        if self.cache.capacity < needed:
            self.cache = self.cache.longer_copy(needed + self.cache.capacity)
        self.cache.lengths.fill_(num_cached)
        self.ids = tokens
        return num_cached


def chat(responder: Responder, input: str, names: Sequence[str], stdin: TextIO) -> None:
    """Respond to every line of standard input.

    On a terminal, lines may be commands, and earlier turns are remembered if the template supports conversations. A
    ValueError for one line is printed, and the next line is read. Raises ValueError if standard input is an empty pipe.
    """
    conversations = {name: Conversation(responder, name) for name in responder.loaded}
    terminal = broadcast_from_rank0(stdin.isatty)
    commands = read_commands(stdin, terminal, responder.has_turns(names[0]))
    for number, (slash_command, text) in enumerate(commands, start=1):
        try:
            if slash_command in ("/adapter", "/none"):
                name = text if slash_command == "/adapter" else "base"
                if name not in conversations:
                    raise ValueError(f"there is no adapter {name!r}; choose from {', '.join(conversations)}")
                names = [name]
            elif slash_command in ("/reset", "/system"):
                if not all(map(responder.has_turns, names)):
                    advice = "omit --raw" if responder.raw else "use --template auto, llama-2, llama-3 or chatml"
                    raise ValueError(f"{slash_command} needs a template for conversations; {advice}")
                for conversation in conversations.values():
                    if slash_command == "/system":
                        conversation.system = text
                    else:
                        conversation.turns = []
            elif terminal:
                for name in names:
                    click.echo(f"{printable(name)}: " if len(names) > 1 else "", nl=False)
                    for piece in conversations[name].respond(text, input):
                        click.echo(piece, nl=False)
                    click.echo()
            else:
                with prefix_errors(f"standard input: line {number}"):
                    print_one_line(responder, text, input, names)
        except ValueError as error:  # the error concerns only this line
            click.echo(f"error: {error_line(error)}", err=True)
            click.echo()


def print_one_line(responder: Responder, instruction: str, input: str, names: Sequence[str]) -> None:
    """Print one line: the responses of `names` (adapters, or "base"), separated by tabs, with \\n for line breaks."""
    for number, name in enumerate(names, start=1):
        click.echo(f"{printable(name)}: " if len(names) > 1 else "", nl=False)
        for piece in responder.respond(Request(instruction, input, name)):
            click.echo(piece.replace("\n", "\\n"), nl=False)
        click.echo("\t" if number < len(names) else "\n", nl=False)


if __name__ == "__main__":
    run_command(main)
