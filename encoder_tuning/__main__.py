"""ViT and RoBERTa tuned by prompts, gates and a head.

python -m encoder_tuning train --task image-classification --base vit --data pictures --out out
python -m encoder_tuning evaluate --adapter out/adapter.safetensors --data more-pictures
"""

import hashlib
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import click
import cloup
import torch
from cloup import option, option_group
from torch import nn
from tqdm import tqdm

from data import hold_out
from encoder_tuning.data import HEAD_TASKS, check_head_task, read_labelled, read_squad, roberta_tokenizer, subset
from encoder_tuning.objective import CLASSIFICATION, SPANS, accuracy, answer_squad, classify, squad_metric, squad_scores
from encoders.heads import HeadAdapter, head_adapter
from encoders.models import Roberta, ViT
from formats.encoders import load_encoder
from runtime.cli import Count, device_options, one_line_errors, warn
from runtime.device import select_device
from runtime.distributed import broadcast_from_rank0, check_same_on_all_ranks, exit_rank, sync_errors
from runtime.files import require_writable, write_json
from runtime.fingerprints import hash_tensors
from train import TrainConfig, optimisation_options, tune
from training.launch import launch, say
from training.options import MICRO_BATCH, MICRO_BATCH_HELP, BaseOptions, DataOptions, RunOptions
from training.options import fixed_options, pick, run_options
from training.run import Prepared
from training.run_files import run_state


def encoder_fingerprint(model: ViT | Roberta) -> str:
    """A hash of a few weights."""
    return hash_tensors([model.layers[0].attention.wq.weight[:4], model.layers[-1].w2.weight[:4]])


def suits(head: nn.Sequential | None, task: str) -> bool:
    """Whether a head that an encoder came with is one for the task: RoBERTa's for sentences has two linear layers."""
    return head is not None and (task == "image-classification" or (len(head) == 1) == (task == "question-answering"))


# ---------------------------------------------------------------------------------------------------
# Tuning


def prepare_encoder(
    config: TrainConfig, source: DataOptions, base: BaseOptions, device: torch.device
) -> tuple[Prepared, TrainConfig]:
    """All that training needs, checked; and the configuration with L decided. Raises OSError or ValueError."""
    path, task = Path(base.base), source.task
    model, own_head = load_encoder(path, getattr(torch, base.dtype), device)
    config = config.for_base(path, model.config.n_layers, getattr(model.config, "max_length", math.inf))
    data = read_labelled(task, model, path, Path(source.data), config.max_seq_len, limit=source.limit)
    contents = [(row.name, row.labels, hashlib.sha256(row.inputs.numpy().tobytes()).digest()) for row in data.examples]
    options = fixed_options(config, source, base, [data.classes, *contents])
    options["base_fingerprint"] = encoder_fingerprint(model)
    training, validation = hold_out(data.examples, config.val_size, config.seed)

    generator, shape = torch.Generator().manual_seed(config.seed), {"layers": config.layers, "length": config.length}
    own_head = own_head if suits(own_head, task) else None
    adapter = head_adapter(model, own_head, len(data.classes) or 2, **shape, generator=generator)
    known = ("task", "base_fingerprint", "max_seq_len", "epochs", "batch_size", "lr", "seed")
    about = {name: options[name] for name in known} | {"classes": json.dumps(data.classes), "examples": len(training)}
    about |= {"base": path.resolve(), "base_layers": model.config.n_layers, "data": Path(source.data).name}
    adapter.metadata |= {name: str(value) for name, value in about.items()}
    counts = {"examples": len(training), "held_out": len(validation), "dropped": data.dropped, "cut": data.cut}
    prepared = Prepared(model, None, adapter, training, validation, counts, options, base.base)
    return prepared._replace(why_dropped="the answer is beyond"), config


def tune_encoder(config: TrainConfig, source: DataOptions, base: BaseOptions, run: RunOptions) -> None:
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
    objective = SPANS if source.task == "question-answering" else CLASSIFICATION
    tune(prepared, config, run, state, objective)


# ---------------------------------------------------------------------------------------------------
# Answers


class TunedEncoder:
    """An encoder with an adapter, or with the head that it came with. Raises OSError or ValueError."""

    def __init__(
        self, adapter_path: str | None, task: str | None, base: str | None, dtype: torch.dtype, device: torch.device
    ):
        adapter = HeadAdapter.load(adapter_path).to(device) if adapter_path else None
        metadata = adapter.metadata if adapter else {}
        task, base = task or metadata.get("task"), base or metadata.get("base")
        if task not in HEAD_TASKS or base is None:
            raise ValueError("--base and --task are missing, and no adapter says them")
        if task != metadata.get("task", task):
            raise ValueError(f"{adapter_path}: is for {metadata['task']}, not for {task}")
        model, own_head = load_encoder(base, dtype, device)
        check_head_task(task, model, Path(base))
        if metadata.get("base_fingerprint", "") not in ("", encoder_fingerprint(model)):
            warn(f"{adapter_path} was tuned on other weights than those of {base}")
        if adapter is None:
            if not suits(own_head, task):
                raise ValueError(f"{base}: has no head of its own for {task}; give --adapter FILE")
            adapter = head_adapter(model, own_head, own_head[-1].out_features, layers=1, length=1)
        adapter.check_base(layers=model.config.n_layers, dim=model.config.dim, heads=model.config.n_heads)
        self.model, self.adapter, self.task, self.base = model, adapter, task, Path(base)
        self.name = adapter_path or base
        self.max_length = min(int(metadata.get("max_seq_len", 512)), getattr(model.config, "max_length", 2**20))

    def evaluate_squad(self, data: Path, limit: int | None) -> dict[str, str]:
        """Say exact match and F1; returns the answers by question. Raises OSError or ValueError."""
        squad_metric()  # or say at once that it is missing
        tokenizer, questions = roberta_tokenizer(self.model, self.base), subset(read_squad(data), limit)
        bar = tqdm(questions, unit="question", file=sys.stderr)
        texts = [answer_squad(self.model, self.adapter, tokenizer, question, self.max_length) for question in bar]
        scores = squad_scores(texts, questions)
        click.echo(f"{len(questions):,} questions: exact match {scores['exact_match']:.2%}, F1 {scores['f1']:.2%}")
        return {question.id: text for question, text in zip(questions, texts)}

    def evaluate_classes(self, data: Path, limit: int | None, max_tokens: int) -> dict[str, str]:
        """Say the accuracy, and that of the commonest class; returns classes by example. Raises as `evaluate_squad`."""
        outputs = self.adapter.head[-1].out_features
        classes = json.loads(self.adapter.metadata.get("classes", "null")) or list(map(str, range(outputs)))
        examples = read_labelled(self.task, self.model, self.base, data, self.max_length, classes, limit).examples
        predicted = classify(self.model, self.adapter, examples, max_tokens)
        labels = [example.labels[0] for example in examples]
        share, [(commonest, number)] = accuracy(predicted, labels), Counter(labels).most_common(1)
        click.echo(
            f"{len(labels):,} examples: accuracy {share:.2%} ({round(share * len(labels)):,} right); "
            f"always {classes[commonest]!r}: {number / len(labels):.2%}"
        )
        return {example.name: classes[best] for example, best in zip(examples, predicted)}


# ---------------------------------------------------------------------------------------------------
# The commands


@cloup.group(context_settings={"show_default": True})
def main():
    """Tune the prompts, gates and head of a frozen ViT or RoBERTa, and measure how well it does."""


TASK_DATA = "Folders of pictures or .npz; .tsv, .csv, JSON; SQuAD."


@main.command("train", context_settings={"show_default": True, "default_map": asdict(TrainConfig())})
@option_group(
    "Data",
    option("--task", type=click.Choice(HEAD_TASKS), required=True, help="What is learnt."),
    option("--data", type=click.Path(), required=True, help=TASK_DATA),
    option("--limit", type=Count(), help="Use only so many examples, drawn from all."),
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
    parts = [pick(record, options) for record in (TrainConfig, DataOptions, BaseOptions, RunOptions)]
    launch(lambda: tune_encoder(*parts), options["out"])


@main.command("evaluate", context_settings={"show_default": True})
@option_group(
    "Data",
    option("--task", type=click.Choice(HEAD_TASKS), help="What was learnt.  [default: as the adapter says]"),
    option("--data", type=click.Path(path_type=Path), required=True, help=TASK_DATA),
    option("--limit", type=Count(), help="Ask only about so many, drawn from all."),
)
@option_group(
    "Model",
    option("--adapter", "adapter_path", type=click.Path(), help="Its file.  [default: none, and the base's own head]"),
    option("--base", type=click.Path(), help="The encoder.  [default: the one that the adapter names]"),
    *device_options,
)
@option_group("Run", option("--out", type=click.Path(path_type=Path), help="Write the answers there, as JSON."))
@option_group("Memory and speed", option("--micro-batch-tokens", type=Count(), default=8192, help=MICRO_BATCH_HELP))
def evaluate_command(data, task, adapter_path, base, out, limit, micro_batch_tokens, device, dtype):
    """Measure accuracy, or exact match and F1.

    Of an encoder with an adapter, or with the head that it came with.
    """
    with one_line_errors():
        if out is not None:
            require_writable(out)
        device, dtype = select_device(device, dtype)
        tuned = TunedEncoder(adapter_path, task, base, dtype, device)
        if tuned.task == "question-answering":
            answers = tuned.evaluate_squad(data, limit)
        else:
            answers = tuned.evaluate_classes(data, limit, micro_batch_tokens)
        if out is not None:
            write_json(out, answers, ensure_ascii=False)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        exit_rank(end.code)
