"""Train an adapter: python train.py --data alpaca.json --base LLaMA-7B --out out.

This file contains, in this order: hyper-parameters, optimizer and schedule, loss, optimizer step, and training steps;
then `train`, which is a whole run from the options to summary.json; and the command. The notation is that of
adapter.py.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import click
import torch
from click.core import ParameterSource
from cloup import command
from torch import Tensor, nn

from adapter import ATTENTIONS, Adapter
from data import (
    IGNORE,
    Example,
    TokenizedExample,
    collate,
    epoch_batches,
    group_by_length,
    hold_out,
    split_over_ranks,
    tokenize,
)
from formats.bases import base_fingerprint, load_model, read_base
from formats.chat_templates import load_template
from formats.hub import find_base
from formats.tensors import Weights, prefix_errors
from formats.tokenizers import load_tokenizer, tokenizer_fingerprint
from model import Config, LLaMA, num_parameters
from runtime.cli import SEED, Count, Real, bits_options, device_options, one_line_errors
from runtime.cli import options_of, from_options, setting, warn
from runtime.compilation import compile_layers, prepare_to_compile
from runtime.device import select_device, to_device
from runtime.distributed import all_reduce_sum, barrier, check_same_on_all_ranks, first_rank_speaks
from runtime.distributed import local_rank0_first, print_rank0, process_group, rank, run_command, world_size
from runtime.files import resolved
from runtime.quantization import num_weights, quantizer
from tasks import load_task
from toy import TRAINING, load_toy
from training.loss import chunked_cross_entropy
from training.memory import choose_micro_batch_tokens
from training.options import KEEP, BaseOptions, DataOptions, RunOptions, fixed_options
from training.run import Run
from training.sharding import choose_strategy, fsdp_sharder


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters. The defaults are those of the paper, where it states them (section 4.1).

    That its learning rate of 0.009 is a base rate, for batches of 256, is from the authors' code.
    """

    layers: int | None = setting(
        None, "L, number of topmost layers to adapt.  [default: all but the two lowest]", Count()
    )
    length: int = setting(10, "K, number of prompt embeddings per layer.", click.IntRange(1, 4096))
    epochs: int = setting(5, "Passes over the training data.", Count())
    warmup_epochs: float = setting(2, "Epochs of linear warm-up, followed by cosine decay to 0.", Real(0))
    batch_size: int = setting(64, "Examples per optimizer step, over all ranks.", Count())
    blr: float = setting(9e-3, "Base learning rate: the peak is --blr * --batch-size / 256.", Real(0, 1e3))
    lr: float | None = setting(None, "Peak learning rate; replaces --blr.  [default: from --blr]", Real(0, 1e3))
    weight_decay: float = setting(0.02, "Weight decay; gates have none, because it would pull them to 0.", Real(0, 1e3))
    gradient_clip: float | None = None  # maximum norm of the gradient; the authors' code does not clip
    max_seq_len: int | None = setting(
        None,
        "Maximum tokens per example; longer ones are truncated or dropped.  [default: 512 or the base's limit if less]",
        Count(2),
    )
    val_size: float = setting(0.02, "Size of the validation set: a fraction if below 1, otherwise a count.", Real(0))
    eval_every: int | None = setting(None, "Steps between validations.  [default: one epoch]", Count())
    keep: str = setting("last", "Adapter to keep: the last, or the one with the lowest validation loss.", KEEP)
    seed: int = setting(0, "Random seed for initial parameters, validation split and order of examples.", SEED)
    micro_batch_tokens: int | None = setting(
        None,
        "Maximum positions per forward pass; affects memory and speed.  "
        "[default: 8192; fewer on a small GPU; 1024 on a CPU]",
        Count(),
    )
    checkpoint_activations: bool = setting(False, "Recompute layers in the backward pass, to save memory.")

    @property
    def peak_lr(self) -> float:
        return self.blr * self.batch_size / 256 if self.lr is None else self.lr

    def for_base(self, base: Path | str, n_layers: int, context: float) -> "TrainConfig":
        """Return the config with the defaults that depend on the base filled in.

        `context` is the base's context length in tokens, or infinity. Raises ValueError if --layers or --max-seq-len is
        too large for the base, or if the warm-up takes all epochs. Warns if the peak learning rate is above 0.1.
        """
        if self.warmup_epochs >= self.epochs:
            warmup = f"--warmup-epochs {self.warmup_epochs:g} of --epochs {self.epochs}"
            raise ValueError(f"{warmup}: the learning rate would never decay; warm up for fewer epochs")
        layers = max(1, n_layers - 2) if self.layers is None else self.layers
        max_seq_len = self.max_seq_len or min(512, context)
        if layers > n_layers:
            raise ValueError(f"--layers {layers}: {base} has only {n_layers} layers")
        if max_seq_len > context:
            raise ValueError(f"--max-seq-len {max_seq_len}: {base} has a context of only {context} tokens")
        if self.peak_lr > 0.1 and rank() == 0:
            lr = f"{self.peak_lr:g} (--lr, or --blr * --batch-size / 256)"
            warn(f"the peak learning rate is {lr}; the default of --blr gives 0.00225 for batches of 64")
        return replace(self, layers=layers, max_seq_len=max_seq_len)


# AdamW's update is about as large as the learning rate, whatever the size of the parameter. The learning rate of the
# prompts would destabilize the image projection and the head of an encoder, whose weights are far smaller.
LINEAR_LR_SCALE = 0.1


def make_optimizer(adapter: Adapter, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW for the trainable parameters of the adapter.

    The `lr_scale` of a parameter group multiplies the scheduled learning rate.
    """
    parameters = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    prompts = [parameters.pop("prompts")] if "prompts" in parameters else []
    gates = [parameters.pop("gates")] if "gates" in parameters else []
    groups = [
        {"params": prompts, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": gates, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": list(parameters.values()), "weight_decay": weight_decay, "lr_scale": LINEAR_LR_SCALE},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.95))


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Return the learning rate of `step` (from 0): linear warm-up over `warmup` steps, cosine decay to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ---------------------------------------------------------------------------------------------------
# The loss, and the optimizer steps


def response_loss(
    model: LLaMA, adapter: Adapter, examples: Sequence[TokenizedExample], checkpoint_activations: bool = False
) -> Tensor:
    """Return the cross entropy, summed over the R response tokens of the examples, as a float32 scalar.

    The output head runs only at positions with a target, because half of Alpaca's tokens are in prompts. Without
    examples, the loss is 0, but its backward pass runs through all adapted layers.
    """
    batch = collate(examples)
    rows = (batch.targets.flatten() != IGNORE).nonzero().squeeze(1)  # (R,), on the CPU, so as not to wait for a GPU
    targets = to_device(batch.targets.flatten()[rows], model.device)  # (R,)
    rows = to_device(rows, model.device)
    inputs = to_device(batch.inputs, model.device)  # (B, T)
    if batch.features is None:
        adaption_prompts = adapter(dtype=model.dtype)
    else:
        features = to_device(batch.features, model.device)  # (B, F)
        has_image = to_device(batch.has_image, model.device)  # (B,)
        adaption_prompts = adapter(features=features, has_image=has_image, dtype=model.dtype)
    hidden = model.hidden_states(inputs, adaption_prompts, checkpoint_activations=checkpoint_activations)  # (B, T, C)
    hidden = hidden.flatten(0, 1).index_select(0, rows)  # (R, C)
    return chunked_cross_entropy(hidden, model.output.weight, targets)


def train_step(
    model: nn.Module,
    adapter: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence,
    lr: float,
    config: TrainConfig,
    loss_fn: Callable[..., Tensor] = response_loss,
) -> float:
    """Take one optimizer step on the batch `examples`; return its mean loss before the step.

    The batch is the same on all ranks. It is split over them, and then into micro-batches. Raises FloatingPointError,
    with the adapter unchanged, if the loss or its gradient is not finite.
    """
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    for parameter in parameters:  # the projection's gradient would be None on a rank without images
        parameter.grad = torch.zeros_like(parameter)
    batch_loss = torch.zeros((), device=parameters[0].device)

    # Each loss is divided by the number of targets of the whole batch, so that the gradients add up to the gradient of
    # the batch for any split into micro-batches and over ranks.
    num_targets = sum(example.num_targets for example in examples)
    shares = split_over_ranks(examples, world_size())
    micro_batches = [group_by_length(share, config.micro_batch_tokens) for share in shares]
    mine = micro_batches[rank()]
    # Ranks with fewer micro-batches run empty ones, because FSDP's all-gathers are collective.
    mine += [[]] * (max(map(len, micro_batches)) - len(mine))
    for micro_batch in mine:
        loss = loss_fn(model, adapter, micro_batch, config.checkpoint_activations) / num_targets
        loss.backward()
        batch_loss += loss.detach()
    all_reduce_sum([batch_loss, *(parameter.grad for parameter in parameters)])

    grad_norm = nn.utils.clip_grad_norm_(parameters, config.gradient_clip or math.inf)
    if not (batch_loss.isfinite() and grad_norm.isfinite()):
        names = list(dict.fromkeys(example.name for example in examples))
        found = ", ".join(names[:5]) + " and others" * (len(names) > 5)
        raise FloatingPointError(f"the loss ({batch_loss.item()}) or its gradient is not finite, for {found}")
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    return batch_loss.item()


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    adapter: nn.Module,
    examples: Sequence,
    config: TrainConfig,
    loss_fn: Callable[..., Tensor] = response_loss,
) -> float:
    """Return the mean loss over all targets of the examples.

    With the same micro-batches, it is bit for bit the same for any number of ranks that hold the whole model.
    """
    micro_batches = group_by_length(examples, config.micro_batch_tokens)
    micro_batches += [[]] * (-len(micro_batches) % world_size())
    loss_sums = torch.zeros(len(micro_batches), device=next(adapter.parameters()).device)
    for i in range(rank(), len(micro_batches), world_size()):
        loss_sums[i] = loss_fn(model, adapter, micro_batches[i])
    all_reduce_sum([loss_sums])
    return sum(loss_sums.tolist()) / sum(example.num_targets for example in examples)


class Step(NamedTuple):
    """Metrics of one optimizer step."""

    number: int  # counted from 1
    epoch: int  # counted from 0
    loss: float  # before the step
    lr: float
    num_tokens: int  # of the batch, prompts included
    seconds: float


def training_steps(
    model: nn.Module,
    adapter: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence,
    config: TrainConfig,
    loss_fn: Callable[..., Tensor] = response_loss,
    first_step: int = 0,
) -> Iterator[Step]:
    """Run the optimizer steps from `first_step` on, counted from 0, and yield a Step after each.

    The order of examples and the learning rate depend only on the configuration and the step, so that a run can be
    resumed on any number of ranks. Raises FloatingPointError, as `train_step` does.
    """
    lengths = [example.num_tokens for example in examples]
    steps_per_epoch = math.ceil(len(examples) / config.batch_size)
    num_steps = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    for step in range(first_step, num_steps):
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0 or step == first_step:
            batches = epoch_batches(lengths, config.batch_size, config.seed, epoch)
        batch = [examples[i] for i in batches[position]]
        lr = learning_rate(step, peak=config.peak_lr, warmup=warmup, total=num_steps)
        start = time.perf_counter()
        loss = train_step(model, adapter, optimizer, batch, lr, config, loss_fn)
        yield Step(step + 1, epoch, loss, lr, sum(example.num_tokens for example in batch), time.perf_counter() - start)


# ---------------------------------------------------------------------------------------------------
# A training run


def train(config: TrainConfig, data: DataOptions, base: BaseOptions, run: Run) -> None:
    """Train an adapter for a frozen LLaMA. `run` manages the folder --out: it resumes, logs and saves.

    Raises OSError or ValueError.
    """
    device, dtype = select_device(base.device, base.dtype)

    # The data, headers and template are checked first, because loading the weights may take minutes.
    with local_rank0_first():  # the first rank of each machine downloads the base, and the others reuse it
        examples, data = read_training_data(data)  # one Example per record
        path = find_training_base(base, data)
    model_config, weights = read_base(path)  # model.Config, and one function per weight that reads it
    tokenizer = load_tokenizer(path, model_config.vocab_size)
    template = load_template(data.template, tokenizer)
    if base.init:  # modules for special cases are imported on use, here and below
        from training.initial import adapter_fingerprint, init_from_adapter, load_initial, shaped_as

        initial = load_initial(base.init, model_config, run.out)
        config = shaped_as(initial, config, base.init)  # takes L and K from the adapter
    config = config.for_base(path, model_config.n_layers, model_config.max_seq_len or math.inf)
    fixed = fixed_options(config, data, base, dtype, examples)
    fixed |= {"base_fingerprint": base_fingerprint(model_config, weights), "prompt_template": template.name}
    fixed["tokenizer_fingerprint"] = tokenizer_fingerprint(tokenizer)
    if base.init:
        fixed["init"] = adapter_fingerprint(initial)
    if data.vision_encoder or data.encoder:
        from tasks.images import encode_images, images_hash

        fixed["images_hash"] = images_hash(examples, data.images)
    check_same_on_all_ranks(fixed | asdict(config) | {"strategy": base.strategy, "compile": base.compile})
    if run.is_finished(fixed):
        print_rank0(f"{run.out}: this run is finished; nothing is left to do")
        return

    encoder = None
    if data.vision_encoder or data.encoder:
        examples, encoder = encode_images(examples, data, dtype, device)  # adds features (F,) to examples with images
        fixed |= encoder.fixed_options([example.features for example in examples if example.features is not None])
    with prefix_errors(data.data or f"the toy {data.toy}"):
        tokenized, num_truncated = tokenize(template, examples, config.max_seq_len)  # ids and loss masks
        training, validation = hold_out(tokenized, config.val_size, config.seed)

    # The base is replicated on every rank, or sharded.
    model, strategy = load_frozen(path, model_config, weights, base, dtype, device)
    del weights  # this closes the files of the base
    adapter = make_adapter(config, model_config, tokenized).to(device)  # float32, gates at zero
    adapter.metadata = describe_adapter(data, base, path, model_config, encoder, fixed, len(training))
    if base.init:
        adapter = init_from_adapter(initial, adapter, base.init)
    if base.freeze:
        freeze_parts(adapter, base.freeze)
    optimizer = make_optimizer(adapter, config.weight_decay)
    counts = {"examples": len(training), "held_out": len(validation)}
    counts |= {"dropped": len(examples) - len(tokenized), "truncated": num_truncated}
    print_overview(model, adapter, config, counts, strategy)
    num_steps = config.epochs * math.ceil(len(training) / config.batch_size)
    fixed["base"] = resolved(base.base)  # for the summary; --resume does not compare it, because files may move
    run.begin(adapter, optimizer, fixed, counts, num_steps)  # with --resume, loads checkpoint.pt into the first two
    if config.micro_batch_tokens is None:
        positions = run.micro_batch_tokens or choose_micro_batch_tokens(
            model, config.layers, config.checkpoint_activations
        )
        config = replace(config, micro_batch_tokens=positions)
    run.micro_batch_tokens = config.micro_batch_tokens

    with run.saving_on_errors():
        if run.evaluation_due(run.step):
            run.log_validation(mean_loss(model, adapter, validation, config))
        for step in training_steps(model, adapter, optimizer, training, config, first_step=run.step):
            run.log_step(step)
            if run.asked_to_stop():  # Ctrl-C, SIGTERM or --max-minutes, on any rank
                run.save_checkpoint()
                return
            if run.evaluation_due(step.number):
                run.log_validation(mean_loss(model, adapter, validation, config))
            if step.number % run.options.save_every == 0 and step.number < num_steps:
                run.save_checkpoint()
        run.save_checkpoint()

    adapter = run.kept_adapter()  # the last one, or the best one with --keep best
    scores = {}
    if data.data is None and (rank() == 0 or strategy == "fsdp"):  # sharded layers need all ranks
        with first_rank_speaks():
            scores = load_toy(data.toy).evaluate(model, tokenizer, adapter)
    run.finish(scores)  # writes curves.png and summary.json, then removes checkpoint.pt


def read_training_data(data: DataOptions) -> tuple[list[Example], DataOptions]:
    """Return the examples, and the options with defaults filled in: `template`, and `images` for a data file.

    Without an encoder, images are dropped. Raises OSError or ValueError.
    """
    if data.data is None:
        examples, data = load_toy(data.toy).examples(data)
    else:
        data = replace(data, images=data.images or str(Path(data.data).parent))
        examples = load_task(data.task).read(data.data, data.images)
    examples = examples[: data.limit]
    if data.template is None:
        has_turns = any(example.turns for example in examples)
        data = replace(data, template="auto" if has_turns else "alpaca")
    if data.vision_encoder is None and data.encoder is None:
        return [replace(example, image="") for example in examples], data
    from tasks.images import with_images

    kept = with_images(examples, data.images, data.skip_missing, data.data or f"the toy {data.toy}")
    if len(kept) < len(examples):
        print_rank0(f"{len(examples) - len(kept):,} of {len(examples):,} examples skipped: image not found")
    if not any(example.image for example in kept):
        raise ValueError(f"{data.data}: no example has an image; check --images, or omit --clip and --encoder")
    return kept, data


def find_training_base(base: BaseOptions, data: DataOptions) -> Path:
    """Return the path of --base, downloaded from the Hub if necessary, or of the toy's base."""
    if base.base is not None:
        return find_base(base.base)
    if data.data is not None:
        print_rank0("no --base: using the toy's LLaMA of 1M parameters; see docs/base_models.md for real bases")
    return load_toy(data.toy).base


def load_frozen(
    path: Path, model_config: Config, weights: Weights, base: BaseOptions, dtype: torch.dtype, device: torch.device
) -> tuple[LLaMA, str]:
    """Load the frozen base. Return it with its strategy: "ddp", replicated on every rank, or "fsdp", sharded.

    In both cases, `train_step` sums the gradient of the adapter over the ranks. With fsdp, layers are gathered when
    they are needed. Raises ValueError if the options cannot be combined, or are not available on this machine.
    """
    if base.compile:
        prepare_to_compile(device)
    strategy = "ddp"
    if world_size() > 1 or base.strategy == "fsdp":
        bits = int(base.bits) if base.bits in ("8", "4") else 8 * dtype.itemsize
        num_bytes = num_parameters(model_config) * bits // 8
        strategy = choose_strategy(base.strategy, num_bytes, device)
    prepare_layer = quantizer(base.bits)
    if strategy == "fsdp":
        if prepare_layer or base.compile:
            raise ValueError("--bits and --compile need the whole base on every rank; omit them, or use --strategy ddp")
        prepare_layer = fsdp_sharder(device)
    keep_blocks = base.bits is None and strategy == "ddp"  # a GGUF file's weights stay quantized
    attention = ATTENTIONS[base.attention]
    model = load_model(path, model_config, weights, dtype, device, attention, prepare_layer, keep_blocks)
    if strategy == "fsdp":
        prepare_layer(model)
    if base.compile:
        compile_layers(model.layers)
    return model, strategy


def make_adapter(config: TrainConfig, model_config: Config, examples: Sequence[TokenizedExample]) -> Adapter:
    """Create the initial adapter: an ImageAdapter if any example has the features of an image."""
    generator = torch.Generator().manual_seed(config.seed)
    dimensions = {
        "layers": config.layers,
        "length": config.length,
        "dim": model_config.dim,
        "heads": model_config.n_heads,
    }
    features = next((example.features for example in examples if example.features is not None), None)
    if features is None:
        return Adapter(**dimensions, generator=generator)
    from multimodal import ImageAdapter

    return ImageAdapter(**dimensions, features=len(features), generator=generator)


def describe_adapter(
    data: DataOptions, base: BaseOptions, path: Path, model_config: Config, encoder, fixed: dict, num_examples: int
) -> dict[str, str]:
    """Return the metadata of the adapter file: base, data and hyper-parameters."""
    metadata = {"base": resolved(base.base or path), "base_layers": str(model_config.n_layers)}
    if base.base and not Path(base.base).exists():  # a name on the Hub; its folder is named after the commit
        metadata["base_commit"] = path.name
    metadata["data"] = Path(data.data).name if data.data else f"toy {data.toy}"
    metadata["examples"] = str(num_examples)
    for name in ("prompt_template", "base_fingerprint", "epochs", "batch_size", "lr", "seed"):
        metadata[name] = str(fixed[name])
    if base.bits in ("8", "4"):
        metadata["bits"] = base.bits
    if encoder:
        metadata |= encoder.metadata
    return metadata


def freeze_parts(adapter: Adapter, names: Sequence[str]) -> None:
    """Freeze parts of the adapter. Raises ValueError if a part does not exist, or if nothing remains trainable."""
    for name in names:
        parameters = [p for full_name, p in adapter.named_parameters() if name in full_name.split(".")]
        if not parameters:
            raise ValueError(f"--freeze {name}: the adapter has no {name}; add images, and --clip or --encoder")
        for parameter in parameters:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in adapter.parameters()):
        raise ValueError(f"--freeze {' --freeze '.join(names)}: nothing is left to train; freeze fewer parts")


def print_overview(model: LLaMA, adapter: Adapter, config: TrainConfig, counts: dict, strategy: str) -> None:
    """Print the numbers of parameters and examples, the device, the dtype and the ranks."""
    trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    frozen = num_weights(model)
    ranks = f", {strategy} over {world_size()} ranks" if world_size() > 1 else ""
    print_rank0(
        f"{trainable:,} parameters to train, {frozen:,} frozen, on {model.device} in {model.dtype}{ranks}\n"
        f"{counts['examples']:,} examples to train on, {counts['held_out']:,} held out, {counts['dropped']:,} dropped "
        f"(the prompt alone fills {config.max_seq_len} tokens), {counts['truncated']:,} truncated"
    )


# ---------------------------------------------------------------------------------------------------
# The command


@command(context_settings={"show_default": True})
@options_of(DataOptions, "Data")
@options_of(BaseOptions, "Frozen model", extra=[*device_options, *bits_options])
@options_of(TrainConfig, "Adapter and optimization")
@options_of(RunOptions, "Run")
@click.pass_context
def main(context, **options):
    """Train a LLaMA-Adapter for a frozen base.

    The default base is a tiny LLaMA that was pretrained on an almanac. Without --data, the adapter is trained on the
    questions of a toy, and evaluated on held-out ones. The defaults are then 12 epochs, 1 of them warm-up, the
    topmost 4 layers, batches of 32, and --lr 0.05.
    """
    if options["data"] is None:
        options |= toy_defaults(context, options)
    config, data, base = (from_options(record, options) for record in (TrainConfig, DataOptions, BaseOptions))
    with one_line_errors(), process_group(), Run(from_options(RunOptions, options)) as run:
        train(config, data.checked(base.base), base, run)
        barrier()  # no rank leaves while the first one still writes
    sys.exit(run.exit_code)


def toy_defaults(context: click.Context, options: dict) -> dict:
    """Return the toys' hyper-parameters, except those given on the command line. With --blr, omit lr, too."""
    given = {name for name in options if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    if "blr" in given:
        given.add("lr")
    return {name: value for name, value in TRAINING.items() if name not in given}


if __name__ == "__main__":
    run_command(main)
