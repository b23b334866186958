"""What commands that answer can be told: generate.py, and in part evaluate.py and the demo."""

from collections.abc import Mapping, Sequence

import click
from cloup import option, option_group

from runtime.cli import SEED, Count, Real, bits_options, device_options
from runtime.distributed import rank
from runtime.files import require_writable

model_options = option_group(
    "Model",
    option(
        "--adapter",
        "adapter_paths",
        type=click.Path(),
        multiple=True,
        help="FILE, a run's folder, or NAME=FILE; repeatable.",
    ),
    option("--base", type=click.Path(), help="The base model.  [default: the one that the adapter's file names]"),
    *device_options,
)

encoder_options = [  # of which `load_image_encoder` makes what sees images
    option("--clip", "tower", type=click.Path(), help="CLIP's vision tower.  [default: the adapter's]"),
    option("--encoder", help="A function of yours, FILE.py:NAME, instead: it makes (M, Cv) numbers of a file."),
]


def template_option(templates: Sequence[str]):
    """A decorator; `templates` are formats.chat_templates.NAMES."""
    return option(
        "--template", type=click.Choice(templates), help="How it is written.  [default: as the adapter's data]"
    )


def question_options(templates: Sequence[str]):
    """A decorator; `templates` are formats.chat_templates.NAMES."""
    return option_group(
        "What is asked",
        option("--input", default="", show_default=False, help="Alpaca's input field: what the instruction is about."),
        option(
            "--image", "--video", "--audio", "images", type=click.Path(), multiple=True, help="What PROMPT is about."
        ),
        *encoder_options,
        template_option(templates),
        option("--raw", is_flag=True, help="Continue the prompt as it stands, without any template."),
        option("--compare", is_flag=True, help="Answer with the base alone, and with every adapter."),
    )


sampling_options = option_group(
    "Sampling",
    option("--temperature", type=Real(0, 1e3), default=0.1, help="Of the softmax; 0 is greedy."),
    option(
        "--top-p",
        type=Real(0, 1, min_open=True),
        default=0.75,
        help="Nucleus sampling: from the likeliest tokens that sum to p.",
    ),
    option("--greedy", is_flag=True, help="Always the likeliest token: --temperature 0."),
    option("--strength", "gate_scale", type=Real(0, 1e3), default=1.0, help="Scales the gates; 0 is the base alone."),
    option("--max-new-tokens", type=Count(), default=256, help="Tokens of an answer, at most."),
    option("--seed", type=SEED, default=0, help="Of sampling."),
)
batch_options = option_group(
    "Many prompts",
    option("--prompts", "jsonl", type=click.Path(), help="JSONL of instruction and input, or messages; and adapter."),
    option("--images", "folder", type=click.Path(), help="Where their images are.  [default: beside the file]"),
    option("--out", type=click.Path(), help="Where the answers go: the same records with an output."),
    option("--batch-size", type=Count(), default=64, help="Prompts, or images, answered at once."),
)


def speed_options(attentions: list[str]):
    """A decorator; `attentions` are the keys of adapter.ATTENTIONS."""
    return option_group(
        "Memory and speed",
        *bits_options,
        option(
            "--compile", is_flag=True, help="torch.compile the step from token to token: slow to start, then faster."
        ),
        option("--attention", type=click.Choice(attentions), default="fused", help="Two ways to the same numbers."),
    )


def check_question(
    prompt: str | None,
    input: str,
    adapter_paths: Sequence[str],
    compare: bool,
    images: Sequence[str],
    jsonl: str | None,
    out: str | None,
    options: Mapping[str, object],
) -> None:
    """Raise ValueError where options exclude or need each other, OSError where the answers could not be written."""
    if compare and not adapter_paths:
        raise ValueError("--compare needs --adapter FILE")
    if options["raw"] and input:
        raise ValueError("--input is a field of the template that --raw does without")
    if options["raw"] and options["template"]:
        raise ValueError(f"--template {options['template']} and --raw: with or without a template")
    if (jsonl is None) != (out is None):
        raise ValueError("--prompts and --out go together")
    if jsonl is not None and (prompt is not None or compare or input):
        raise ValueError("--prompts names all there is to answer: no PROMPT, --input or --compare beside it")
    if images and (prompt is None or compare or len(adapter_paths) != 1):
        raise ValueError("--image goes with a PROMPT and one --adapter")
    if out is not None and rank() == 0:
        require_writable(out)
