"""The toys, which train.py uses without --data: their examples, and the commands that train and evaluate on them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import run

import evaluate
from adapter import Adapter
from multimodal import ImageAdapter
from toy import almanac, digits, toys


@dataclass(frozen=True)
class Options:
    images: str | None = None
    vision_encoder: str | None = None
    features: Path | None = None


def test_each_toy_has_its_examples(small_digits, tmp_path):
    """Examples are named by their number. The blind toy has the examples of the image toy, but no vision encoder."""
    text, options = toys.TOYS["text"].examples(Options())
    assert options == Options() and [example.name for example in text[:2]] == ["toy question 0", "toy question 1"]
    assert [e.output for e in text] == [question.example.output for question in almanac.instructions()["training"]]
    with_images, options = toys.TOYS["images"].examples(Options(features=tmp_path))
    folder = Path(options.images)
    assert options == Options(str(tmp_path / "digits"), str(digits.ENCODER), tmp_path)
    assert [e.name for e in with_images] == [f"toy question {i}" for i in range(3 * 20 + len(text))]
    images = {example.image for example in with_images} - {""}
    assert len(images) == 20 and all((folder / image).is_file() for image in images)
    assert toys.TOYS["blind"].examples(Options(features=tmp_path)) == (with_images, Options(features=tmp_path))


@pytest.fixture
def args(tiny_base, tmp_path):
    return [
        "--base", tiny_base, "--out", tmp_path / "run", "--epochs", 2, "--warmup-epochs", 1, "--layers", 3,
        "--limit", 40, "--features", tmp_path / "features", "--device", "cpu",
    ]  # fmt: skip


def test_image_toys_are_trained_and_evaluated(args, small_digits, tmp_path, monkeypatch):
    """train.py --toy images, train.py --toy blind and evaluate.py toy --with-images print their tables."""
    held_out = {name: questions[:2] for name, questions in almanac.instructions().items()}
    monkeypatch.setattr(almanac, "instructions", lambda: held_out)
    result = run(*args, "--toy", "images")
    assert result.exit_code == 0, result.output
    path = tmp_path / "run" / "adapter.safetensors"
    adapter = ImageAdapter.load(path)
    assert adapter.metadata["data"] == "toy images" and adapter.metadata["vision_encoder"] == str(digits.ENCODER)
    for column in ("chance", "no image", "image", "another image", "new entities in new wordings", "bit for bit: yes"):
        assert column in result.stdout
    for option in ("--with-images", "--images"):  # --images is the name of earlier versions
        again = CliRunner().invoke(evaluate.main, ["toy", option, "--adapter", str(path), "--device", "cpu"])
        assert again.exit_code == 0 and again.stdout == result.stdout, again.output

    blind = run(*args, "--toy", "blind", "--out", tmp_path / "blind")
    assert blind.exit_code == 0 and "another image" not in blind.stdout and "no image" in blind.stdout
    assert type(Adapter.load(tmp_path / "blind" / "adapter.safetensors")) is Adapter
    both = run(*args, "--toy", "images", "--data", tmp_path / "x.json", "--out", tmp_path / "both")
    assert both.exit_code == 2 and "--toy images brings its own data" in both.stderr
    for option, value in (("--clip", "x"), ("--encoder", "x.py:y"), ("--images", "x"), ("--task", "scienceqa")):
        refused = run(*args, "--toy", "blind", option, value, "--out", tmp_path / "needy")
        assert refused.exit_code == 2 and f"{option} needs --data FILE" in refused.stderr
