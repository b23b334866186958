"""Score an adapter, or a base alone: python evaluate.py scienceqa --data problems.json --adapter FILE.

There is a command for every task in tasks/ that can be scored. Two further commands are `toy`, for adapters trained
without --data, and `harness`, for EleutherAI's lm-evaluation-harness.
"""

import inspect
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import click
import cloup
from cloup import option, option_group

from data import Example, Request
from formats.chat_templates import NAMES
from formats.image_encoders import load_image_encoder
from formats.loading import load_with_adapters
from generate import Responder
from multimodal import ImageAdapter
from runtime.cli import BASE_HELP, PATH, Count, Real, adapter_options, bits_options, compile_option, device_options
from runtime.cli import encoder_options, ending_options, one_line_errors
from runtime.device import select_device
from runtime.distributed import inference_ranks, rank, run_command
from runtime.files import require_writable
from tasks import TASKS, Task, load_task
from tasks.responses import Responses, most_likely_choices, read_responses, write_scores, generate_responses
from tasks.images import attach_features, with_images


@dataclass(frozen=True)
class EvalConfig:
    """The options of the command that scores a task."""

    data: Path
    out: Path
    max_new_tokens: int
    images: Path | None  # a folder
    vision_encoder: str | None
    encoder: str | None
    skip_missing: bool
    limit: int | None
    results: Path | None  # a file of responses to score, without running a model
    batch_size: int
    adapter_path: str | None
    base: str | None
    device: str
    dtype: str
    bits: str | None = None
    split: str | None = None
    choose: bool = False
    compile: bool = False


def evaluate(name: str, task: Task, config: EvalConfig) -> None:
    """Score responses to the examples of a task, and write the results.

    The responses are generated, chosen (--choose), or read from a file. Raises OSError or ValueError.
    """
    config = replace(config, images=config.images or config.data.parent)
    read = task.read_for_scoring or task.read
    examples = read(config.data, images=config.images, split=config.split)[: config.limit]
    if config.results is None:
        responses = respond(name, task, examples, config)
    elif config.adapter_path or config.base or config.choose:
        raise ValueError("--results already contains the responses; omit --adapter, --base and --choose")
    else:
        read = task.read_responses or read_responses
        texts, method = read(config.results, examples), f"as in {config.results}"
        responses = Responses(name, config.split, examples, texts, method, False, config.results.stem)
    scores = task.score(responses.examples, responses.texts)
    if rank() == 0:
        (task.write_results or write_scores)(responses, scores, config.out)


def respond(name: str, task: Task, examples: list[Example], config: EvalConfig) -> Responses:
    """Generate or choose a response to each example, with the adapter or the base alone.

    If the adapter has a projection, examples whose image is missing are skipped with --skip-missing, and their number
    is printed. Raises OSError or ValueError.
    """
    if config.choose and config.compile:
        raise ValueError("--compile applies only to generated responses; omit --compile or --choose")
    device, dtype = select_device(config.device, config.dtype)
    paths = [config.adapter_path] if config.adapter_path else []
    loading = {"bits": config.bits, "compiled": config.compile}
    loading["decoding"] = not config.choose  # --choose scores the options, without decoding
    model, tokenizer, adapters = load_with_adapters(paths, config.base, device, dtype, **loading)
    responder = Responder(model, tokenizer, adapters, max_new_tokens=config.max_new_tokens, compiled=config.compile)
    model_name, adapter = next(iter(adapters.items()), ("base", None))
    if isinstance(adapter, ImageAdapter):
        kept = with_images(examples, config.images, config.skip_missing, config.data)
        if len(kept) < len(examples):
            number = f"{len(examples) - len(kept):,} of {len(examples):,}"
            click.echo(f"{number} examples skipped: image not found", err=True)
        examples = kept
        if any(example.image for example in examples):
            encoder = load_image_encoder(config.vision_encoder, config.encoder, dtype, device, adapter)
            examples = attach_features(examples, config.images, encoder)
    elif task.needs_images:
        raise ValueError(f"the task {name} needs an adapter that was trained on images; give it with --adapter")
    elif config.vision_encoder or config.encoder:
        raise ValueError("--clip and --encoder need an adapter that was trained on images")
    requests = [Request(example.instruction, example.input, model_name, example.features) for example in examples]
    if config.choose:
        method, choices = "the most likely option", [task.choices(example) for example in examples]
        texts = most_likely_choices(responder, requests, choices, config.batch_size)
    else:
        method = "generated, greedily, and parsed"
        texts = generate_responses(responder, requests, config.batch_size, task.unit)
    trained = sum(parameter.numel() for parameter in adapter.parameters()) if adapter else 0
    return Responses(name, config.split, examples, texts, method, not config.choose, model_name, trained)


# ---------------------------------------------------------------------------------------------------
# The commands

base_options = [
    option("--base", type=click.Path(), help=f"{BASE_HELP}  [default: the one that the adapter names]"),
    *device_options,
    *bits_options,
]
model_options = option_group(
    "Model",
    option("--adapter", "adapter_path", type=click.Path(), help="An adapter file.  [default: the base alone]"),
    *base_options,
)
image_options = option_group(
    "Images",
    option("--images", type=PATH, help="The folder of the images.  [default: the data's folder]"),
    *encoder_options,
    option(
        "--skip-missing", is_flag=True, help="Skip examples whose image is missing, instead of ending with an error."
    ),
)


class TaskCommands(click.Group):
    """A group with a command for every task that can be scored. Listing or looking up commands imports tasks."""

    command_class = cloup.Command

    def list_commands(self, context) -> list[str]:
        return sorted([*super().list_commands(context), *(name for name in TASKS if load_task(name).score)])

    def get_command(self, context, name: str):
        if name in TASKS and load_task(name).score:
            return task_command(name, load_task(name))
        return super().get_command(context, name)

    def resolve_command(self, context, args: list[str]):
        if args[0] not in self.list_commands(context):
            raise click.NoSuchCommand(args[0], possibilities=self.list_commands(context), ctx=context)
        return super().resolve_command(context, args)


@click.group(cls=TaskCommands, context_settings={"show_default": True})
def main():
    """Score an adapter, or a base alone."""


def task_command(name: str, task: Task) -> click.Command:
    """Create the command of a task that can be scored, with the options that the task supports."""
    choose_help = "Choose the most likely option, instead of generating and parsing a response."
    batch_help = f"Number of prompts{', or answer options with --choose,' if task.choices else ''} per batch."
    split = [option("--split", default=task.split, help="The split of the data to score.")] if task.split else []
    choose = [option("--choose", is_flag=True, help=choose_help)] if task.choices else []

    @cloup.command(name, help=inspect.getdoc(task.score), context_settings={"show_default": True})
    @option_group(
        "Data",
        option("--data", type=PATH, required=True, help=task.data_help),
        *split,
        option("--limit", type=Count(), help="Use only this many examples, from the beginning of the file."),
        option("--results", type=PATH, help="Score the responses in this file, without running a model."),
    )
    @model_options
    @image_options
    @option_group(
        "Responses",
        *choose,
        option("--max-new-tokens", type=Count(), default=task.max_new_tokens, help="Maximum tokens per response."),
        option("--batch-size", type=Count(), default=64, help=batch_help),
        compile_option,
        option("--out", type=PATH, default=f"out-{name}", help="Folder for responses and scores."),
    )
    def command(**options):
        with one_line_errors(), inference_ranks():
            if rank() == 0:
                require_writable(options["out"], folder=True)
            evaluate(name, task, EvalConfig(**options))

    return command


@main.command("toy")
@option_group(
    "Model",
    option("--adapter", "adapter_path", type=click.Path(), required=True, help="An adapter file."),
    *base_options,
)
@option_group(
    "Data",
    option("--with-images", is_flag=True, help="Also score questions about held-out images of digits."),
    option("--images", "with_images", is_flag=True, hidden=True),  # the old name, kept for compatibility
)
def evaluate_toy(adapter_path, with_images, base, device, dtype, bits):
    """Score answers to the toy's held-out questions.

    The answers of the base with the adapter are compared with those of the base alone.
    """
    from toy import exam

    with one_line_errors(), inference_ranks():
        model, tokenizer, adapters = load_with_adapters([adapter_path], base, *select_device(device, dtype), bits=bits)
        (adapter,) = adapters.values()
        if with_images:
            exam.evaluate_digits(model, tokenizer, adapter)
        exam.evaluate_almanac(model, tokenizer, adapter)


def at_commas(ctx, param, value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


@main.command("harness")
@option_group(
    "Tasks",
    option(
        "--tasks",
        required=True,
        callback=at_commas,
        help="Tasks of the harness, separated by commas: names or YAML files.",
    ),
    option("--include-path", "include", type=PATH, help="A folder with further tasks."),
    option("--num-fewshot", type=Count(0), help="Number of few-shot examples.  [default: the task's]"),
    option("--limit", type=Count(), help="Use only this many examples of each task."),
    option("--template", type=click.Choice(NAMES), help="The prompt template.  [default: none]"),
    *ending_options,
)
@adapter_options
@option_group(
    "Columns",
    option(
        "--strength",
        "strengths",
        type=Real(0, 1e3),
        multiple=True,
        default=[1.0],
        help="Factor by which the gates are multiplied; repeatable, with one column per factor.",
    ),
    option("--compare", is_flag=True, help="Also score the base alone.  [default: only if there is no adapter]"),
    *bits_options,
    compile_option,
)
@option_group(
    "Results",
    option("--batch-size", type=Count(), default=16, help="Number of continuations (or responses) per batch."),
    option(
        "--log-samples",
        "samples",
        is_flag=True,
        help="Also write every prompt and response, to a file per task and column.",
    ),
    option("--out", type=PATH, default="out-harness", help="Folder for the results."),
)
def evaluate_by_harness(adapter_paths, base, device, dtype, bits, compile, strengths, compare, template, **options):
    """Score with EleutherAI's lm-evaluation-harness.

    One run can compare several adapters, each at several strengths, and the base. Requires the package lm_eval: pip
    install lm_eval.
    """
    with one_line_errors(), inference_ranks():
        from tasks import harness

        if rank() == 0:
            require_writable(options["out"], folder=True)
        loaded = load_with_adapters(adapter_paths, base, *select_device(device, dtype), bits=bits, compiled=compile)
        base = base or next(iter(loaded[2].values())).metadata["base"]
        info = {"base": base, "adapters": adapter_paths, "bits": bits, "dtype": dtype, "template": template}
        ending = {name: options.pop(name) for name in ("stop", "repetition_penalty")}
        columns = harness.make_columns(
            loaded, strengths, compare, template, options["batch_size"], info | ending, compiled=compile, **ending
        )
        harness.print_columns(harness.run_harness(columns, template=template, **options))


if __name__ == "__main__":
    # Some of the harness's tasks import Hugging Face's package `evaluate`, not this file: search this folder last.
    sys.path.sort(key=lambda folder: Path(folder).resolve() == Path(__file__).resolve().parent)
    run_command(main)
