"""Run the Python blocks of a page, from the root of the repository: python docs/examples/run_page.py docs/method.md.

The blocks run in order and share one namespace, as if a reader typed them. The output of each block is printed;
the page shows it below the block. Pictures are written to the paths in the blocks.
"""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import click

PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_blocks(text: str, page: str) -> Iterator[str]:
    """Run the blocks in order, and yield the output of each. Errors in a block have the line numbers of the page."""
    names: dict[str, object] = {}
    for block in PYTHON.finditer(text):
        above = "\n" * text.count("\n", 0, block.start(1))
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(above + block[1], page, "exec"), names)
        yield printed.getvalue()


@click.command()
@click.argument("page", type=click.Path(exists=True, dir_okay=False))
def main(page):
    """Run the Python blocks of PAGE, and print the output of each."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    for number, printed in enumerate(run_blocks(Path(page).read_text(encoding="utf-8"), page), start=1):
        click.echo(f"--- block {number}\n{printed}", nl=False)


if __name__ == "__main__":
    main()
