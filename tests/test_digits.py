"""The digits: images, the vision encoder trained on them, and the questions about them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_vit
from PIL import Image

from encoders.media import open_image, preprocess
from encoders.models import ViTConfig
from formats.encoders import load_vit, save_encoder
from toy import digits


def test_images_equal_those_of_scikit_learn(small_digits):
    from sklearn.datasets import load_digits

    files = sorted((small_digits / "pictures").iterdir(), key=lambda file: file.stem[2:])
    theirs = load_digits()
    assert len(files) == 1797 and [int(file.name[0]) for file in files] == theirs.target.tolist()
    with Image.open(files[5]) as image:
        pixels = np.asarray(image).astype(float)
    assert np.abs(pixels - (255 - theirs.images[5] * 255 / 16)).max() <= 0.5


def test_held_out_images_are_not_trained_on(small_digits):
    trained, held_out = digits.pictures(small_digits)
    assert len(held_out) == 30 and len(trained) == 1767 and not set(trained) & set(held_out)


def test_questions_have_the_expected_answers():
    zero, seven = (digits.questions([Path(f"{digit}-0001.png")]) for digit in (0, 7))
    assert [q.example.output for q in zero] == ["This is zero.", "Zero is even.", "The number after zero is one."]
    assert [q.example.output for q in seven] == ["This is seven.", "Seven is odd.", "The number after seven is eight."]


def test_saved_vision_encoder_is_loaded_unchanged(small_digits, tmp_path):
    """transformers loads the same files and computes the same states."""
    vision_encoder, image = make_vit(digits.CONFIG), torch.randn(2, 3, 16, 16)
    save_encoder(vision_encoder, tmp_path / "vision_encoder")
    loaded = load_vit(tmp_path / "vision_encoder")
    assert loaded.config == digits.CONFIG and torch.equal(loaded(image)[-1], vision_encoder(image)[-1])
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPVisionModel.from_pretrained(tmp_path / "vision_encoder")
    torch.testing.assert_close(theirs(image).last_hidden_state, vision_encoder(image)[-1], rtol=1e-4, atol=1e-4)


def test_vision_encoder_learns_digits(small_digits, monkeypatch):
    """After 8 epochs, the features of over 60% of the held-out images are nearest to the mean of their digit."""
    monkeypatch.setattr(digits, "EPOCHS", 8)
    monkeypatch.setattr(digits, "CONFIG", ViTConfig(16, 4, 32, 2, 2, 64))
    vision_encoder = digits.train_vision_encoder(small_digits).requires_grad_(False)
    features, labels = [], []
    for files in digits.pictures(small_digits):
        images = torch.stack([preprocess(open_image(file), digits.CONFIG) for file in files[:600]])
        features.append(vision_encoder.norm(vision_encoder(images)[-1][:, 0]))
        labels.append(torch.tensor([int(file.name[0]) for file in files[:600]]))
    means = torch.stack([features[0][labels[0] == digit].mean(0) for digit in range(10)])
    assert (torch.cdist(features[1], means).argmin(1) == labels[1]).float().mean() > 0.6


def test_missing_scikit_learn_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        digits.write_pictures(tmp_path)
    assert not list(tmp_path.iterdir())


def test_bundled_vision_encoder_recognizes_digits(tmp_path):
    """The features of at least 90% of the held-out images are nearest to the mean of their digit."""
    pytest.importorskip("sklearn")
    digits.write_pictures(tmp_path)
    vision_encoder = load_vit(digits.ENCODER)
    assert vision_encoder.config == digits.CONFIG
    features, labels = [], []
    for files in digits.pictures(tmp_path):
        images = torch.stack([preprocess(open_image(file), digits.CONFIG) for file in files[:600]])
        with torch.no_grad():
            features.append(vision_encoder.norm(vision_encoder(images)[-1][:, 0]))
        labels.append(torch.tensor([int(file.name[0]) for file in files[:600]]))
    means = torch.stack([features[0][labels[0] == digit].mean(0) for digit in range(10)])
    assert (torch.cdist(features[1], means).argmin(1) == labels[1]).float().mean() >= 0.9
