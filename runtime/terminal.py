"""Input lines from a terminal or a pipe."""

from collections.abc import Iterator
from functools import partial
from typing import TextIO

import click

from runtime.distributed import broadcast_from_rank0

LINES = "Every line is a separate instruction."
TURNS = "Every line is a turn of one conversation. /reset: start a new one. /system TEXT: set its system message."
HELP = "/adapter NAME: use this adapter. /none: use the base alone. /quit: end. /help: print this line."
QUIT = ("exit", "quit", "/exit", "/quit")


def read_line(stdin: TextIO) -> str:
    """Return the next line, or "" at the end of the input. Bytes that are not UTF-8 become unpaired surrogates."""
    if not hasattr(stdin, "buffer"):
        return stdin.readline()
    return stdin.buffer.readline().decode("utf-8", errors="surrogateescape")


def read_commands(stdin: TextIO, terminal: bool, has_turns: bool) -> Iterator[tuple[str, str]]:
    """Yield every line as ("", line). On a terminal, yield a slash command as (command, text), and skip empty lines.

    Stops at the end of the input and, on a terminal, at a line in QUIT. A help line is printed on a terminal at the
    start and at /help; `has_turns` selects its wording. The first rank reads for all ranks. Raises ValueError if
    standard input is an empty pipe.
    """
    number = 0
    help = f"{TURNS if has_turns else LINES} {HELP}"
    click.echo(f"{help}\n" if terminal else "", nl=False, err=True)
    while True:
        click.echo("> " if terminal else "", nl=False, err=True)
        line = broadcast_from_rank0(partial(read_line, stdin))
        number += 1
        if number == 1:
            line = line.removeprefix("\ufeff")  # the byte order mark that some editors write
        if not line and not terminal and number == 1:
            raise ValueError("there is no PROMPT, and standard input is empty")
        if not line or (terminal and line.strip() in QUIT):
            return
        line = line.rstrip("\r\n")
        command, _, text = line.partition(" ")
        if not terminal:
            yield "", line
        elif command == "/help":
            click.echo(help, err=True)
        elif command in ("/adapter", "/none", "/reset", "/system"):
            yield command, text.strip()
        elif line:
            yield "", line
