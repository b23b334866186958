"""Code that the commands share: number types, options, and error reporting."""

import math
import sys
import time
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import Field, field, fields
from pathlib import Path

import click
import torch
from cloup import Command, option, option_group

from runtime.distributed import is_first_to_report, is_lost_rank, launched_world_size, rank
from runtime.errors import error_line, is_out_of_memory, printable

SEED = click.IntRange(0, 2**63 - 1)
PATH = click.Path(path_type=Path)  # the type of an option whose value becomes a Path


class Real(click.FloatRange):
    """A finite number in a range; click.FloatRange alone also accepts NaN and infinity."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Count(click.types.IntParamType):
    """An integer from `least` to 2**31 - 1."""

    def __init__(self, least: int = 1):
        self.least = least

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not self.least <= number < 2**31:
            self.fail(f"{str(value)[:40]} is not in the range {self.least} to 2**31 - 1.", param, ctx)
        return number


# ---------------------------------------------------------------------------------------------------
# Options that are the fields of a dataclass


def setting(default, help: str, type=None, flag: str | None = None, **more) -> Field:
    """Declare a dataclass field that is also a command-line option.

    The option is --field-name unless `flag` is given. `type` is a click type; `more` are further arguments of
    click.option. If the default is a bool, the option is a flag without a value.
    """
    if isinstance(default, bool):
        more["is_flag"] = True
    return field(default=default, metadata={"option": {"help": help, "type": type, **more}, "flag": flag})


def options_of(record: type, title: str, only: Collection[str] | None = None, extra: Collection = ()):
    """Return a decorator that adds the settings of a dataclass as a group of options.

    `only` restricts the settings to these names; `extra` are further options of the group.
    """
    options = []
    for each in fields(record):
        if "option" in each.metadata and (only is None or each.name in only):
            flag = each.metadata["flag"] or f"--{each.name.replace('_', '-')}"
            options.append(option(flag, each.name, default=each.default, **each.metadata["option"]))
    return option_group(title, *options, *extra)


def from_options(record: type, options: dict):
    """Create the dataclass from a command's options, ignoring options that are not fields of the dataclass."""
    return record(**{each.name: options[each.name] for each in fields(record) if each.name in options})


DEVICE_HELP = "Device, such as cpu, cuda, cuda:1 or mps; auto uses a GPU if there is one."
DTYPE_HELP = "Data type of the base; auto: bfloat16 on a CUDA GPU, float32 elsewhere."
BASE_HELP = "The base model: its folder or file, or its name on Hugging Face."
device_options = [  # the arguments of `runtime.device.select_device`
    option("--device", default="auto", help=DEVICE_HELP),
    option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help=DTYPE_HELP),
]
bits_options = [  # both fill `bits` with None, "none", "8" or "4"
    option(
        "--bits",
        type=click.Choice(["auto", "none", "8", "4"]),
        callback=lambda context, parameter, bits: None if bits == "auto" else bits,
        help="Bits per weight of the layers; none: as --dtype; auto: a GGUF file's 8 or 4, or none.  [default: auto]",
    ),
    option("--int8", "bits", flag_value="8", hidden=True),  # an old name, kept for compatibility
]
compile_option = option("--compile", is_flag=True, help="Compile the decoding step: slower at the start, then faster.")
ADAPTER_HELP = "An adapter: its file, the folder of its run, or NAME=FILE; repeatable."
adapter_options = option_group(
    "Model",
    option("--adapter", "adapter_paths", type=click.Path(), multiple=True, help=ADAPTER_HELP),
    option("--base", type=click.Path(), help=f"{BASE_HELP}  [default: the one that the first adapter names]"),
    *device_options,
)
PENALTY_HELP = "A value above 1 makes tokens of the prompt and the response less likely."
ending_options = [
    option("--stop", metavar="TEXT", multiple=True, help="End the response before this text; repeatable."),
    option("--repetition-penalty", type=Real(0, 1e3, min_open=True), default=1.0, help=PENALTY_HELP),
]
encoder_options = [  # the arguments of `formats.image_encoders.load_image_encoder`
    option(
        "--clip",
        "vision_encoder",
        type=click.Path(),
        help="Folder or file of CLIP's vision encoder.  [default: the adapter's]",
    ),
    option(
        "--encoder", help="Instead of --clip, a Python function that returns the features of a file, as FILE.py:NAME."
    ),
]


class PromptCommand(Command):
    """A command whose argument is a prompt. If the prompt begins with a dash, the error message says how to pass it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            error.message = f"{error.message.rstrip('.')}; if this is the prompt, put -- before it."
            raise


# ---------------------------------------------------------------------------------------------------
# Warnings and errors


def warn(text: str) -> None:
    """Print a one-line warning to standard error."""
    click.echo(f"warning: {printable(text)}", err=True)


@contextmanager
def one_line_errors():
    """Report errors that a user can act on as one line on standard error, and exit with code 2.

    These are ValueError, OSError, out of memory, and the loss of another rank. Any other error propagates.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if is_lost_rank(error):
            # The rank that failed has printed its error, and torchrun is about to end this one.
            time.sleep(3)
            report_lost_rank(error)
        elif isinstance(error, ValueError | OSError | torch.OutOfMemoryError) or is_out_of_memory(error):
            print_error(error)
        else:
            raise
        sys.exit(2)


def print_error(error: BaseException) -> None:
    """Print an error as one line, which names the rank if there are several."""
    if launched_world_size() == 1:
        click.echo(f"error: {error_line(error)}", err=True)
        return
    # If all ranks have the same error, the first one prints it, and torchrun ends the others before they print it.
    time.sleep(0.5 * rank())
    click.echo(f"\nerror: rank {rank()}: {error_line(error)}", err=True)  # on a line below the progress bar


def report_lost_rank(error: BaseException, advice: str = "") -> None:
    """Print that another rank has ended, followed by `advice`, unless another rank has printed it.

    Lower ranks try first. If torchrun's store is gone, every rank prints it.
    """
    time.sleep(0.5 * rank())
    if is_first_to_report():
        click.echo(f"\nerror: rank {rank()}: another rank has ended ({error_line(error)[:100]} ...){advice}", err=True)
