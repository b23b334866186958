"""Train adaption prompts, gates and a head on a frozen ViT or RoBERTa, and evaluate them.

python -m encoder_tuning train --task image-classification --base vit --data pictures --out out
python -m encoder_tuning evaluate --adapter out/adapter.safetensors --data more-pictures
"""

import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path

import click
import cloup
import torch
from cloup import option, option_group

from data import MICRO_BATCH_TOKENS, hold_out
from encoder_tuning.data import HEAD_TASKS, STRIDE, read_labeled
from encoder_tuning.labeled import Labeled, LabeledData
from encoder_tuning.objective import LOSSES
from encoder_tuning.trained import TrainedEncoder, encoder_fingerprint, head_fits_task
from encoders.heads import head_adapter
from formats.encoders import load_encoder
from runtime.cli import Count, Real, device_options, one_line_errors, options_of, from_options, setting
from runtime.device import select_device
from runtime.distributed import barrier, check_same_on_all_ranks, print_rank0, process_group, run_command, world_size
from runtime.files import require_writable, write_json
from train import TrainConfig, make_optimizer, mean_loss, training_steps
from training.options import BaseOptions, DataOptions, RunOptions, fixed_options
from training.run import Run

TASK_DATA = "Images by class or .npz; texts as .tsv, .csv or JSON; CoNLL-2003; or SQuAD: see docs/encoder_tuning.md."
LIMIT_HELP = "Use only this many images, texts, sentences or questions, sampled at random."
LESS_MEMORY = "a smaller --micro-batch-tokens needs less memory"  # advice for when memory runs out
STRIDE_HELP = "Question answering: number of tokens that neighboring windows of a long context share."


@dataclass(frozen=True)
class EncoderData(DataOptions):
    """Options of an encoder's training data. The other fields of DataOptions keep their defaults."""

    data: str | None = setting(None, TASK_DATA, click.Path(), required=True)
    task: str | None = setting(None, "The task to train for.", click.Choice(HEAD_TASKS), required=True)
    limit: int | None = setting(None, LIMIT_HELP, Count())
    stride: int = setting(STRIDE, STRIDE_HELP, Count(0))


MAX_SEQ_LEN_HELP = (
    "Maximum tokens per example; longer texts are truncated, contexts split into windows. Images ignore it.  "
    "[default: 512, or the base's context if less]"
)


@dataclass(frozen=True)
class EncoderConfig(TrainConfig):
    """Hyper-parameters of training. Options that work differently for encoders have their own help and defaults."""

    max_seq_len: int | None = setting(None, MAX_SEQ_LEN_HELP, Count(2))
    micro_batch_tokens: int = setting(
        MICRO_BATCH_TOKENS, "Maximum number of positions per forward pass; affects memory and speed.", Count()
    )


def hold_out_by_name(examples: list[Labeled], val_size: float, seed: int) -> tuple[list[Labeled], list[Labeled]]:
    """Split as `hold_out` does, but keep the windows of a question together, because they overlap.

    For question answering, `val_size` is a fraction or a number of questions, not of windows.
    """
    by_name = {}
    for example in examples:
        by_name.setdefault(example.name, []).append(example)
    training, validation = hold_out(list(by_name.values()), val_size, seed)
    return list(chain.from_iterable(training)), list(chain.from_iterable(validation))


WHY_DROPPED = {  # keyed by task; {} stands for the maximum number of tokens
    "image-classification": "too long for {} tokens",
    "text-classification": "too long for {} tokens",
    "token-classification": "no word fits into {} tokens",
    "question-answering": "questions whose answer is in no window of {} tokens",
}


# ---------------------------------------------------------------------------------------------------
# Training


def train_encoder(config: TrainConfig, data: EncoderData, base: BaseOptions, run: Run) -> None:
    """Train adaption prompts, gates and a head on a frozen encoder. This is the counterpart of train.train.

    Raises OSError or ValueError.
    """
    device, dtype = select_device(base.device, base.dtype)
    path = Path(base.base)
    model, own_head = load_encoder(path, dtype, device)
    config = config.for_base(path, model.config.n_layers, getattr(model.config, "max_length", math.inf))
    limits = {"limit": data.limit, "stride": data.stride}
    labeled = read_labeled(data.task, model, path, Path(data.data), config.max_seq_len, **limits)
    if not labeled.examples:
        why = WHY_DROPPED[data.task].format(config.max_seq_len)
        raise ValueError(f"{data.data}: every example was dropped ({why}); increase --max-seq-len")
    training, validation = hold_out_by_name(labeled.examples, config.val_size, config.seed)

    contents = [
        (row.name, row.labels, hashlib.sha256(row.inputs.numpy().tobytes()).digest()) for row in labeled.examples
    ]
    fixed = fixed_options(config, data, base, dtype, [labeled.classes, *contents])
    fixed["base_fingerprint"] = encoder_fingerprint(model)
    check_same_on_all_ranks(fixed | asdict(config))
    if run.is_finished(fixed):
        print_rank0(f"{run.out}: this run is finished; nothing is left to do")
        return

    dimensions = {"layers": config.layers, "length": config.length}
    generator = torch.Generator().manual_seed(config.seed)
    head = own_head if head_fits_task(own_head, data.task) else None
    adapter = head_adapter(model, head, len(labeled.classes) or 2, **dimensions, generator=generator)
    adapter.metadata |= describe_head_adapter(data, labeled, path, model.config.n_layers, fixed, len(training))
    optimizer = make_optimizer(adapter, config.weight_decay)
    counts = {
        "examples": len(training),
        "held_out": len(validation),
        "dropped": labeled.dropped,
        "truncated": labeled.num_truncated,
    }
    if labeled.questions:
        counts |= {name: getattr(labeled, name) for name in ("questions", "windowed", "unanswerable")}
    print_encoder_overview(model, adapter, data.task, config, counts)
    num_steps = config.epochs * math.ceil(len(training) / config.batch_size)
    fixed["base"] = str(path.resolve())
    run.begin(adapter, optimizer, fixed, counts, num_steps)

    loss_fn = LOSSES[data.task]
    with run.saving_on_errors():
        if run.evaluation_due(run.step):
            run.log_validation(mean_loss(model, adapter, validation, config, loss_fn))
        for step in training_steps(model, adapter, optimizer, training, config, loss_fn, run.step):
            run.log_step(step)
            if run.asked_to_stop():
                run.save_checkpoint()
                return
            if run.evaluation_due(step.number):
                run.log_validation(mean_loss(model, adapter, validation, config, loss_fn))
            if step.number % run.options.save_every == 0 and step.number < num_steps:
                run.save_checkpoint()
        run.save_checkpoint()
    run.finish({})


def describe_head_adapter(
    data: EncoderData, labeled: LabeledData, path: Path, num_layers: int, fixed: dict, num_examples: int
) -> dict[str, str]:
    """Return the metadata of the adapter file: base, data and hyper-parameters."""
    copied = ("task", "base_fingerprint", "max_seq_len", "epochs", "batch_size", "lr", "seed")
    metadata = {name: fixed[name] for name in copied}
    metadata |= {"classes": json.dumps(labeled.classes), "examples": num_examples}
    metadata |= {"base": path.resolve(), "base_layers": num_layers, "data": Path(data.data).name}
    if labeled.questions:
        metadata |= {"stride": data.stride, "unanswerable": labeled.unanswerable}
    return {name: str(value) for name, value in metadata.items()}


def print_encoder_overview(model, adapter, task: str, config: TrainConfig, counts: dict) -> None:
    """Print the numbers of parameters, examples and questions, the device, the dtype and the ranks."""
    trainable, frozen = (sum(p.numel() for p in part.parameters()) for part in (adapter, model))
    weight = next(model.parameters())
    ranks = f", ddp over {world_size()} ranks" if world_size() > 1 else ""
    if "questions" in counts:
        print_rank0(
            f"{counts['questions']:,} questions, {counts['unanswerable']:,} of them unanswerable; "
            f"the contexts of {counts['windowed']:,} are split into windows; each window is an example"
        )
    why = f" ({WHY_DROPPED[task].format(config.max_seq_len)})" if counts["dropped"] else ""
    print_rank0(
        f"{trainable:,} parameters to train, {frozen:,} frozen, on {weight.device} in {weight.dtype}{ranks}\n"
        f"{counts['examples']:,} examples to train on, {counts['held_out']:,} held out, "
        f"{counts['dropped']:,} dropped{why}, {counts['truncated']:,} truncated"
    )


# ---------------------------------------------------------------------------------------------------
# The commands


@cloup.group(context_settings={"show_default": True})
def main():
    """Train an adapter and a head on a frozen ViT or RoBERTa, or evaluate them."""


NO_ANSWER_HELP = (
    "Question answering: give no answer if <s> scores higher than the best span by more than this.  "
    "[default: 0 if trained on unanswerable questions; otherwise, every question is answered]"
)


@main.command("train", context_settings={"show_default": True})
@options_of(EncoderData, "Data", only=("task", "data", "limit", "stride"))
@option_group(
    "Frozen model",
    option(
        "--base", type=click.Path(), required=True, help="Path of a ViT, of CLIP's vision encoder, or of a RoBERTa."
    ),
    *device_options,
)
@options_of(
    EncoderConfig,
    "Adapter and optimization",
    only=[each.name for each in fields(EncoderConfig) if each.name != "checkpoint_activations"],
)
@options_of(RunOptions, "Run")
def train_command(**options):
    """Train an adapter and a head on a frozen encoder."""
    config, data, base = (from_options(record, options) for record in (EncoderConfig, EncoderData, BaseOptions))
    with one_line_errors(), process_group(), Run(from_options(RunOptions, options), LESS_MEMORY) as run:
        train_encoder(config, data, base, run)
        barrier()
    sys.exit(run.exit_code)


@main.command("evaluate", context_settings={"show_default": True})
@option_group(
    "Data",
    option("--task", type=click.Choice(HEAD_TASKS), help="The task to evaluate.  [default: the adapter's]"),
    option("--data", type=click.Path(path_type=Path), required=True, help=TASK_DATA),
    option("--limit", type=Count(), help=LIMIT_HELP),
    option("--stride", type=Count(0), help=f"{STRIDE_HELP}  [default: the adapter's, or {STRIDE}]"),
    option("--no-answer-threshold", type=Real(-1e30, 1e30), help=NO_ANSWER_HELP),
)
@option_group(
    "Model",
    option(
        "--adapter",
        "adapter_path",
        type=click.Path(),
        help="The adapter file. Without it, the base is evaluated with its own head.",
    ),
    option("--base", type=click.Path(), help="Path of the encoder.  [default: the one that the adapter file names]"),
    *device_options,
)
@option_group(
    "Run", option("--out", type=click.Path(path_type=Path), help="Write the predictions to this file, as JSON.")
)
@option_group(
    "Memory and speed",
    option(
        "--micro-batch-tokens",
        type=Count(),
        default=8192,
        help="Maximum positions per forward pass; affects memory and speed. Question answering ignores it.",
    ),
)
def evaluate_command(
    data, task, adapter_path, base, out, limit, stride, no_answer_threshold, micro_batch_tokens, device, dtype
):
    """Print the accuracy, or the F1 of entities or answers.

    The encoder is evaluated with an adapter or, without --adapter, with its own head.
    """
    with one_line_errors():
        if out is not None:
            require_writable(out)
        device, dtype = select_device(device, dtype)
        trained = TrainedEncoder(adapter_path, task, base, dtype, device)
        if trained.task == "question-answering":
            answers = trained.evaluate_squad(data, limit, stride, no_answer_threshold)
        elif trained.task == "token-classification":
            answers = trained.evaluate_tags(data, limit, micro_batch_tokens)
        else:
            answers = trained.evaluate_classes(data, limit, micro_batch_tokens)
        if out is not None:
            write_json(out, answers, ensure_ascii=False)


if __name__ == "__main__":
    run_command(main)
