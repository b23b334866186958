"""Ask a LLaMA, with or without an adapter: python generate.py --adapter out/adapter.safetensors "prompt"."""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import click
import torch
from torch import Tensor
from tqdm import tqdm

from adapter import Adapter, Prompt
from runtime.files import atomic_write
from formats.bases import load_llama
from runtime.cli import SEED, Real, device_options, one_line_errors
from data import TEMPLATES, Tokenizer, check_record, read_records, tokenize_prompt
from formats.encoders import load_vit
from convert import load_adapter, reading_of
from model import KVCache, LLaMA, select_device, fingerprint, quantize_int8, prepare_to_compile
from multimodal import (
    DEPTHS,
    ImageAdapter,
    require_file,
    features_by,
    features_of,
    files_in,
    load_function,
    tower_fingerprint,
)
from training.distributed import AllRanksError, launched_rank


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
    # Which of exponential variables with these rates is the least follows these probabilities: a draw like that of
    # torch.multinomial, which makes a GPU wait for the host.
    exponential = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = (probabilities / exponential).argmax(dim=-1, keepdim=True)  # (B, 1)
    return tokens.gather(-1, choice).squeeze(-1)


def next_logits(model: LLaMA, ids: Tensor, prompts: Sequence[Prompt], cache: KVCache) -> Tensor:
    """One step of decoding: of what follows ids (B,), the newest token of every row, as (B, V)."""
    hidden = model.hidden_states(ids[:, None], prompts, cache)  # (B, 1, C)
    cache.lengths += 1
    return model.output(hidden[:, 0])


def compiled_decoding(model: LLaMA) -> Callable[..., Tensor]:
    """`next_logits` under torch.compile; on a GPU, recorded as one CUDA graph at the first step of each generation.

    On a CPU the output head's weight, in place, comes to lie in memory row by row, as `Linear` likes it compiled.
    """
    compiled = torch.compile(next_logits)
    head = model.output.weight
    if head.device.type != "cuda":
        head.data = head.data.contiguous()
        return compiled
    recorded = None  # with the cache that it reads and writes, wherever that lies

    def decode(model: LLaMA, ids: Tensor, prompts: Sequence[Prompt], cache: KVCache) -> Tensor:
        nonlocal recorded
        if recorded is None or recorded[0] is not cache:
            recorded = None  # the memory of the one before
            recorded = (cache, *record(compiled, model, ids, prompts, cache))
        _, graph, newest, logits = recorded
        newest.copy_(ids)
        graph.replay()
        return logits

    return decode


def record(
    step: Callable[..., Tensor], model: LLaMA, ids: Tensor, prompts: Sequence[Prompt], cache: KVCache
) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    """A CUDA graph of one step, where it reads the ids, and where it leaves the logits; the cache stays as it was."""
    newest, lengths = ids.clone(), cache.lengths.clone()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(model, newest, prompts, cache)  # compiles; what it writes, the first replay will write again
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(model, newest, prompts, cache)
    cache.lengths.copy_(lengths)
    return graph, newest, logits


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
    decode: Callable[..., Tensor] = next_logits,
) -> Iterator[list[int | None]]:
    """Continue each of B rows of token ids; the rows may differ in length.

    Yields, step by step, B ids, None for a row that has ended. A row ends with `eos_id`, which is not
    yielded, and all of them after `max_new_tokens` steps or when all have ended. `decode` is `next_logits`, plain or
    compiled.
    """
    if not all(tokens):
        raise ValueError("a row without a token has nothing to continue: begin with <bos>")
    device = model.tok_embeddings.weight.device
    lengths = torch.tensor([len(row) for row in tokens], device=device)
    longest = int(lengths.max())
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=device)  # (B, T)

    cache = KVCache(model, batch=len(tokens), length=longest + max_new_tokens)
    last = torch.arange(longest, device=device) == lengths[:, None] - 1  # (B, T)
    logits = model.output(model.hidden_states(padded, prompts, cache, wanted=last))  # prefill: (B, V)
    cache.lengths += lengths

    newest, ended = None, [False] * len(tokens)
    at_once = 8 if device.type == "cuda" else 1  # a GPU goes on meanwhile, and is not waited for at each token
    for start in range(0, max_new_tokens, at_once):
        new = []
        for step in range(start, min(start + at_once, max_new_tokens)):
            if step:
                logits = decode(model, newest, prompts, cache)  # (B, V)
            newest = sample(logits, temperature, top_p, generator)  # (B,)
            new.append(newest)
        for ids in torch.stack(new).tolist():
            ended = [done or id == eos_id for done, id in zip(ended, ids)]
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
    deepest = max(sets, key=len)
    batch = []
    for depth, filler in enumerate(deepest):
        closed = filler._replace(gate=torch.zeros_like(filler.gate))
        layer = [prompts[depth - len(deepest)] if len(deepest) - depth <= len(prompts) else closed for prompts in sets]
        batch.append(Prompt(*(torch.cat(parts) for parts in zip(*layer))))
    return batch


def load(
    adapter_paths: Sequence[str], base: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[LLaMA, Tokenizer, dict[str, Adapter]]:
    """What a command needs to answer: adapters, whosever they are, by name (NAME=FILE, or the file's own).

    Raises OSError or ValueError where the files don't fit each other, or torchrun started several processes.
    """
    if launched_rank()[1] > 1:
        raise AllRanksError("only train.py runs under torchrun: answers are made by one process, on one device")
    paths: dict[str, str] = {}
    for path in adapter_paths:
        name, _, file = path.partition("=")
        if not file or Path(path).exists():
            name, file = Path(path).name if Path(path).is_dir() else Path(path).stem, path
        if name in paths or name == "base":
            raise ValueError(f"{file}: the name {name!r} is taken; give it another, --adapter NAME={file}")
        paths[name] = file
    if base is None and not paths:
        raise ValueError("nothing to run: give --adapter FILE, or --base PATH, or both")
    if base is None:
        first = next(iter(paths.values()))
        base = load_adapter(first).metadata.get("base")
        if base is None:
            raise ValueError(f"{first}: does not say which base it is for; give --base PATH")
    model, tokenizer = load_llama(base, dtype, device)
    config, weights, adapters = model.config, fingerprint(model), {}
    for name, path in paths.items():
        adapters[name] = load_adapter(path, heads=config.n_heads).to(device)
        metadata = adapters[name].metadata
        try:
            adapters[name].check_base(layers=config.n_layers, dim=config.dim, heads=config.n_heads)
        except ValueError as error:
            raise ValueError(f"{path} does not fit {base}: {error}") from None
        if metadata.get("prompt_template", "alpaca") not in TEMPLATES:
            raise ValueError(f"{path}: unknown prompt template {metadata['prompt_template']!r}")
        if metadata.get("base_fingerprint", weights) != weights:
            click.echo(f"warning: {path} was tuned on other weights than those of {base}", err=True)
        if "format" not in metadata:  # not a file of ours
            click.echo(f"{path}: {reading_of(adapters[name])}", err=True)
    return model, tokenizer, adapters


class Question(NamedTuple):
    """What is asked, and of whom."""

    instruction: str
    context: str
    name: str  # of an adapter, or "base"
    features: Tensor | None = None  # (F,), of the image that it is about


class Responder:
    """A base, the adapters over it by name, and how to sample: what makes an answer of a question.

    `speakers` are the prompts of every adapter, and none for "base". `sampling` is as for `stream`.
    """

    def __init__(
        self,
        model: LLaMA,
        tokenizer: Tokenizer,
        adapters: dict[str, Adapter],
        *,
        strength: float,
        raw: bool,
        **sampling,
    ):
        self.model, self.tokenizer, self.raw, self.sampling = model, tokenizer, raw, sampling
        self.adapters, self.strength = adapters, strength
        self.speakers: dict[str, Sequence[Prompt]] = {"base": ()}
        self.templates = {"base": "alpaca"}
        for name, adapter in adapters.items():
            with torch.no_grad():
                self.speakers[name] = adapter(strength=strength, dtype=model.tok_embeddings.weight.dtype)
            self.templates[name] = adapter.metadata.get("prompt_template", "alpaca")

    @torch.no_grad()
    def prompts(self, question: Question) -> Sequence[Prompt]:
        """Of the adapter that is asked, shifted by the image if there is one."""
        if question.features is None:
            return self.speakers[question.name]
        weight, adapter = self.model.tok_embeddings.weight, self.adapters[question.name]
        shift = adapter.condition(question.features[None].to(weight.device))  # (1, C)
        return adapter(shift, self.strength, weight.dtype)

    def prompt(self, question: Question) -> list[int]:
        """<bos> and the question, in its template."""
        instruction, context, name, _ = question
        if self.raw:
            return [self.tokenizer.bos_id, *self.tokenizer.encode(instruction)]
        return tokenize_prompt(self.tokenizer, instruction, context, self.templates[name])

    def tokens(self, question: Question) -> tuple[list[int], int]:
        """The prompt, and how many tokens its answer may have. Raises ValueError where it leaves no room."""
        tokens = self.prompt(question)
        room = (self.model.config.max_seq_len or math.inf) - len(tokens)
        if room < 1:
            seen = self.model.config.max_seq_len
            raise ValueError(f"the prompt has {len(tokens)} tokens, the base sees only {seen}")
        return tokens, min(self.sampling["max_new_tokens"], room)

    def answer(self, question: Question) -> Iterator[str]:
        """Piece by piece, as it is made."""
        tokens, limit = self.tokens(question)
        ids = stream(self.model, [tokens], self.prompts(question), **self.sampling | {"max_new_tokens": limit})
        return text_pieces(ids, self.tokenizer)

    def answer_batch(self, questions: Sequence[Question], bar: tqdm) -> list[str]:
        """Of as many questions, the names and images mixed; the bar moves on by all of them at the end."""
        tokens, limits = zip(*map(self.tokens, questions))
        prompts = concat_prompts(list(map(self.prompts, questions)))
        answers: list[list[int]] = [[] for _ in questions]
        for ids in stream(self.model, tokens, prompts, **self.sampling | {"max_new_tokens": max(limits)}):
            for answer, id, limit in zip(answers, ids, limits):
                if id is not None and len(answer) < limit:
                    answer.append(id)
            bar.set_postfix_str(f"{sum(map(len, answers))} tokens", refresh=False)
        bar.update(len(questions))
        return [self.tokenizer.decode(ids) for ids in answers]


def show(responder: Responder, instruction: str, context: str, names: Sequence[str], one_line: bool = False) -> None:
    """Print the answers of all names, labelled where there are several; on one line, parted by tabs, if asked."""
    answers = {name: responder.answer(Question(instruction, context, name)) for name in names}
    for number, (name, pieces) in enumerate(answers.items(), start=1):
        click.echo(f"{name}: " if len(names) > 1 else "", nl=False)
        for piece in pieces:
            click.echo(piece.replace("\n", "\\n") if one_line else piece, nl=False)
        click.echo("\t" if one_line and number < len(names) else "\n", nl=False)


class Eyes(NamedTuple):
    """What makes features of files: CLIP's vision tower (or None: the adapter's own), or a function of the user's."""

    tower: str | None = None
    encoder: str | None = None


def encode_images(paths: Sequence[Path], eyes: Eyes, adapter: Adapter | None, dtype: torch.dtype) -> list[Tensor]:
    """The features (F,) of every image. Raises OSError or ValueError where the adapter cannot see them."""
    if not isinstance(adapter, ImageAdapter):
        raise ValueError("an image needs an adapter with a projection, one that was tuned on images")
    metadata, made_for = adapter.metadata, adapter.projection[0].in_features
    if eyes.tower is not None and eyes.encoder is not None:
        raise ValueError("--clip and --encoder: one of them makes the features of an image")
    if eyes.encoder is not None:
        theirs = metadata.get("encoder", metadata.get("tower", eyes.encoder))
        if Path(theirs).name != Path(eyes.encoder).name:
            click.echo(f"warning: the adapter was tuned with {theirs}, not with {eyes.encoder}", err=True)
        features = features_by(paths, load_function(eyes.encoder))
        if len(features[0]) != made_for:
            raise ValueError(f"{eyes.encoder}: has {len(features[0])} features, the adapter was made for {made_for}")
        return features
    tower_path = eyes.tower or metadata.get("tower")
    if tower_path is None and "encoder" in metadata:
        raise ValueError(f"the adapter was tuned with {metadata['encoder']}; to run that code, give --encoder")
    if tower_path is None:
        raise ValueError("the adapter does not say which vision tower it is for; give --clip PATH")
    tower, depths = load_vit(tower_path, dtype, adapter.gates.device), int(metadata.get("tower_depths", DEPTHS))
    if depths * tower.config.dim != made_for:
        raise ValueError(f"{tower_path}: has {depths * tower.config.dim} features, the adapter was made for {made_for}")
    if metadata.get("tower_fingerprint", "") not in ("", tower_fingerprint(tower)):
        click.echo(f"warning: the adapter was tuned with other weights than those of {tower_path}", err=True)
    return features_of(paths, tower, depths)


def describe(responder: Responder, questions: dict[str, Question], batch_size: int) -> None:
    """Print the answer about an image; about several, each on a line behind the image's name, line breaks as \\n."""
    if len(questions) == 1:
        click.echo("".join(responder.answer(*questions.values())))
        return
    names = list(questions)
    with tqdm(total=len(names), unit="image", file=sys.stderr) as bar:
        for start in range(0, len(names), batch_size):
            part = names[start : start + batch_size]
            for name, answer in zip(part, responder.answer_batch([questions[name] for name in part], bar)):
                bar.write(f"{name}: " + answer.replace("\n", "\\n"), file=sys.stdout)


def chat(responder: Responder, context: str, names: Sequence[str], stdin: TextIO) -> None:
    """Answer every line; on a terminal, /adapter NAME and /none change who does."""
    terminal = stdin.isatty()
    while True:
        click.echo("> " if terminal else "", nl=False, err=True)
        line = stdin.readline()
        if not line:
            return
        line = line.rstrip("\r\n")
        try:
            if terminal and line.split(" ")[0] in ("/adapter", "/none"):
                name = line.removeprefix("/adapter").strip() if line != "/none" else "base"
                if name not in responder.speakers:
                    raise ValueError(f"no adapter {name!r}; there are {', '.join(responder.speakers)}")
                names = [name]
            elif line or not terminal:
                show(responder, line, context, names, one_line=not terminal)
        except ValueError as error:  # with this line alone
            click.echo(f"error: {error}", err=True)
            click.echo()


def answer_file(
    responder: Responder, source: str, out: str, default: str, batch_size: int, eyes: Eyes, dtype: torch.dtype
) -> None:
    """Write the records of a JSONL file again, each with its output. What is wrong is raised before any is answered.

    An image is looked for from the folder of the file.
    """
    if not Path(out).absolute().parent.is_dir() or Path(out).is_dir():
        raise ValueError(f"--out {out}: is a folder, or in one that does not exist")
    records, questions, pictured = read_records(source), [], defaultdict(dict)
    for index, record in enumerate(records):
        where = f"{source}: record {index}"
        example = check_record(record, where, needed=["instruction"])
        name = record.get("adapter", default)
        name = "base" if name is None else name
        if not isinstance(name, str) or name not in responder.speakers:
            raise ValueError(f"{where}: adapter {name!r} is none of {list(responder.speakers)}")
        questions.append(Question(example.instruction, example.input, name))
        try:
            responder.tokens(questions[-1])
            if example.image:
                pictured[name][index] = require_file(Path(source).parent / example.image)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{where}: {error}") from None
    for name, pictures in pictured.items():
        for index, features in zip(pictures, see(list(pictures.values()), eyes, responder.adapters.get(name), dtype)):
            questions[index] = questions[index]._replace(features=features)
    asked = {question.name: responder.speakers[question.name] for question in questions}
    lengths = {name: len(prompts[0].tokens[0]) for name, prompts in asked.items() if prompts}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{source}: adapters of different lengths cannot share a batch: {lengths}")
    bar = tqdm(total=len(records), unit="record", file=sys.stderr)
    # What UTF-8 cannot say (half a character) is written as its escape, which is what JSON reads.
    with atomic_write(out) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file, bar:
        for start in range(0, len(records), batch_size):
            batch = slice(start, start + batch_size)
            for record, output in zip(records[batch], responder.answer_batch(questions[batch], bar)):
                file.write(json.dumps(record | {"output": output}, ensure_ascii=False) + "\n")


@click.command(context_settings={"show_default": True})
@click.argument("prompt", required=False)
@click.option(
    "--adapter", "adapter_paths", type=click.Path(), multiple=True, help="FILE or NAME=FILE; several may be given."
)
@click.option("--base", type=click.Path(), help="The base model.  [default: the one that the adapter's file names]")
@click.option("--input", "context", default="", help="Alpaca's input field: what the instruction is about.")
@click.option(
    "--image",
    "--video",
    "--audio",
    "images",
    type=click.Path(),
    multiple=True,
    help="What PROMPT is about; several, or folders.",
)
@click.option(
    "--clip", "tower", type=click.Path(), help="Its vision tower.  [default: the one that the adapter's file names]"
)
@click.option("--encoder", help="A function of yours, FILE.py:NAME, instead: it makes (M, Cv) numbers of a file.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, without the instruction template.")
@click.option("--strength", type=Real(0, 1e3), default=1.0, help="Scales the gates; 0 is the base alone.")
@click.option("--compare", is_flag=True, help="Answer with the base alone, and with every adapter.")
@click.option("--temperature", type=Real(0, 1e3), default=0.1, help="0 is greedy.")
@click.option("--top-p", type=Real(0, 1, min_open=True), default=0.75)
@click.option("--greedy", is_flag=True, help="Always the likeliest token: --temperature 0.")
@click.option("--seed", type=SEED, default=0)
@click.option("--max-new-tokens", type=click.IntRange(1, 2**17), default=256)
@click.option("--prompts", "prompt_file", type=click.Path(), help="JSONL of instruction, input and adapter, to answer.")
@click.option("--out", type=click.Path(), help="Where the answers to --prompts go: the same records with an output.")
@click.option("--batch-size", type=click.IntRange(1), default=64, help="Records of --prompts answered at once.")
@click.option("--int8", is_flag=True, help="Hold the layers' weights in 8 bits.")
@click.option("--compile", is_flag=True, help="torch.compile the step from token to token: slow to start, then faster.")
@device_options
def main(
    prompt,
    adapter_paths,
    base,
    device,
    dtype,
    context,
    images,
    tower,
    encoder,
    compare,
    prompt_file,
    out,
    batch_size,
    **how,
):
    """Answer PROMPT. The answer goes to standard output, everything else to standard error.

    Without PROMPT, a terminal becomes a conversation in which every line is an instruction of its own, and
    /adapter NAME or /none says who is to answer; from a pipe, every line is answered by exactly one line, line breaks
    within it as \\n. With --prompts, records that name different adapters (or null, the base) share a batch.
    """
    with one_line_errors(ValueError, OSError, torch.OutOfMemoryError):
        if compare and not adapter_paths:
            raise ValueError("--compare needs --adapter FILE")
        if how["raw"] and context:
            raise ValueError("--input is a field of the template that --raw does without")
        if (prompt_file is None) != (out is None):
            raise ValueError("--prompts and --out go together")
        if prompt_file is not None and (prompt is not None or compare or context):
            raise ValueError("--prompts names all there is to answer: no PROMPT, --input or --compare beside it")
        if images and (prompt is None or compare or len(adapter_paths) != 1):
            raise ValueError("--image goes with a PROMPT and one --adapter")
        device, dtype = select_device(device, dtype)
        if how["compile"]:
            prepare_to_compile(device, how["int8"])
        model, tokenizer, adapters = load(adapter_paths, base, device, dtype)
        if how.pop("int8"):
            quantize_int8(model)
        if how.pop("greedy"):
            how["temperature"] = 0.0
        if how.pop("compile"):
            how["decode"] = compiled_decoding(model)
        generator = torch.Generator(device).manual_seed(how.pop("seed"))
        responder = Responder(model, tokenizer, adapters, **how, generator=generator, eos_id=tokenizer.eos_id)
        first = next(iter(adapters), "base")
        names = ["base", *adapters] if compare else [first]
        if images:
            paths = files_in(images, of_any_kind=encoder is not None)
            seen = zip(map(str, paths), encode_images(paths, Eyes(tower, encoder), adapters[first], dtype))
            questions = {path: Question(prompt, context, first, features) for path, features in seen}
            describe(responder, questions, batch_size)
        elif prompt_file is not None:
            answer_file(responder, prompt_file, out, first, batch_size, Eyes(tower, encoder), dtype)
        elif prompt is not None:
            show(responder, prompt, context, names)
        elif sys.stdin is not None:
            chat(responder, context, names, sys.stdin)
        else:
            raise ValueError("no PROMPT, and no standard input to read one from")


if __name__ == "__main__":
    main()
