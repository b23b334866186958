"""Adapters for images, videos and sounds: features, their projection, and the commands."""

import json
import shutil
import time
import wave
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import (
    ROOT,
    FOUR_LAYER_VIT,
    Ranks,
    save_video,
    make_images,
    make_model,
    make_tokens,
    make_vit,
    openai_state_dict,
    make_picture,
    train_command,
)
from PIL import Image
from safetensors.torch import load_file

import generate
import train
from adapter import Adapter
from data import AlpacaTemplate, check_record, hold_out
from encoders.media import open_video, preprocess
from encoders.models import ViTConfig
from formats.adapters import load_adapter
from formats.bases import load_llama
from formats.encoders import load_vit
from formats.image_encoders import FunctionEncoder
from multimodal import (
    ImageAdapter,
    encode_images,
    encode_with_function,
    global_features,
    layers_at_depths,
    load_function,
    vision_encoder_fingerprint,
)
from tasks import images
from training.run_files import read_metrics


def test_features_are_class_tokens_at_evenly_spaced_depths():
    assert layers_at_depths(24, 4) == [5, 11, 17, 23] and layers_at_depths(3, 2) == [0, 2]
    assert layers_at_depths(5, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="4 depths, because the vision encoder has 3 layers"):
        layers_at_depths(3, 4)
    vision_encoder, images = make_vit(), make_images(3)
    features = global_features(vision_encoder, images, 2)
    states = [vision_encoder(images)[i][:, 0].double() for i in (0, 2)]
    normalized = [(x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt() for x in states]
    torch.testing.assert_close(features.double(), torch.cat(normalized, dim=1), rtol=1e-5, atol=1e-5)
    assert features.shape == (3, 256) and not features.requires_grad


def make_image_adapter(model, features=256, **options):
    config = model.config
    adapter = ImageAdapter(
        layers=2, length=5, dim=config.dim, heads=config.n_heads, features=features, bottleneck=7,
        generator=torch.Generator().manual_seed(1), **options,
    )  # fmt: skip
    torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(2))
    return adapter


def test_number_of_parameters_equals_the_paper():
    with torch.device("meta"):
        adapter = ImageAdapter(layers=30, length=10, dim=4096, heads=32, features=4 * 1024)
    assert sum(p.numel() for p in adapter.projection.parameters()) == 593_992
    assert sum(p.numel() for p in adapter.parameters()) == 1_823_752


@pytest.mark.parametrize("config", ["gqa", "mha"])
def test_each_sample_uses_its_own_image_or_none(config):
    """Each sample has the same logits in a batch as alone. Without an image, nothing is added to its prompts."""
    model = make_model(config)
    adapter = make_image_adapter(model)
    features = torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    tokens = make_tokens(model, 3, 6)
    has_image = torch.tensor([True, False, True])
    with torch.no_grad():
        logits = model(tokens, adapter(features, has_image))
        for i in range(3):
            adaption_prompts = adapter(features[i : i + 1]) if has_image[i] else adapter()
            torch.testing.assert_close(
                logits[i : i + 1], model(tokens[i : i + 1], adaption_prompts), rtol=1e-4, atol=1e-4
            )
        others = model(tokens, adapter(features.flip(0), has_image))
        changed = (logits - others).abs().amax(dim=(1, 2))
        assert changed[0] > 0.01 and changed[1] == 0 and changed[2] > 0.01
        assert torch.equal(model(tokens, adapter(features, gate_scale=0.0)), model(tokens))


def test_gradients_reach_the_adapter_but_not_the_vision_encoder():
    model, vision_encoder = make_model(), make_vit()
    adapter = make_image_adapter(model)
    features = global_features(vision_encoder, make_images(2), 2)
    model(make_tokens(model, 2, 6), adapter(features)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for module in (model, vision_encoder) for p in module.parameters())


def test_same_generator_gives_the_same_adapter():
    one, other = (make_image_adapter(make_model()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_adapter_file_contains_the_projection(tmp_path):
    """Adapter.load refuses the file of an image adapter, and ImageAdapter.load that of a text-only adapter.

    Names of earlier versions in the metadata are replaced.
    """
    model = make_model()
    adapter = make_image_adapter(model)
    adapter.save(tmp_path / "a.safetensors", encoder="ViT-L/14")
    loaded = ImageAdapter.load(tmp_path / "a.safetensors")
    assert loaded.metadata["encoder"] == "ViT-L/14"
    features = torch.randn(2, 256)
    assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(loaded(features), adapter(features)))
    assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(loaded(), adapter()))
    adapter.save(tmp_path / "old.safetensors", tower="ViT-L/14", tower_depths=2)  # the names of earlier versions
    for load in (ImageAdapter.load, load_adapter):
        metadata = load(tmp_path / "old.safetensors").metadata
        assert metadata["vision_encoder"] == "ViT-L/14" and metadata["vision_encoder_depths"] == "2"
        assert not any("tower" in name for name in metadata)
    with pytest.raises(RuntimeError, match="projection"):  # a text-only adapter has none
        Adapter.load(tmp_path / "a.safetensors")

    shape = dict(layers=2, length=5, dim=32, heads=4)
    Adapter(**shape).save(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="has no projection: it is not an adapter for images"):
        ImageAdapter.load(tmp_path / "text.safetensors")
    adapter.projection[2] = torch.nn.Linear(7, 31)
    adapter.save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="b.safetensors: .*projection.2.*31"):
        load_adapter(tmp_path / "b.safetensors")


# ---------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Folder with a vision encoder, 48 images and a data file: one question per image, and 12 without an image."""
    folder = tmp_path_factory.mktemp("album")
    torch.save(openai_state_dict(make_vit(FOUR_LAYER_VIT)), folder / "ViT.pt")
    (folder / "pictures").mkdir()
    records = []
    for i in range(48):
        color = ("red", "blue", "green")[i % 3]
        pixels = np.random.default_rng(i).integers(0, 80, (30, 36, 3), dtype=np.uint8)
        pixels[..., {"red": 0, "green": 1, "blue": 2}[color]] += 150
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
        records.append({"instruction": "Name the color.", "output": f"{color}.", "image": f"pictures/{i}.png"})
        if i % 4 == 0:
            records.append({"instruction": "Name the capital of Peru.", "output": "Lima."})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def train_args(album, tiny_base, tmp_path):
    return [
        "--base", tiny_base, "--data", album / "data.json", "--clip", album / "ViT.pt", "--out", tmp_path / "run",
        "--features", tmp_path / "features", "--epochs", 60, "--batch-size", 8, "--val-size", 0, "--lr", 0.1,
        "--warmup-epochs", 1, "--layers", 3, "--device", "cpu",
    ]  # fmt: skip


def run(command, *args):
    return CliRunner().invoke(command.main, [str(arg) for arg in args])


def test_colors_of_images_are_learned(train_args, album, tmp_path, monkeypatch):
    """The trained adapter prefers the right colors for three images. A second run uses cached features."""
    result = run(train, *train_args)
    assert result.exit_code == 0, result.output
    adapter = ImageAdapter.load(tmp_path / "run" / "adapter.safetensors")
    assert adapter.metadata["vision_encoder_depths"] == "4" and adapter.projection[0].in_features == 4 * 128
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] - 1

    model, tokenizer = load_llama(train_args[1])
    vision_encoder = load_vit(album / "ViT.pt")
    rows = torch.stack(encode_images([album / f"pictures/{i}.png" for i in range(3)], vision_encoder))
    prompt = AlpacaTemplate(tokenizer).encode_prompt("Name the color.")
    most_likely = []
    for features in rows:
        with torch.no_grad():
            logits = model(torch.tensor([prompt]), adapter(features[None]))[0, -1]
        color_ids = [tokenizer.encode(f"{color}.")[0] for color in ("red", "blue", "green")]
        most_likely.append(logits[color_ids].argmax().item())
    assert most_likely == [0, 1, 2]

    monkeypatch.setattr("multimodal.global_features", lambda *_: 1 / 0)  # the second run uses the cache
    assert run(train, *train_args, "--epochs", 2, "--out", tmp_path / "again").exit_code == 0
    assert read_metrics(tmp_path / "again" / "metrics.jsonl")[0]["loss"] == losses[0]


def test_generate_accepts_images_folders_and_prompts_files(train_args, album, tmp_path):
    assert run(train, *train_args, "--epochs", 2).exit_code == 0
    args = ["--adapter", tmp_path / "run" / "adapter.safetensors", "--greedy", "--max-new-tokens", 4, "--device", "cpu"]
    single = run(generate, *args, "--image", album / "pictures" / "1.png", "Name the color.")
    assert single.exit_code == 0, single.output
    batch = run(generate, *args, "--image", album / "pictures", "--batch-size", 20, "Name the color.")
    lines = batch.stdout.splitlines()
    assert batch.exit_code == 0
    response = single.stdout.removesuffix("\n")
    expected = f"{album / 'pictures' / '1.png'}: " + response.replace("\n", "\\n")
    assert expected.strip() in [line.strip() for line in lines]
    records = [{"instruction": "Name the color.", "image": "pictures/1.png"}, {"instruction": "Name the color."}]
    (album / "asked.json").write_text(json.dumps(records))
    result = run(generate, *args, "--prompts", album / "asked.json", "--out", tmp_path / "answers.jsonl")
    assert result.exit_code == 0, result.output
    outputs = [json.loads(line)["output"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert outputs[0] == response
    assert outputs[1] == run(generate, *args, "Name the color.").stdout.removesuffix("\n")
    (album / "asked.json").write_text(json.dumps([records[1], records[0] | {"image": "none.png"}]))
    result = run(generate, *args, "--prompts", album / "asked.json", "--out", tmp_path / "answers.jsonl")
    assert result.exit_code == 2 and "record 1: " in result.stderr and "none.png: no such file" in result.stderr
    (tmp_path / "asked.json").write_text(json.dumps([records[0] | {"image": str(album / "pictures/1.png")}]))
    elsewhere = ["--prompts", tmp_path / "asked.json", "--out", tmp_path / "answers.jsonl"]
    result = run(generate, *args, *elsewhere)
    assert result.exit_code == 2 and "record 0: " in result.stderr and "is outside" in result.stderr
    assert run(generate, *args, *elsewhere, "--images", album).exit_code == 0
    (album / "asked.json").write_text(json.dumps([records[0] | {"adapter": None}]))
    result = run(generate, *args, "--prompts", album / "asked.json", "--out", tmp_path / "answers.jsonl")
    assert result.exit_code == 2 and "record 0: the base alone cannot take an image" in result.stderr
    assert sum(line.startswith(str(album)) for line in lines) == 48
    assert run(generate, *args, "Name the color.").exit_code == 0  # without an image

    Adapter(layers=3, length=5, dim=16, heads=2).save(tmp_path / "text.safetensors")
    base = ["--base", train_args[1]]
    text_only = run(
        generate, *base, "--adapter", tmp_path / "text.safetensors", "--image", album / "pictures", "Hello."
    )
    assert text_only.exit_code == 2 and "the adapter text has no projection for images" in text_only.stderr
    four = ViTConfig(image_size=24, patch_size=8, dim=64, n_layers=4, n_heads=1, hidden_dim=96)
    torch.save(openai_state_dict(make_vit(four)), tmp_path / "narrow.pt")
    narrow = run(generate, *args, "--clip", tmp_path / "narrow.pt", "--image", album / "pictures", "Hello.")
    assert narrow.exit_code == 2 and "computes 256 features, but the adapter was made for 512" in narrow.stderr
    missing = run(generate, *args, "--image", tmp_path / "nowhere.png", "Hello.")
    assert missing.exit_code == 2 and "nowhere.png: no such file" in missing.stderr


def test_encoder_without_a_final_norm_has_a_fingerprint():
    """Early encoders of vit-pytorch have no norm after the last layer."""
    encoder = make_vit(ViTConfig(24, 8, dim=64, n_layers=4, n_heads=1, hidden_dim=96, final_norm=False))
    before = vision_encoder_fingerprint(encoder)
    encoder.layers[0].attention.wq.weight.data += 1
    assert vision_encoder_fingerprint(encoder) != before


@pytest.mark.parametrize("name", ["../data.json", "/etc/passwd"])
def test_image_paths_cannot_leave_the_image_folder(train_args, album, tmp_path, name):
    records = [{"instruction": "Name the color.", "output": "red.", "image": name}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    args = [*train_args, "--data", tmp_path / "data.json", "--images", album / "pictures"]
    for more in ([], ["--skip-missing"]):
        result = run(train, *args, *more)
        assert result.exit_code == 2 and f"record 0: {name} is outside {album / 'pictures'}" in result.stderr


@pytest.mark.parametrize("finished", [True, False])
def test_resumed_run_needs_the_same_images(train_args, album, tmp_path, finished):
    """A different image of the same name is refused. The same images in a different folder are accepted."""
    shutil.copytree(album / "pictures", tmp_path / "album" / "pictures")
    args = [*train_args, "--epochs", 2, "--images", tmp_path / "album"]
    assert run(train, *args, *([] if finished else ["--max-minutes", 1e-9])).exit_code == 0
    changed = tmp_path / "album" / "pictures" / "5.png"
    shutil.copy(album / "pictures" / "6.png", changed)
    refused = run(train, *args, "--resume")
    assert refused.exit_code == 2 and "was made with images_hash = " in refused.stderr
    assert "a resumed run cannot change it" in refused.stderr
    args += ["--images", album]
    assert run(train, *args, "--resume").exit_code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    del summary["options"]["images_hash"]  # as in earlier versions
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert "is finished" in run(train, *args, "--resume").stderr


def test_missing_images_are_refused_or_skipped(train_args, album, tmp_path):
    records = json.loads((album / "data.json").read_text())
    records[3]["image"] = "pictures/none.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    args = [*train_args, "--data", tmp_path / "data.json", "--images", album, "--epochs", 2]
    result = run(train, *args)
    assert result.exit_code == 2 and "record 3: " in result.stderr and "none.png: no such file" in result.stderr
    result = run(train, *args, "--skip-missing")
    assert result.exit_code == 0 and f"{len(records) - 1} examples to train on" in result.stderr
    assert f"1 of {len(records)} examples skipped: image not found" in result.stderr


def test_images_are_ignored_without_a_vision_encoder(train_args, tmp_path):
    """The adapter is then text-only."""
    i = train_args.index("--clip")
    assert run(train, *train_args[:i], *train_args[i + 2 :], "--epochs", 2).exit_code == 0
    assert type(Adapter.load(tmp_path / "run" / "adapter.safetensors")) is Adapter


def test_held_out_image_alone_gives_a_projection(train_args, album, tmp_path):
    """The adapter has a projection even if no training example has an image."""
    records = json.loads((album / "data.json").read_text())
    images = [record for record in records if record.get("image")][:1]
    records = images + [{"instruction": f"Say {i}.", "output": "no"} for i in range(9)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    args = [*train_args, "--data", tmp_path / "data.json", "--images", album, "--epochs", 2]
    for seed in range(20):
        training, (held_out,) = hold_out(list(range(10)), 1, seed)
        if held_out == 0:
            break
    result = run(train, *args, "--val-size", 1, "--seed", seed)
    assert result.exit_code == 0, result.output
    assert type(ImageAdapter.load(tmp_path / "run" / "adapter.safetensors")) is ImageAdapter


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_with_images_equal_a_single_process(forks, train_args, tmp_path, strategy):
    """A rank may have no image in batches of 3, but the gradient of the projection is reduced over all ranks."""
    args = [*train_args, "--epochs", 2, "--batch-size", 3]
    results = Ranks(forks, 2, train_command, [*args, "--strategy", strategy]).results()
    assert [code for code, _, _ in results] == [0, 0], results
    assert run(train, *args, "--out", tmp_path / "alone").exit_code == 0
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("run", "alone"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-3)  # AdamW normalizes tiny gradients


def slow_features(path, rank):
    """Replace images.attach_features: it is slow on rank 0, and raises on rank 1 unless rank 0 is done.

    Rank 0 creates `path` when it is done.
    """
    attach_features = images.attach_features

    def slow_attach(*args, **options):
        if rank == 0:
            time.sleep(0.5)
        elif not path.exists():
            raise ValueError("the features are not there yet")
        result = attach_features(*args, **options)
        path.touch()
        return result

    images.attach_features = slow_attach


def test_images_are_encoded_by_one_rank(forks, train_args, tmp_path):
    args = [*train_args, "--epochs", 2]
    results = Ranks(forks, 2, train_command, args, partial(slow_features, tmp_path / "encoded")).results()
    assert [code for code, _, _ in results] == [0, 0], results


# ---------------------------------------------------------------------------------------------------
# Videos and sounds


def test_video_features_are_the_mean_over_frames(tmp_path):
    save_video(tmp_path / "x.mp4", ["red", "lime", "blue"])
    vision_encoder = make_vit(FOUR_LAYER_VIT)
    make_picture().save(tmp_path / "y.png")
    (alone,) = encode_images([tmp_path / "x.mp4"], vision_encoder)
    still, moving, again = encode_images(
        [tmp_path / "y.png", tmp_path / "x.mp4", tmp_path / "y.png"], vision_encoder, cache=tmp_path
    )
    torch.testing.assert_close(moving, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(still, again) and not torch.allclose(still, moving)
    frames = torch.stack([preprocess(frame, vision_encoder.config) for frame in open_video(tmp_path / "x.mp4")])
    torch.testing.assert_close(moving, global_features(vision_encoder, frames).mean(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(encode_images([tmp_path / "x.mp4"], vision_encoder, cache=tmp_path)[0], moving)  # from the cache


@pytest.mark.parametrize(
    "change",
    [
        {"mean": (0.1, 0.2, 0.3)},
        {"std": (0.1, 0.2, 0.3)},
        {"squeezed": True},
        {"resized": 30},
        {"resample": "bilinear"},
        {"activation": "gelu"},
        {"n_heads": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_feature_cache_depends_on_preprocessing_and_configuration(tmp_path, monkeypatch, change):
    """Encoders with equal weights share no features if preprocessing, activation or number of heads differ."""
    make_picture().save(tmp_path / "y.png")
    one, other = make_vit(FOUR_LAYER_VIT), make_vit(replace(FOUR_LAYER_VIT, **change))
    cached = [encode_images([tmp_path / "y.png"], each, cache=tmp_path / "cache")[0] for each in (one, other, one)]
    fresh = [encode_images([tmp_path / "y.png"], each)[0] for each in (one, other)]
    assert torch.equal(cached[0], fresh[0]) and torch.equal(cached[1], fresh[1]) and torch.equal(cached[2], cached[0])
    assert not torch.equal(*fresh)
    monkeypatch.setattr("multimodal.PREPROCESSING_VERSION", 10**6)
    encode_images([tmp_path / "y.png"], one, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a file of numpy's",
        np.ones(7, "f4"),
        np.ones(512),
        np.full(512, np.nan, "f4"),
        np.ones((2, 256), "f4"),
    ],
)
def test_invalid_cached_features_are_recomputed(tmp_path, content):
    vision_encoder = make_vit(FOUR_LAYER_VIT)
    make_picture().save(tmp_path / "y.png")
    (features,) = encode_images([tmp_path / "y.png"], vision_encoder, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*/*.npy")
    valid = file.read_bytes()
    file.write_bytes(content) if isinstance(content, bytes) else np.save(file, content)
    (recomputed,) = encode_images([tmp_path / "y.png"], vision_encoder, cache=tmp_path / "cache")
    assert torch.equal(recomputed, features) and file.read_bytes() == valid


ENCODERS = """
from __future__ import annotations
from dataclasses import dataclass
import sys, torch
@dataclass
class Ear: size: int = 8
def leaves(path): sys.exit(3)
def rows(path): return torch.tensor([[float(b) for b in path.read_bytes()[:8]]] * 2)
def flat(path): return torch.zeros(8)
def fails(path): raise RuntimeError("no ear")
number = 3
"""


def test_user_defined_encoder_is_called_and_its_errors_are_reported(tmp_path):
    (tmp_path / "ear.py").write_text(ENCODERS)
    files = [tmp_path / name for name in ("a.wav", "b.wav", "c.wav")]
    for file, content in zip(files, (b"abcdefgh", b"hgfedcba", b"abcd")):
        file.write_bytes(content)
    one, other, same = encode_with_function([*files[:2], files[0]], load_function(f"{tmp_path / 'ear.py'}:rows"))
    assert one.shape == (16,) and torch.equal(one, same) and not torch.equal(one, other)
    torch.testing.assert_close(one[:8], (torch.arange(8) - 3.5) / 5.25**0.5)  # normalized
    for name, message in (
        ("rows", r"c.wav: the encoder returned 8 features, but 16 for the first file"),
        ("flat", r"a.wav: the encoder must return a matrix .* it returned values of shape \(8,\), 8 of them"),
        ("fails", "a.wav: the encoder failed: RuntimeError: no ear"),
        ("leaves", "a.wav: the encoder failed: SystemExit: 3"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_with_function([files[0], files[2]], load_function(f"{tmp_path / 'ear.py'}:{name}"))
    with pytest.raises(ValueError, match="ear.py: has no function 'number'"):
        load_function(f"{tmp_path / 'ear.py'}:number")
    with pytest.raises(FileNotFoundError, match="there is no such file; expected FILE.py:NAME"):
        load_function("ear")
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ValueError, match="broken.py: cannot be imported: ZeroDivisionError"):
        load_function(f"{tmp_path / 'broken.py'}:x")


def tone(path, pitch, seed):
    """Save one second of a noisy tone as a WAV file."""
    time, random = np.arange(16000) / 16000, np.random.default_rng(seed)
    sound = np.sin(2 * np.pi * pitch * time) + random.normal(0, 0.1, 16000)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((8000 * sound).astype(np.int16).tobytes())


def test_sounds_are_learned_with_the_example_encoder(tiny_base, tmp_path, monkeypatch):
    """Two pitches are learned. The adapter file names the encoder, but its code runs only if --encoder is given."""
    pytest.importorskip("av")
    shutil.copy(ROOT / "docs" / "examples" / "spectrum.py", tmp_path / "spectrum.py")
    records = []
    for i in range(16):
        tone(tmp_path / f"{i}.wav", (500, 3000)[i % 2], i)
        records.append({"instruction": "High?", "output": ("no", "yes")[i % 2], "audio": f"{i}.wav"})
    (tmp_path / "data.json").write_text(json.dumps(records))
    encoder = f"{tmp_path / 'spectrum.py'}:rows"
    args = [
        train, "--data", tmp_path / "data.json", "--base", tiny_base, "--encoder", encoder, "--out", tmp_path / "run",
        "--epochs", 40, "--batch-size", 8, "--val-size", 0, "--lr", 0.1, "--layers", 3, "--device", "cpu",
    ]  # fmt: skip
    result = run(*args)
    assert result.exit_code == 0, result.output
    with monkeypatch.context() as patch:  # encoding may take hours, so all other checks come before it
        patch.setattr(FunctionEncoder, "encode", None)
        assert "is finished" in run(*args, "--resume").stderr
        for more in (["--layers", 99], ["--warmup-epochs", 50], ["--init", "nowhere"]):
            refused = run(*args, "--out", tmp_path / "new", *more)
            assert refused.exit_code == 2 and f"{more[1]}" in refused.stderr
    adapter = ImageAdapter.load(tmp_path / "run" / "adapter.safetensors")
    assert adapter.metadata["encoder"] == encoder and adapter.projection[0].in_features == 4 * 128
    model, tokenizer = load_llama(tiny_base)
    yes, no = (tokenizer.encode(word)[0] for word in ("yes", "no"))
    for i, pitch in enumerate((400, 3100)):
        tone(tmp_path / "new.wav", pitch, 99)
        (features,) = encode_with_function([tmp_path / "new.wav"], load_function(encoder))
        with torch.no_grad():
            adaption_prompts = adapter(features[None])
            logits = model(torch.tensor([AlpacaTemplate(tokenizer).encode_prompt("High?")]), adaption_prompts)[0, -1]
        assert (logits[yes] > logits[no]) == bool(i)

    options = ["--adapter", tmp_path / "run" / "adapter.safetensors", "--device", "cpu", "--max-new-tokens", 2]
    generated = run(generate, *options, "--audio", tmp_path / "new.wav", "--encoder", encoder, "High?")
    assert generated.exit_code == 0, generated.output
    (tmp_path / "other.py").write_text((tmp_path / "spectrum.py").read_text())
    other = f"{tmp_path / 'other.py'}:rows"
    warned = run(generate, *options, "--audio", tmp_path / "new.wav", "--encoder", other, "High?")
    assert (
        warned.exit_code == 0 and f"warning: the adapter was trained with {encoder}, not with {other}" in warned.stderr
    )
    missing = run(generate, *options, "--audio", tmp_path / "new.wav", "High?")
    assert missing.exit_code == 2 and f"trained with {encoder}; to run that code, give --encoder" in missing.stderr


def test_record_can_have_only_one_media_file(tmp_path):
    with pytest.raises(ValueError, match="here: record 0: has more than one of the fields 'image', 'video', 'audio'"):
        check_record({"instruction": "", "output": "", "image": "a", "audio": "b"}, "here", "record 0")
    assert check_record({"instruction": "", "output": "", "image": "", "video": "b"}, "here", "record 0").image == "b"
