"""Recreate the toy's base and vision encoder, which are part of the repository: python -m toy."""

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from formats.encoders import save_encoder
from runtime.cli import PATH, one_line_errors
from toy.digits import ENCODER, train_vision_encoder, write_pictures
from toy.language_model import BASE, make_base


@click.command(context_settings={"show_default": True})
@click.option("--base", type=PATH, default=BASE, show_default="toy/base", help="Folder to write the base to.")
@click.option(
    "--encoder",
    type=PATH,
    default=ENCODER,
    show_default="toy/vision_encoder",
    help="Folder to write the vision encoder to.",
)
def main(base: Path, encoder: Path) -> None:
    """Pretrain the toy's base and its vision encoder (about four minutes on one core)."""
    with one_line_errors(), TemporaryDirectory() as pictures:
        write_pictures(Path(pictures))
        make_base(base)
        save_encoder(train_vision_encoder(Path(pictures)), encoder)


if __name__ == "__main__":
    main()
