"""Tune an adapter: python train.py --data alpaca.json --base LLaMA-7B --out out.

In this order: the configuration, the optimizer and its learning rate, the loss, one step, the loop; then what a run
is made of, a run with its files, and the command. Notation as in adapter.py.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
from click.core import ParameterSource
from cloup import command
from torch import Tensor, nn

from adapter import ATTENTIONS, Adapter
from data import IGNORE, Batch, Example, Tokenizer, epoch_batches, hold_out, tokenize
from data import micro_batches, num_targets, split_over_ranks
from formats.bases import base_fingerprint, load_llama, read_base
from formats.chat_templates import NAMES, load_template
from formats.hub import find_base
from formats.tensors import named
from model import LLaMA, num_parameters
from multimodal import ImageAdapter
from runtime import distributed
from runtime.compilation import compile_layers, prepare_to_compile
from runtime.device import select_device
from runtime.distributed import all_reduce_sum, local_rank, rank, sync_errors, world_size
from runtime.errors import AllRanksError, memory_errors
from runtime.files import resolved
from runtime.quantization import quantizer
from tasks import TASKS, see_images, with_images
from toy import TOYS
from training.initial import begin_with, choose_learnt, shaped_as_initial
from training.launch import launch, say
from training.loss import chunked_cross_entropy
from training.options import BaseOptions, DataOptions, RunOptions, fixed_options, pick
from training.options import base_options, data_options, memory_options, optimisation_options, run_options
from training.run import Prepared, Recorder, Step
from training.run_files import run_state
from training.sharding import choose_strategy, fsdp_sharder


@dataclass(frozen=True)
class TrainConfig:
    """Every hyper-parameter, the paper's where it says one (section 4.1)."""

    layers: int | None = None  # L, the topmost so many; None is all but two: 30 of 32 in the paper
    length: int = 10  # K
    epochs: int = 5
    warmup_epochs: float = 2  # the learning rate rises over these, then falls along half a cosine to zero
    batch_size: int = 64  # examples of an optimizer step, over all ranks
    blr: float = 9e-3  # a base rate, as the authors have it: for a batch of 256
    lr: float | None = None  # the peak itself, in place of blr
    weight_decay: float = 0.02  # of the prompts; none of the gates, which it would pull shut
    gradient_clip: float | None = None  # the highest norm of the gradient: off, as in the paper
    max_seq_len: int | None = None  # tokens; longer responses are cut. None is 512, or all that the base can see
    val_size: float = 0.02  # held out: a share if below 1, else a number of examples
    seed: int = 0  # of prompts, what is held out, and the order of examples
    micro_batch_tokens: int = 8192  # positions of one forward pass: memory, not what is learnt
    checkpoint_activations: bool = False  # run each layer again for the backward pass: less memory, more time

    @property
    def peak_lr(self) -> float:
        return self.blr * self.batch_size / 256 if self.lr is None else self.lr

    def for_base(self, base: Path | str, n_layers: int, context: float) -> "TrainConfig":
        """With L decided. Raises ValueError at more than a base of so many layers, reading so far, has."""
        if self.warmup_epochs >= self.epochs:
            warmup = f"--warmup-epochs {self.warmup_epochs:g} of --epochs {self.epochs}"
            raise ValueError(f"{warmup}: the learning rate would never get to fall; give fewer, or 0")
        layers = max(1, n_layers - 2) if self.layers is None else self.layers
        config = replace(self, layers=layers, max_seq_len=self.max_seq_len or min(512, context))
        for name, limit in (("layers", n_layers), ("max_seq_len", context)):
            if getattr(config, name) > limit:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: {base} has only {limit}")
        return config


# AdamW moves a number by about the learning rate in each step, however large it is. What suits the prompts would throw
# over the projection of images, or a head, whose weights are far smaller.
LINEAR_LR_SCALE = 0.1
HIGH_LR = 0.1  # nothing was seen to learn above it


def make_optimizer(adapter: Adapter, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the adapter alone, the base has no part in it. A group's rate is the schedule's times its `scale`."""
    learnt = {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    prompts, gates = ([learnt.pop(name)] if name in learnt else [] for name in ("prompts", "gates"))
    groups = [
        {"params": prompts, "weight_decay": weight_decay, "scale": 1.0},
        {"params": gates, "weight_decay": 0.0, "scale": 1.0},
        {"params": list(learnt.values()), "weight_decay": weight_decay, "scale": LINEAR_LR_SCALE},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.95))


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Of step 0 .. total-1: up in a line over `warmup` steps, then down to zero along half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ---------------------------------------------------------------------------------------------------
# The loss, the step, the loop

EMPTY_BATCH = Batch(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORE))


def response_loss(model: LLaMA, adapter: Adapter, batch: Batch | None, checkpoint_activations: bool = False) -> Tensor:
    """Cross entropy, summed over the R response tokens of a micro-batch; None is a batch without any.

    The output head sees the positions that have a loss, and no others: prompts are half of Alpaca.
    """
    batch = batch or EMPTY_BATCH
    device, dtype = model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)  # (B, T)
    if batch.features is None:
        prompts = adapter(dtype=dtype)
    else:
        prompts = adapter(batch.features.to(device), batch.has_image.to(device), dtype=dtype)
    hidden = model.hidden_states(inputs, prompts, checkpoint_activations=checkpoint_activations)  # (B, T, C)
    loss_mask = targets != IGNORE  # (B, T)
    return chunked_cross_entropy(hidden[loss_mask], model.output.weight, targets[loss_mask])


class Objective(NamedTuple):
    """What is learnt, from examples that have a `size` in positions and a `name`."""

    num_targets: Callable[[Sequence], int]  # the loss is a mean over so many
    micro_batches: Callable[[Sequence, int], list]  # of at most so many positions each
    loss_sum: Callable[..., Tensor]  # as response_loss; it has a gradient for None, too


RESPONSES = Objective(num_targets, micro_batches, response_loss)


def train_step(
    model: nn.Module,
    adapter: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence,
    lr: float,
    config: TrainConfig,
    objective: Objective = RESPONSES,
) -> float:
    """One optimizer step on a batch, in micro-batches and over all ranks; returns the mean loss before it.

    Raises FloatingPointError, with the adapter as before, where the loss or its gradient is not finite; ValueError
    where there is no memory left for the optimizer's own work.
    """
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    optimizer.zero_grad()
    # Dividing by the targets of the whole batch, not of each part, makes the parts' gradients add up to the gradient of
    # one large batch, however it is split, and over however many ranks.
    targets = objective.num_targets(examples)
    loss = torch.zeros((), device=parameters[0].device)
    shares = [
        objective.micro_batches(part, config.micro_batch_tokens) for part in split_over_ranks(examples, world_size())
    ]
    mine, rounds = shares[rank()], max(map(len, shares))
    for batch in mine + [None] * (rounds - len(mine)):  # a rank out of work goes along: FSDP gathers layers together
        part = objective.loss_sum(model, adapter, batch, config.checkpoint_activations) / targets
        part.backward()
        loss += part.detach()
    for parameter in parameters:
        if parameter.grad is None:  # of a projection, where there was no image
            parameter.grad = torch.zeros_like(parameter)
    all_reduce_sum([loss, *(parameter.grad for parameter in parameters)])

    norm = nn.utils.clip_grad_norm_(parameters, config.gradient_clip or math.inf)
    if not (loss.isfinite() and norm.isfinite()):
        names = ", ".join(dict.fromkeys(example.name for example in examples))
        raise FloatingPointError(f"a loss of {loss.item()} led to values that are not finite, from {names}")
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    try:
        with memory_errors():
            optimizer.step()
    except torch.OutOfMemoryError as error:  # some parameters may have moved: only what is on the disk is whole
        raise ValueError(f"no memory for the optimizer's step: {error}; what was saved last stands") from None
    return loss.item()


@torch.no_grad()
def mean_loss(
    model: nn.Module, adapter: nn.Module, examples: Sequence, config: TrainConfig, objective: Objective = RESPONSES
) -> float:
    """Mean loss over all targets of the examples, the same to the last bit on any number of ranks."""
    batches = objective.micro_batches(examples, config.micro_batch_tokens)
    losses = torch.zeros(
        math.ceil(len(batches) / world_size()) * world_size(), device=next(adapter.parameters()).device
    )
    batches += [None] * (len(losses) - len(batches))
    for i in range(rank(), len(batches), world_size()):
        losses[i] = objective.loss_sum(model, adapter, batches[i])
    all_reduce_sum([losses])
    return sum(losses.tolist()) / objective.num_targets(examples)


def training_steps(
    model: nn.Module,
    adapter: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence,
    config: TrainConfig,
    objective: Objective = RESPONSES,
    first_step: int = 0,
) -> Iterator[Step]:
    """The training loop: takes the steps from `first_step` on, and says each of them.

    The order of examples and the learning rate follow from the step alone, and nothing on the way is random: a resumed
    run goes on as if it had never stopped, on whatever number of ranks. Raises as `train_step`, and RankLostError.
    """
    sizes = [example.size for example in examples]
    steps_per_epoch = math.ceil(len(examples) / config.batch_size)
    total, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    for step in range(first_step, total):
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0 or step == first_step:
            batches = epoch_batches(sizes, config.batch_size, config.seed, epoch)
        lr = learning_rate(step, peak=config.peak_lr, warmup=warmup, total=total)
        start = time.perf_counter()
        with distributed.detect_lost_ranks(), memory_errors():
            batch = [examples[i] for i in batches[position]]
            loss = train_step(model, adapter, optimizer, batch, lr, config, objective)
        yield Step(step + 1, epoch, loss, lr, sum(example.size for example in batch), time.perf_counter() - start)


# ---------------------------------------------------------------------------------------------------
# From the options to all that the loop needs


def read_training_data(source: DataOptions) -> tuple[list[Example], DataOptions]:
    """The examples to use; and where their images are and what sees them, as the options or the toy say.

    Raises OSError or ValueError, naming the record.
    """
    if source.data is None:
        examples, source = TOYS[source.toy].examples(source)
    else:
        source = replace(source, images=source.images or str(Path(source.data).parent))
        examples = TASKS[source.task].read(source.data, source.images)
    examples = examples[: source.limit]
    if source.template is None:
        source = replace(source, template="auto" if any(example.turns for example in examples) else "alpaca")
    if source.tower is None and source.encoder is None:
        return [replace(example, image="") for example in examples], source
    used = with_images(examples, source.images, source.skip_missing, source.data or f"the toy {source.toy}")
    if len(used) < len(examples):
        say(f"{len(examples) - len(used):,} of {len(examples):,} left out: their image is not there")
    if not any(example.image for example in used):
        raise ValueError(f"{source.data}: none of its {len(examples)} examples has an image that is there")
    return used, source


def load_base(base: BaseOptions, path: Path, opened: tuple, device: torch.device) -> tuple[LLaMA, Tokenizer, str, str]:
    """The frozen base, its tokenizer, its fingerprint, and the strategy: "ddp" (whole on every rank) or "fsdp".

    What travels with ddp is the gradient of the adapter, summed in `train_step`. With fsdp the layers are split over
    the ranks as well, and gathered when it is their turn. Raises ValueError.
    """
    dtype = getattr(torch, base.dtype)
    bits = base.bits and int(base.bits)
    size = num_parameters(opened[0]) * (bits or 8 * dtype.itemsize) // 8
    strategy = choose_strategy(base.strategy, size, device)
    if strategy == "fsdp" and (bits or base.compile):
        raise AllRanksError("--bits and --compile need the base whole on every rank: --strategy ddp")
    shard = fsdp_sharder(device) if strategy == "fsdp" else None
    with sync_errors():
        quantize = quantizer(bits, device)
        model, tokenizer = load_llama(path, dtype, device, ATTENTIONS[base.attention], shard, opened, quantize)
        if base.compile:
            compile_layers(model.layers)
    return model, tokenizer, base_fingerprint(*opened), strategy


def prepare(
    config: TrainConfig, source: DataOptions, base: BaseOptions, examples: list[Example], device: torch.device
) -> tuple[Prepared, TrainConfig]:
    """All that training a LLaMA needs, checked; and the configuration with L decided. Raises OSError or ValueError."""
    with sync_errors():
        if base.compile:
            prepare_to_compile(device, base.bits)
        path = TOYS[source.toy].base() if base.base is None else find_base(base.base)
        shape, weights = read_base(path)
        asked, config = config.max_seq_len, config.for_base(path, shape.n_layers, shape.max_seq_len or math.inf)
        if asked is None and config.max_seq_len < 512:
            say(f"--max-seq-len {config.max_seq_len}: {path} sees no more")
        if base.bits == "8":  # autograd would keep the widened weights of all layers
            config = replace(config, checkpoint_activations=True)
    model, tokenizer, fingerprint, strategy = load_base(base, path, (shape, weights), device)
    options = fixed_options(config, source, base, examples) | {"base_fingerprint": fingerprint}
    distributed.check_same_on_all_ranks(options | asdict(config) | {"strategy": strategy, "compile": base.compile})

    shape = {"layers": config.layers, "length": config.length, "dim": model.config.dim, "heads": model.config.n_heads}
    generator = torch.Generator().manual_seed(config.seed)
    about = {"base": resolved(base.base or path), "base_layers": str(model.config.n_layers)}
    if any(example.image for example in examples):
        examples, encoder = see_images(examples, source, getattr(torch, base.dtype), device)
        features = [example.features for example in examples if example.features is not None]
        options |= encoder.fixed_options(features)
        about |= encoder.metadata
        adapter = ImageAdapter(features=len(features[0]), generator=generator, **shape).to(device)
    else:
        adapter = Adapter(generator=generator, **shape).to(device)
    with sync_errors():
        template = load_template(source.template, tokenizer)
    with sync_errors(), named(source.data or f"the toy {source.toy}"):
        tokens, cut = tokenize(template, examples, config.max_seq_len)
        training, validation = hold_out(tokens, config.val_size, config.seed)
    options["prompt_template"] = template.name
    dropped = len(examples) - len(tokens)
    counts = {"examples": len(training), "held_out": len(validation), "dropped": dropped, "cut": cut}
    about["data"] = f"toy {source.toy}" if source.data is None else Path(source.data).name
    about |= {"prompt_template": template.name} | ({"bits": base.bits} if base.bits else {})
    known = {name: options[name] for name in ("base_fingerprint", "epochs", "batch_size", "lr", "seed")}
    adapter.metadata = about | {"examples": str(len(training))} | {name: str(value) for name, value in known.items()}
    with sync_errors():
        adapter = begin_with(base.init, adapter, model.config)
        choose_learnt(adapter, base, generator)
    return Prepared(model, tokenizer, adapter, training, validation, counts, options, base.base, strategy), config


# ---------------------------------------------------------------------------------------------------
# A run with its files, and the command


def tune(
    prepared: Prepared,
    config: TrainConfig,
    run: RunOptions,
    state: str,
    objective: Objective = RESPONSES,
    evaluate: Callable | None = None,
) -> None:
    """The training loop, followed with metrics, validation and checkpoints, from the beginning or where a run stopped.

    `state` is of `run_state`; `evaluate` is asked of the tuned adapter at the end.
    """
    model, adapter, training = prepared.model, prepared.adapter, prepared.training
    optimizer = make_optimizer(adapter, config.weight_decay)
    if config.peak_lr > HIGH_LR:
        lr = f"{config.peak_lr:g} (--lr, or --blr * --batch-size / 256)"
        say(f"warning: the peak learning rate is {lr}, the paper's 0.00225")
    recorder = Recorder(prepared, optimizer, run)
    recorder.begin(state)
    first_step, steps_per_epoch = recorder.progress.step, math.ceil(len(training) / config.batch_size)
    steps = training_steps(model, adapter, optimizer, training, config, objective, first_step)
    less_memory = f"fewer than --micro-batch-tokens {config.micro_batch_tokens}"
    if objective is RESPONSES:
        less_memory = f"--checkpoint-activations or {less_memory}"
    recorder.follow(  # this takes the steps, one by one: here the loop runs
        steps,
        partial(mean_loss, model, adapter, prepared.validation, config, objective),
        total=config.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        less_memory=less_memory,
    )
    recorder.finish(evaluate)


def tune_llama(config: TrainConfig, source: DataOptions, base: BaseOptions, run: RunOptions) -> None:
    """From the options to the summary. Raises OSError, ValueError, torch.OutOfMemoryError, or Stopped."""
    with sync_errors():
        source = source.checked(base.base)
        device, dtype = select_device(base.device, base.dtype)
        base = replace(base, dtype=str(dtype).removeprefix("torch."))
        if base.base is None and local_rank() == 0:
            TOYS[source.toy].make()  # one of a machine's ranks for all of them
    with sync_errors():
        examples, source = read_training_data(source)
        if base.base is not None and local_rank() == 0:
            find_base(base.base)  # fetched, where it is a name
        config = shaped_as_initial(config, base.init, run.out)
        options = fixed_options(config, source, base, examples)
    state = distributed.broadcast_from_rank0(lambda: run_state(run.out, run.resume, options, base.base))
    if state == "finished":
        say(f"{run.out}: this run is finished, nothing is left to do")
        return
    prepared, config = prepare(config, source, base, examples, device)
    evaluate = TOYS[source.toy].evaluate if source.data is None else None
    tune(prepared, config, run, state, evaluate=evaluate)


@command(context_settings={"show_default": True, "default_map": asdict(TrainConfig())})  # its defaults, once
@data_options([*TASKS], [*TOYS], NAMES)
@base_options
@optimisation_options
@memory_options
@run_options
@click.pass_context
def main(context, **options):
    """Tune a LLaMA-Adapter: the base stays frozen, a few prompts and gates learn to follow instructions.

    Without --data and --base this makes a tiny LLaMA that knows an almanac by heart, tunes it with options
    of its own, and shows what the adapter brought out of it.
    """
    if options["data"] is None:
        given = {name for name in options if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
        given |= {"lr"} if "blr" in given else set()
        tuning = TOYS[options["toy"] or "text"].tuning
        options |= {name: value for name, value in tuning.items() if name not in given}
    parts = [pick(record, options) for record in (TrainConfig, DataOptions, BaseOptions, RunOptions)]
    launch(lambda: tune_llama(*parts), options["out"])


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        distributed.exit_rank(end.code)
