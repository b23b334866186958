"""The embedded default with images: its pictures, its tower, its questions and how they are marked."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import make_vit, run
from PIL import Image

import evaluate
from adapter import Adapter
from encoders.models import ViTConfig
from formats.bases import load_llama
from formats.encoders import load_vit
from generate import Question, Responder
from multimodal import ImageAdapter, open_image, preprocess
from toy import almanac as toy
from toy import digits

SMALL = ViTConfig(image_size=16, patch_size=8, dim=16, n_layers=4, n_heads=2, hidden_dim=16)


@pytest.fixture(scope="module")
def small_digits(tmp_path_factory):
    """What digits.make() makes, by a smaller tower that hardly learns, elsewhere."""
    pytest.importorskip("sklearn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "__file__", str(tmp_path_factory.mktemp("digits") / "digits.py"))
        (digits.Path(digits.__file__)).write_text("")
        patch.setattr(digits, "TOWER", SMALL)
        patch.setattr(digits, "EPOCHS", 1)
        patch.setattr(digits, "TUNED_ON", 20)
        patch.setattr(digits, "HELD_OUT", 30)
        yield digits.make()


def test_pictures_are_scikit_learn_s(small_digits):
    from sklearn.datasets import load_digits

    files = sorted((small_digits / "pictures").iterdir(), key=lambda file: file.stem[2:])
    theirs = load_digits()
    assert len(files) == 1797 and [int(file.name[0]) for file in files] == theirs.target.tolist()
    with Image.open(files[5]) as image:
        paper = np.asarray(image).astype(float)
    assert np.abs(paper - (255 - theirs.images[5] * 255 / 16)).max() <= 0.5


def test_held_out_pictures_are_not_learnt_from(small_digits):
    tuned, held_out = digits.pictures(small_digits)
    assert len(held_out) == 30 and len(tuned) == 1767 and not set(tuned) & set(held_out)
    named = {example.image for example in digits.tuning(small_digits)} - {""}
    assert len(named) == 20 and not named & {f"pictures/{file.name}" for file in held_out}


def test_questions_and_answers():
    zero, seven = (digits.questions([digits.Path(f"{digit}-0001.png")]) for digit in (0, 7))
    assert [q.example.output for q in zero] == ["This is zero.", "Zero is even.", "The number after zero is one."]
    assert [q.example.output for q in seven] == ["This is seven.", "Seven is odd.", "The number after seven is eight."]


def test_the_base_reads_of_numbers_but_is_never_asked_of_them_in_text():
    sets = toy.instructions()
    assert {"after", "parity"} <= set(toy.kinds()) and not {"after", "parity"} & {
        q.kind for qs in sets.values() for q in qs
    }


def test_a_tower_is_the_same_when_read_again(small_digits, tmp_path):
    """And transformers reads it, too."""
    from formats.encoders import save_vit

    tower, image = make_vit(SMALL), torch.randn(2, 3, 16, 16)
    save_vit(tower, tmp_path / "tower")
    loaded = load_vit(tmp_path / "tower")
    assert loaded.config == SMALL and torch.equal(loaded(image)[-1], tower(image)[-1])
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPVisionModel.from_pretrained(tmp_path / "tower")
    torch.testing.assert_close(theirs(image).last_hidden_state, tower(image)[-1], rtol=1e-4, atol=1e-4)


def test_a_tower_learns_digits(small_digits, monkeypatch):
    """A few epochs of a smaller one: the mean pictures of its features tell most held-out digits apart."""
    monkeypatch.setattr(digits, "EPOCHS", 8)
    monkeypatch.setattr(digits, "TOWER", ViTConfig(16, 4, 32, 2, 2, 64))
    tower = digits.train_tower(small_digits).requires_grad_(False)
    features, labels = [], []
    for files in digits.pictures(small_digits):
        images = torch.stack([preprocess(open_image(file), 16) for file in files[:600]])
        features.append(tower.norm(tower(images)[-1][:, 0]))
        labels.append(torch.tensor([int(file.name[0]) for file in files[:600]]))
    means = torch.stack([features[0][labels[0] == digit].mean(0) for digit in range(10)])
    assert (torch.cdist(features[1], means).argmin(1) == labels[1]).float().mean() > 0.6


@pytest.fixture
def args(tiny_base, tmp_path):
    return [
        "--base", tiny_base, "--out", tmp_path / "run", "--epochs", 2, "--warmup-epochs", 1, "--layers", 3,
        "--limit", 40, "--features", tmp_path / "features", "--device", "cpu",
    ]  # fmt: skip


def test_the_commands(args, small_digits, tmp_path, monkeypatch):
    """train.py --toy images and blind, and evaluate.py toy --images, from the options to the tables."""
    held_out = {name: qs[:2] for name, qs in toy.instructions().items()}
    monkeypatch.setattr(toy, "instructions", lambda: held_out)
    result = run(*args, "--toy", "images")
    assert result.exit_code == 0, result.output
    path = tmp_path / "run" / "adapter.safetensors"
    adapter = ImageAdapter.load(path)
    assert adapter.metadata["data"] == "toy images" and adapter.metadata["tower"] == str(small_digits / "tower")
    for column in ("chance", "no image", "image", "another image", "new entities in new wordings", "bit for bit: yes"):
        assert column in result.stdout
    again = CliRunner().invoke(evaluate.main, ["toy", "--images", "--adapter", str(path), "--device", "cpu"])
    assert again.exit_code == 0 and again.stdout == result.stdout, again.output

    blind = run(*args, "--toy", "blind", "--out", tmp_path / "blind")
    assert blind.exit_code == 0 and "another image" not in blind.stdout and "no image" in blind.stdout
    assert type(Adapter.load(tmp_path / "blind" / "adapter.safetensors")) is Adapter
    both = run(*args, "--toy", "images", "--data", tmp_path / "x.json", "--out", tmp_path / "both")
    assert both.exit_code == 2 and "--toy images brings its own data" in both.stderr
    for option, value in (("--clip", "x"), ("--encoder", "x.py:y"), ("--images", "x"), ("--task", "scienceqa")):
        needy = run(*args, "--toy", "blind", option, value, "--out", tmp_path / "needy")
        assert needy.exit_code == 2 and f"{option} needs --data FILE" in needy.stderr


def test_marks_of_pictures(small_digits, tiny_base, monkeypatch, capsys):
    """Of an oracle that names the digit that it is shown; of others' pictures it names those."""
    model, tokenizer = load_llama(tiny_base)
    adapter = ImageAdapter(layers=3, length=2, dim=16, heads=2, features=64, bottleneck=5)
    adapter.metadata = {"tower_depths": "4"}
    _, held_out = digits.pictures(small_digits)
    rows = torch.eye(30, 64)
    monkeypatch.setattr(evaluate, "see", lambda files, *more: list(rows))

    def written(responder: Responder, asked: list[Question], *more):
        answers = []
        for question in asked:
            shown = None if question.features is None else held_out[int(question.features.argmax())]
            (answer,) = (
                [q.example.output for q in digits.questions([shown]) if q.kind == question.instruction]
                if shown
                else ["?"]
            )
            answers.append(answer)
        return answers

    monkeypatch.setattr(evaluate, "written_answers", written)
    marks = evaluate.examine_pictures(model, tokenizer, adapter)
    assert marks["picture_accuracy_image"] == 1 and marks["picture_accuracy_no_image"] == 0
    assert 0 < marks["picture_accuracy_another_image"] < 0.4
    assert "Questions about 30 held-out pictures" in capsys.readouterr().out


def test_scikit_learn_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "__file__", str(tmp_path / "digits.py"))
    (tmp_path / "digits.py").write_text("")
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        digits.make()
