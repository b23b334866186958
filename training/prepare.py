"""From the options of a training run to all that it needs: a base, an adapter, examples; each of them checked.

One road is for a LLaMA, the other for an encoder with a head; both end in `Prepared`.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from torch import nn

from toy import digits
from encoder_tuning import heads
from toy import almanac as toy
from adapter import Adapter
from formats.bases import load_llama, read_base
from data import Example, Tokenizer, Tokens, tokenize
from formats.encoders import load_encoder, load_vit
from model import compile_layers, fingerprint, hash_of, quantize_int8, number_of_weights, prepare_to_compile
from multimodal import DEPTHS, ImageAdapter, features_by, features_of, load_function, tower_fingerprint
from training.distributed import AllRanksError, choose_strategy, broadcast_from_rank0, local_rank, rank, fsdp_sharder, sync_errors
from training.step import RESPONSES, Responses
from tasks import read_task, with_images


def check_source(options: dict) -> None:
    """Raise ValueError where options about the data contradict each other."""
    if options["tower"] is not None and options["encoder"] is not None:
        raise ValueError("--clip and --encoder: one of them makes the features of an image")
    if options["data"] is not None and options["toy"] != "text":
        raise ValueError(f"--toy {options['toy']} brings its own data: leave out --data {options['data']}")
    if options["data"] is None:
        given = [name for name in ("tower", "encoder", "images") if options[name] is not None]
        if given or options["task"] != "instructions":
            what = "--task" if not given else {"tower": "--clip"}.get(given[0], f"--{given[0]}")
            raise ValueError(f"{what} needs --data FILE: the toy brings all that it needs")


def examples_for(options: dict) -> tuple[list[Example], list[Path]]:
    """The examples to use, and the images of those that have one. Without --clip or --encoder none have.

    Raises OSError or ValueError, naming the record.
    """
    data = options["data"]
    if data is not None:
        folder = Path(options["images"] or Path(data).parent)
        examples = read_task(options["task"], data, folder)
    elif options["toy"] == "text":
        folder, examples = Path("."), [question.example for question in toy.instructions()["tuning"]]
    else:
        folder = digits.make()
        examples = digits.tuning(folder)
        options["tower"] = str(folder / "tower") if options["toy"] == "images" else None
    if data is None:
        examples = [example._replace(name=f"toy question {i}") for i, example in enumerate(examples)]
    examples = examples[: options["limit"]]
    if options["tower"] is None and options["encoder"] is None:
        return [example._replace(image="") for example in examples], []
    try:
        used, pictures = with_images(examples, folder, options["skip_missing"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{data}: {error}") from None
    if len(used) < len(examples) and rank() == 0:
        click.echo(f"{len(examples) - len(used):,} of {len(examples):,} left out: their image is not there", err=True)
    if not pictures:
        raise ValueError(f"{data}: none of its {len(examples)} examples has an image that is there")
    return used, pictures


def check_warmup(options: dict) -> None:
    """Raise ValueError where the warm-up takes the whole run."""
    if options["warmup_epochs"] >= options["epochs"]:
        warmup = f"--warmup-epochs {options['warmup_epochs']:g} of --epochs {options['epochs']}"
        raise ValueError(f"{warmup}: the learning rate would never get to fall")


def check_limits(options: dict, base: Path, layers: int, positions: float) -> None:
    """Fill in how many layers get prompts, where that is not said; raise ValueError at more than the base has."""
    if options["layers"] is None:
        options["layers"] = max(1, layers - 2)
    for name, limit in (("layers", layers), ("max_seq_len", positions)):
        if options[name] > limit:
            raise ValueError(f"--{name.replace('_', '-')} {options[name]}: {base} has only {limit}")


def check_ranks(options: dict) -> None:
    """Raise ValueError, on all ranks, where they have different options."""
    paths = ("out", "data", "base", "tower", "encoder", "images", "features")  # which may be others on another machine
    theirs = broadcast_from_rank0(lambda: {name: value for name, value in options.items() if name not in paths})
    with sync_errors():
        for name, value in theirs.items():
            if options[name] != value:
                raise ValueError(f"{name} is {options[name]} here, {value} on the first rank")


class Prepared(NamedTuple):
    """All that training needs."""

    model: nn.Module
    tokenizer: Tokenizer | None
    adapter: Adapter
    training: list
    validation: list  # held out
    counts: dict[str, int]  # of examples
    objective: Responses


def prepare_encoder(options: dict, dtype: torch.dtype, device: torch.device) -> Prepared:
    """All that training an encoder needs, checked. Fills in the options that depend on the base.

    Raises OSError or ValueError.
    """
    task = options["task"]
    for name in ("base", "data"):
        if options[name] is None:
            raise ValueError(f"--task {task} needs --{name}")
    others = {"int8": "--int8", "compile": "--compile", "checkpoint_activations": "--checkpoint-activations"}
    others |= {"tower": "--clip", "encoder": "--encoder", "images": "--images", "skip_missing": "--skip-missing"}
    for name, flag in others.items():
        if options[name]:
            raise ValueError(f"{flag} is for a LLaMA: --task {task} does without")
    if options["strategy"] == "fsdp":
        raise ValueError(f"--strategy fsdp is for a LLaMA: --task {task} has its base whole on every rank")
    options["strategy"] = "ddp"
    check_warmup(options)
    base = Path(options["base"])
    model, head = load_encoder(base, dtype, device)
    heads.check_task(task, model, base)
    config = model.config
    check_limits(options, base, config.n_layers, math.inf if task == "image-classification" else config.max_length)
    lesson = heads.read_lesson(task, model, base, Path(options["data"]), options["max_seq_len"], limit=options["limit"])
    options["base_fingerprint"] = heads.fingerprint(model)
    told = repr([lesson.classes, *((row.name, row.labels) for row in lesson.examples)])
    content = hashlib.sha256(told.encode(errors="backslashreplace"))
    for row in lesson.examples:
        content.update(row.inputs.numpy().tobytes())
    options["data_hash"] = content.hexdigest()[:16]
    training, validation = split(lesson.examples, options["val_size"], options["seed"])

    shape = {"layers": options["layers"], "length": options["length"]}
    generator = torch.Generator().manual_seed(options["seed"])
    if not heads.suits(head, task):
        head = None
    adapter = heads.head_adapter(model, head, len(lesson.classes) or 2, **shape, generator=generator)
    adapter.metadata |= {
        "task": task,
        "classes": json.dumps(lesson.classes),
        "base": str(base.resolve()),
        "base_layers": str(config.n_layers),
        "base_fingerprint": options["base_fingerprint"],
        "max_seq_len": str(options["max_seq_len"]),
        "data": Path(options["data"]).name,
        "examples": str(len(training)),
    } | {name: str(options[name]) for name in ("epochs", "batch_size", "lr", "seed")}
    counts = {"examples": len(training), "held_out": len(validation), "dropped": lesson.dropped, "cut": lesson.cut}
    objective = heads.Labels(spans=task == "question-answering")
    return Prepared(model, None, adapter, training, validation, counts, objective)


def prepare(
    options: dict, examples: list[Example], pictures: list[Path], dtype: torch.dtype, device: torch.device
) -> Prepared:
    """All that training a LLaMA needs, checked.

    Fills in the options that depend on the base. Raises OSError or ValueError.
    """
    with sync_errors():
        check_warmup(options)
        if options["compile"]:
            prepare_to_compile(device, options["int8"])
        if options["base"] is None and local_rank() == 0:
            toy.make_base()  # one of a machine's ranks for all of them
    with sync_errors():
        base = toy.make_base() if options["base"] is None else Path(options["base"])
        config, weights = read_base(base)
        check_limits(options, base, config.n_layers, config.max_seq_len or math.inf)
    size = number_of_weights(config) * dtype.itemsize
    options["strategy"] = choose_strategy(options["strategy"], size, device)
    if options["strategy"] == "fsdp" and (options["int8"] or options["compile"]):
        raise AllRanksError("--int8 and --compile need the base whole on every rank: --strategy ddp")
    split_up = fsdp_sharder(device) if options["strategy"] == "fsdp" else None
    with sync_errors():
        model, tokenizer = load_llama(base, dtype, device, split=split_up, opened=(config, weights))
        if options["int8"]:
            quantize_int8(model)
            options["checkpoint_activations"] = True
        if options["compile"]:
            compile_layers(model)
    options["base_fingerprint"] = fingerprint(model)
    check_ranks(options)
    features: list[torch.Tensor] = []
    with sync_errors():
        if options["encoder"] is not None:
            features = features_by(pictures, load_function(options["encoder"]))
            options["features_hash"] = hash_of(features)
        elif pictures:
            tower = load_vit(options["tower"], dtype, device)
            options["tower_fingerprint"] = tower_fingerprint(tower)
            if local_rank() == 0:  # which keeps them for a machine's other ranks
                features = features_of(pictures, tower, cache=options["features"])
    with sync_errors():
        if pictures and options["encoder"] is None and local_rank() > 0:
            features = features_of(pictures, tower, cache=options["features"])
        tokens, cut = tokenize(tokenizer, examples, options["max_seq_len"], features)
        training, validation = split(tokens, options["val_size"], options["seed"])
    counts = {
        "examples": len(training),
        "held_out": len(validation),
        "dropped": len(examples) - len(tokens),
        "cut": cut,
    }
    shape = {"layers": options["layers"], "length": options["length"], "dim": config.dim, "heads": config.n_heads}
    generator = torch.Generator().manual_seed(options["seed"])
    if pictures:
        adapter = ImageAdapter(features=len(features[0]), generator=generator, **shape).to(device)
    else:
        adapter = Adapter(generator=generator, **shape).to(device)
    adapter.metadata = {
        "base": str(base.resolve()),
        "base_layers": str(config.n_layers),
        "base_fingerprint": options["base_fingerprint"],
        "prompt_template": "alpaca",
        "data": f"toy {options['toy']}" if options["data"] is None else Path(options["data"]).name,
        "examples": str(len(training)),
    } | {name: str(options[name]) for name in ("epochs", "batch_size", "lr", "seed")}
    if options["encoder"] is not None:
        adapter.metadata |= {"encoder": options["encoder"]}
    elif pictures:
        adapter.metadata |= {
            "tower": str(Path(options["tower"]).resolve()),
            "tower_fingerprint": options["tower_fingerprint"],
            "tower_depths": str(DEPTHS),
        }
    return Prepared(model, tokenizer, adapter, training, validation, counts, RESPONSES)


def split(examples: list[Tokens], val_size: float, seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """To train on, and held out. Raises ValueError where nothing is left to train on."""
    held_out = round(val_size * len(examples)) if val_size < 1 else round(val_size)
    if held_out >= len(examples):
        raise ValueError(f"--val-size holds out {held_out} of the {len(examples)} examples that fit: none is left")
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    return [examples[i] for i in order[held_out:]], [examples[i] for i in order[:held_out]]
