"""Runs that go on from an adapter, and parts of one that stay as they are."""

import os
import signal

import pytest
import torch
from helpers import before_step, run
from safetensors.torch import load_file, save_file

import train
from adapter import Adapter
from encoders.heads import HeadAdapter
from model import Config
from multimodal import ImageAdapter
from train import freeze_parts
from training.initial import init_from_adapter, load_initial
from training.run_files import read_metrics

BASE = Config(16, 3, 2, 2, 8, 48, 100)


@pytest.fixture
def first(args, tmp_path):
    """A run of two of three layers, K = 3; its folder, and the options of another run over the same data."""
    assert run(*args, "--layers", 2).exit_code == 0
    return tmp_path / "run", [*args, "--out", tmp_path / "second"]


def validation(out):
    return [line["val_loss"] for line in read_metrics(out / "metrics.jsonl") if "val_loss" in line]


def test_a_run_begins_where_the_other_ended(first, tmp_path):
    """With its layers and length, whether it is named by its folder or its file; as a run of its own."""
    folder, args = first
    result = run(*args, "--init", folder, "--length", 7)
    assert result.exit_code == 0, result.output
    assert validation(tmp_path / "second")[0] == pytest.approx(validation(folder)[-1], abs=1e-6)
    assert validation(tmp_path / "second")[0] != validation(folder)[0]
    adapter = Adapter.load(tmp_path / "second" / "adapter.safetensors")
    assert adapter.prompts.shape[:2] == (2, 3) and adapter.metadata["init"] == "run"
    assert {line["step"] for line in read_metrics(tmp_path / "second" / "metrics.jsonl")} == set(range(16))
    again = [*args, "--out", tmp_path / "third", "--init", folder / "adapter.safetensors"]
    assert run(*again).exit_code == 0 and validation(tmp_path / "third") == validation(tmp_path / "second")


@pytest.mark.parametrize("part, other", [("prompts", "gates"), ("gates", "prompts")])
def test_what_is_frozen_stays_to_the_last_bit(first, tmp_path, part, other):
    """Weight decay included, which needs no gradient."""
    folder, args = first
    assert run(*args, "--init", folder, "--freeze", part, "--weight-decay", 0.5).exit_code == 0
    before, after = (load_file(out / "adapter.safetensors") for out in (folder, tmp_path / "second"))
    assert torch.equal(before[part], after[part]) and not torch.equal(before[other], after[other])


def test_a_stopped_run_goes_on(first, tmp_path, monkeypatch):
    """As if it had never stopped; with the same adapter to begin with, and the same parts frozen."""
    folder, args = first
    args = [*args, "--init", folder, "--freeze", "gates"]
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", before_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert run(*args).exit_code == 0
    assert (tmp_path / "second" / "checkpoint.pt").exists()
    for changed, name in ((args[:-2], "freeze"), ([*args, "--init", tmp_path / "whole"], "init")):
        result = run(*changed, "--resume")
        assert result.exit_code == 2 and f"was made with {name} = " in result.stderr
    assert run(*args, "--resume").exit_code == 0
    whole, resumed = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "second"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def adapter_of(kind, seed, features=6, **shape):
    shape = dict(layers=2, length=3, dim=16, heads=2, generator=torch.Generator().manual_seed(seed)) | shape
    adapter = Adapter(**shape) if kind == "text" else ImageAdapter(features=features, bottleneck=4, **shape)
    torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(seed))
    adapter.metadata = {"base_layers": "3", "prompt_template": "alpaca"}
    adapter.metadata |= {"vision_encoder": f"encoder {seed}", "vision_encoder_depths": "2"} if kind == "images" else {}
    return adapter


def begin_with(path, adapter):
    initial = load_initial(str(path), BASE, path.parent / "out")
    return init_from_adapter(initial, adapter, str(path))


@pytest.mark.parametrize("initial", ["text", "images"])
@pytest.mark.parametrize("new", ["text", "images"])
def test_words_and_images(tmp_path, initial, new):
    """All that the first one learned stays; a projection that it had not starts anew, one that it had is kept."""
    known, adapter = adapter_of(initial, 1, gate_activation="identity"), adapter_of(new, 2)
    known.save(tmp_path / "a.safetensors")
    fresh = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    begun = begin_with(tmp_path / "a.safetensors", adapter)
    assert isinstance(begun, ImageAdapter) == ("images" in (initial, new)) and begun.gate_activation == "identity"
    expected = fresh | known.state_dict()
    assert begun.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in begun.state_dict().items())
    vision_encoder = {"images": "encoder 2", "text": "encoder 1"}[new] if "images" in (initial, new) else None
    assert begun.metadata.get("vision_encoder") == vision_encoder and begun.metadata["init"] == "a.safetensors"


def test_one_gate_for_all_heads(tmp_path):
    """A file of PEFT's, of whose base the heads are not known before it is read."""
    place = "base_model.model.model.layers.{}.self_attn.adaption_"
    tensors = {place.format(i) + "prompt": torch.randn(1, 3, 16) for i in (1, 2)}
    tensors |= {place.format(i) + "gate": torch.ones(1) * i for i in (1, 2)}
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADAPTION_PROMPT"}')
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    begun = begin_with(tmp_path, adapter_of("text", 1))
    assert torch.equal(begun.gates, torch.tensor([[1.0, 1.0], [2.0, 2.0]])) and begun.gate_activation == "identity"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dim=8), "was made for dim 8, the base has dim 16"),
        (dict(heads=4), "was made for heads 4, the base has heads 2"),
        (dict(features=4), "takes 4 features of an image, here there are 6"),
    ],
)
def test_what_does_not_fit(tmp_path, changes, message):
    adapter_of("images", 1, **changes).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"--init .*a.safetensors: .*{message}"):
        begin_with(tmp_path / "a.safetensors", adapter_of("images", 2))


def test_warnings(tmp_path, capsys):
    adapter = adapter_of("text", 1)
    adapter.metadata |= {"base_fingerprint": "aa", "prompt_template": "llama-3"}
    adapter.save(tmp_path / "a.safetensors")
    new = adapter_of("text", 2)
    new.metadata["base_fingerprint"] = "bb"
    begin_with(tmp_path / "a.safetensors", new)
    said = capsys.readouterr().err
    assert "over another base: base_fingerprint is aa, here bb" in said
    assert "with another template: prompt_template is llama-3, here alpaca" in said


def test_parts():
    """The projection is one part; of what there is not, or of all there is, a line."""
    adapter = adapter_of("images", 1)
    freeze_parts(adapter, ["projection"])
    still = {name for name, parameter in adapter.named_parameters() if not parameter.requires_grad}
    assert still == {f"projection.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert sum(len(group["params"]) for group in train.make_optimizer(adapter, 0.1).param_groups) == 2
    with pytest.raises(ValueError, match="--freeze projection: the adapter has none, because no example has an image"):
        freeze_parts(adapter_of("text", 1), ["projection"])
    with pytest.raises(ValueError, match="--freeze prompts --freeze gates: nothing is left to train"):
        freeze_parts(adapter_of("text", 1), ["prompts", "gates"])


def test_errors_are_lines(first, tmp_path):
    folder, args = first
    HeadAdapter(layers=2, length=3, dim=16, heads=2, widths=[16, 3]).save(tmp_path / "head.safetensors")
    (tmp_path / "junk").write_bytes(b"junk")
    for more, message in (
        (["--init", tmp_path / "none"], "none: no such adapter file"),
        (["--init", tmp_path / "junk"], "junk: not a complete safetensors file"),
        (["--init", tmp_path / "head.safetensors"], "head.safetensors: is for an encoder, not for a LLaMA"),
        (["--init", folder, "--layers", 1], "--layers 1: "),
        (["--init", folder, "--out", folder], "is in the folder that this run writes to: give another --out"),
        (["--init", folder / "adapter.safetensors", "--out", folder], "is in the folder that this run writes to"),
    ):
        result = run(*args, *more)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert (folder / "adapter.safetensors").exists() and not (tmp_path / "second").exists()
