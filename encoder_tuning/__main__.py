"""ViT and RoBERTa tuned by prompts, gates and a head.

python -m encoder_tuning train --task image-classification --base vit --data pictures --out out
python -m encoder_tuning evaluate --adapter out/adapter.safetensors --data more-pictures
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import click
import cloup
import torch
from cloup import option, option_group

from data import hold_out
from encoder_tuning.data import HEAD_TASKS, STRIDE, read_labelled
from encoder_tuning.labelled import Labelled
from encoder_tuning.objective import OBJECTIVES
from encoder_tuning.tuned import TunedEncoder, encoder_fingerprint, suits
from encoders.heads import head_adapter
from formats.encoders import load_encoder
from runtime.cli import Count, Real, device_options, one_line_errors
from runtime.device import select_device
from runtime.distributed import broadcast_from_rank0, check_same_on_all_ranks, exit_rank, sync_errors
from runtime.files import require_writable, write_json
from train import TrainConfig, optimisation_options, tune
from training.launch import launch, say
from training.options import MICRO_BATCH, MICRO_BATCH_HELP, BaseOptions, DataOptions, RunOptions
from training.options import fixed_options, pick, run_options
from training.run import Prepared
from training.run_files import run_state


@dataclass(frozen=True)
class EncoderData(DataOptions):
    """What there is to learn from."""

    stride: int = STRIDE  # tokens that neighbouring windows of a question's context share


def hold_out_by_name(examples: list[Labelled], val_size: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """As `hold_out`; the windows of a question, which overlap, stay on one side."""
    by_name = {}
    for example in examples:
        by_name.setdefault(example.name, []).append(example)
    training, validation = hold_out(list(by_name.values()), val_size, seed)
    return list(chain.from_iterable(training)), list(chain.from_iterable(validation))


WHY_DROPPED = {  # by task; "40 tokens" comes next
    "image-classification": "too long for",
    "text-classification": "too long for",
    "token-classification": "no word fits into",
    "question-answering": "no window holds the answer, each of",
}


# ---------------------------------------------------------------------------------------------------
# Tuning


def prepare_encoder(
    config: TrainConfig, source: EncoderData, base: BaseOptions, device: torch.device
) -> tuple[Prepared, TrainConfig]:
    """All that training needs, checked; and the configuration with L decided. Raises OSError or ValueError."""
    path, task = Path(base.base), source.task
    model, own_head = load_encoder(path, getattr(torch, base.dtype), device)
    config = config.for_base(path, model.config.n_layers, getattr(model.config, "max_length", math.inf))
    limits = {"limit": source.limit, "stride": source.stride}
    data = read_labelled(task, model, path, Path(source.data), config.max_seq_len, **limits)
    contents = [(row.name, row.labels, hashlib.sha256(row.inputs.numpy().tobytes()).digest()) for row in data.examples]
    options = fixed_options(config, source, base, [data.classes, *contents])
    options["base_fingerprint"] = encoder_fingerprint(model)
    training, validation = hold_out_by_name(data.examples, config.val_size, config.seed)

    generator, shape = torch.Generator().manual_seed(config.seed), {"layers": config.layers, "length": config.length}
    own_head = own_head if suits(own_head, task) else None
    adapter = head_adapter(model, own_head, len(data.classes) or 2, **shape, generator=generator)
    known = ("task", "base_fingerprint", "max_seq_len", "epochs", "batch_size", "lr", "seed")
    about = {name: options[name] for name in known} | {"classes": json.dumps(data.classes), "examples": len(training)}
    about |= {"base": path.resolve(), "base_layers": model.config.n_layers, "data": Path(source.data).name}
    adapter.metadata |= {name: str(value) for name, value in about.items()}
    counts = {"examples": len(training), "held_out": len(validation), "dropped": data.dropped, "cut": data.cut}
    if data.questions:
        of_questions = {name: getattr(data, name) for name in ("questions", "windowed", "unanswerable")}
        adapter.metadata |= {"stride": str(source.stride), "unanswerable": str(data.unanswerable)}
        counts |= of_questions
        say(
            f"{data.questions:,} questions, {data.unanswerable:,} of them unanswerable; the contexts of "
            f"{data.windowed:,} are read in windows, each an example"
        )
    prepared = Prepared(model, None, adapter, training, validation, counts, options, base.base)
    return prepared._replace(why_dropped=WHY_DROPPED[task]), config


def tune_encoder(config: TrainConfig, source: EncoderData, base: BaseOptions, run: RunOptions) -> None:
    """From the options to the summary. Raises OSError, ValueError, torch.OutOfMemoryError, or Stopped."""
    with sync_errors():
        device, dtype = select_device(base.device, base.dtype)
        base = replace(base, dtype=str(dtype).removeprefix("torch."))
    with sync_errors():
        prepared, config = prepare_encoder(config, source, base, device)
    check_same_on_all_ranks(prepared.options | asdict(config))
    state = broadcast_from_rank0(lambda: run_state(run.out, run.resume, prepared.options, base.base))
    if state == "finished":
        say(f"{run.out}: this run is finished, nothing is left to do")
        return
    tune(prepared, config, run, state, OBJECTIVES[source.task])


# ---------------------------------------------------------------------------------------------------
# The commands


@cloup.group(context_settings={"show_default": True})
def main():
    """Tune the prompts, gates and head of a frozen ViT or RoBERTa, and measure how well it does."""


TASK_DATA = "Folders of pictures or .npz; .tsv, .csv, JSON; CoNLL's columns; SQuAD."
STRIDE_HELP = "Tokens that neighbouring windows of a long context share."
NO_ANSWER_HELP = "No answer where <s> scores higher by so much.  [default: 0 if tuned on unanswerable ones, else never]"


@main.command("train", context_settings={"show_default": True, "default_map": asdict(TrainConfig())})
@option_group(
    "Data",
    option("--task", type=click.Choice(HEAD_TASKS), required=True, help="What is learnt."),
    option("--data", type=click.Path(), required=True, help=TASK_DATA),
    option("--limit", type=Count(), help="Use only so many examples, drawn from all."),
    option("--stride", type=Count(0), default=STRIDE, help=STRIDE_HELP),
)
@option_group(
    "Model",
    option("--base", type=click.Path(), required=True, help="A ViT, CLIP's tower, or a RoBERTa with its tokenizer."),
    *device_options,
)
@optimisation_options
@option_group("Memory and speed", MICRO_BATCH)
@run_options
def train_command(**options):
    """Tune an adapter and a head."""
    parts = [pick(record, options) for record in (TrainConfig, EncoderData, BaseOptions, RunOptions)]
    launch(lambda: tune_encoder(*parts), options["out"])


@main.command("evaluate", context_settings={"show_default": True})
@option_group(
    "Data",
    option("--task", type=click.Choice(HEAD_TASKS), help="What was learnt.  [default: as the adapter says]"),
    option("--data", type=click.Path(path_type=Path), required=True, help=TASK_DATA),
    option("--limit", type=Count(), help="Ask only about so many, drawn from all."),
    option("--stride", type=Count(0), help=f"{STRIDE_HELP}  [default: as the adapter says, or {STRIDE}]"),
    option("--no-answer-threshold", type=Real(), help=NO_ANSWER_HELP),
)
@option_group(
    "Model",
    option("--adapter", "adapter_path", type=click.Path(), help="Its file.  [default: none, and the base's own head]"),
    option("--base", type=click.Path(), help="The encoder.  [default: the one that the adapter names]"),
    *device_options,
)
@option_group("Run", option("--out", type=click.Path(path_type=Path), help="Write the answers there, as JSON."))
@option_group("Memory and speed", option("--micro-batch-tokens", type=Count(), default=8192, help=MICRO_BATCH_HELP))
def evaluate_command(
    data, task, adapter_path, base, out, limit, stride, no_answer_threshold, micro_batch_tokens, device, dtype
):
    """Measure accuracy, or F1 of entities or answers.

    Of an encoder with an adapter, or with the head that it came with.
    """
    with one_line_errors():
        if out is not None:
            require_writable(out)
        device, dtype = select_device(device, dtype)
        tuned = TunedEncoder(adapter_path, task, base, dtype, device)
        if tuned.task == "question-answering":
            answers = tuned.evaluate_squad(data, limit, stride, no_answer_threshold)
        elif tuned.task == "token-classification":
            answers = tuned.evaluate_tags(data, limit, micro_batch_tokens)
        else:
            answers = tuned.evaluate_classes(data, limit, micro_batch_tokens)
        if out is not None:
            write_json(out, answers, ensure_ascii=False)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        exit_rank(end.code)
