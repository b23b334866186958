"""Runs that are initialized from an adapter (--init), and parts that stay frozen (--freeze)."""

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
    """Train an adapter with L = 2, K = 3; return its folder, and the options of a second run on the same data."""
    assert run(*args, "--layers", 2).exit_code == 0
    return tmp_path / "run", [*args, "--out", tmp_path / "second"]


def validation_losses(out):
    return [line["val_loss"] for line in read_metrics(out / "metrics.jsonl") if "val_loss" in line]


def test_run_starts_from_the_initial_adapter(first, tmp_path):
    """The new run takes L and K from the initial adapter, and ignores --length. --init takes a folder or a file."""
    folder, args = first
    result = run(*args, "--init", folder, "--length", 7)
    assert result.exit_code == 0, result.output
    assert validation_losses(tmp_path / "second")[0] == pytest.approx(validation_losses(folder)[-1], abs=1e-6)
    assert validation_losses(tmp_path / "second")[0] != validation_losses(folder)[0]
    adapter = Adapter.load(tmp_path / "second" / "adapter.safetensors")
    assert adapter.prompts.shape[:2] == (2, 3) and adapter.metadata["init"] == "run"
    assert {line["step"] for line in read_metrics(tmp_path / "second" / "metrics.jsonl")} == set(range(16))
    again = [*args, "--out", tmp_path / "third", "--init", folder / "adapter.safetensors"]
    assert run(*again).exit_code == 0 and validation_losses(tmp_path / "third") == validation_losses(
        tmp_path / "second"
    )


@pytest.mark.parametrize("part, other", [("prompts", "gates"), ("gates", "prompts")])
def test_frozen_parts_stay_bit_for_bit(first, tmp_path, part, other):
    """Not even weight decay changes a frozen part."""
    folder, args = first
    assert run(*args, "--init", folder, "--freeze", part, "--weight-decay", 0.5).exit_code == 0
    before, after = (load_file(out / "adapter.safetensors") for out in (folder, tmp_path / "second"))
    assert torch.equal(before[part], after[part]) and not torch.equal(before[other], after[other])


def test_resuming_an_initialized_run_is_exact(first, tmp_path, monkeypatch):
    """A resumed run needs the same --init and --freeze, and equals an uninterrupted one."""
    folder, args = first
    args = [*args, "--init", folder, "--freeze", "gates"]
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", before_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert run(*args).exit_code == 0
    assert (tmp_path / "second" / "checkpoint.pt").exists()
    for options, name in ((args[:-2], "freeze"), ([*args, "--init", tmp_path / "whole"], "init")):
        result = run(*options, "--resume")
        assert result.exit_code == 2 and f"was made with {name} = " in result.stderr
        assert (" (a different adapter for --init); " in result.stderr) == (name == "init")
    assert run(*args, "--resume").exit_code == 0
    whole, resumed = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "second"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def make_random_adapter(kind, seed, features=6, **shape):
    shape = dict(layers=2, length=3, dim=16, heads=2, generator=torch.Generator().manual_seed(seed)) | shape
    adapter = Adapter(**shape) if kind == "text" else ImageAdapter(features=features, bottleneck=4, **shape)
    torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(seed))
    adapter.metadata = {"base_layers": "3", "prompt_template": "alpaca"}
    adapter.metadata |= {"vision_encoder": f"encoder {seed}", "vision_encoder_depths": "2"} if kind == "images" else {}
    return adapter


def initialize(path, adapter):
    initial = load_initial(str(path), BASE, path.parent / "out")
    return init_from_adapter(initial, adapter, str(path))


@pytest.mark.parametrize("initial", ["text", "images"])
@pytest.mark.parametrize("new", ["text", "images"])
def test_text_and_image_adapters_can_initialize_each_other(tmp_path, initial, new):
    """All tensors of the initial adapter are kept. A projection that only the new adapter has is newly initialized."""
    source, adapter = make_random_adapter(initial, 1, gate_activation="identity"), make_random_adapter(new, 2)
    source.save(tmp_path / "a.safetensors", **({"encoder": "f.py:features"} if initial == "images" else {}))
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    result = initialize(tmp_path / "a.safetensors", adapter)
    assert isinstance(result, ImageAdapter) == ("images" in (initial, new)) and result.gate_activation == "identity"
    expected = before | source.state_dict()
    assert result.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in result.state_dict().items())
    vision_encoder = {"images": "encoder 2", "text": "encoder 1"}[new] if "images" in (initial, new) else None
    assert result.metadata.get("vision_encoder") == vision_encoder and result.metadata["init"] == "a.safetensors"
    assert ("encoder" in result.metadata) == (initial == "images" and new == "text")


def test_single_gate_of_peft_is_copied_to_all_heads(tmp_path):
    """PEFT has one gate per layer, and its file does not contain the number of heads."""
    prefix = "base_model.model.model.layers.{}.self_attn.adaption_"
    tensors = {prefix.format(i) + "prompt": torch.randn(1, 3, 16) for i in (1, 2)}
    tensors |= {prefix.format(i) + "gate": torch.ones(1) * i for i in (1, 2)}
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADAPTION_PROMPT"}')
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    result = initialize(tmp_path, make_random_adapter("text", 1))
    assert torch.equal(result.gates, torch.tensor([[1.0, 1.0], [2.0, 2.0]])) and result.gate_activation == "identity"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dim=8), "was made for a base with dim = 8, but this base has dim = 16"),
        (dict(heads=4), "was made for a base with heads = 4, but this base has heads = 2"),
        (dict(features=4), "takes 4 features of an image, but this run has 6"),
    ],
)
def test_initial_adapter_of_a_different_shape_is_refused(tmp_path, changes, message):
    make_random_adapter("images", 1, **changes).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"--init .*a.safetensors: .*{message}"):
        initialize(tmp_path / "a.safetensors", make_random_adapter("images", 2))


def test_different_base_or_template_causes_a_warning(tmp_path, capsys):
    adapter = make_random_adapter("text", 1)
    adapter.metadata |= {"base_fingerprint": "aa", "prompt_template": "llama-3"}
    adapter.save(tmp_path / "a.safetensors")
    new = make_random_adapter("text", 2)
    new.metadata["base_fingerprint"] = "bb"
    initialize(tmp_path / "a.safetensors", new)
    warnings = capsys.readouterr().err
    assert "for a different base: base_fingerprint is aa, but this run has bb" in warnings
    assert "with a different template: prompt_template is llama-3, but this run has alpaca" in warnings


def test_projection_is_frozen_as_one_part():
    """Freezing a part that the adapter does not have, or all parts, is an error."""
    adapter = make_random_adapter("images", 1)
    freeze_parts(adapter, ["projection"])
    frozen = {name for name, parameter in adapter.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"projection.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert sum(len(group["params"]) for group in train.make_optimizer(adapter, 0.1).param_groups) == 2
    with pytest.raises(ValueError, match="--freeze projection: the adapter has no projection; add images, and --clip"):
        freeze_parts(make_random_adapter("text", 1), ["projection"])
    with pytest.raises(ValueError, match="--freeze prompts --freeze gates: nothing is left to train"):
        freeze_parts(make_random_adapter("text", 1), ["prompts", "gates"])


def test_bad_initial_adapters_are_one_line_errors(first, tmp_path):
    folder, args = first
    HeadAdapter(layers=2, length=3, dim=16, heads=2, widths=[16, 3]).save(tmp_path / "head.safetensors")
    (tmp_path / "junk").write_bytes(b"junk")
    for more, message in (
        (["--init", tmp_path / "none"], "none: no such adapter file"),
        (["--init", tmp_path / "junk"], "junk: not a complete safetensors file"),
        (["--init", tmp_path / "head.safetensors"], "head.safetensors: is for an encoder, not for a LLaMA"),
        (["--init", folder, "--layers", 1], "--layers 1: "),
        (["--init", folder, "--out", folder], "is in the folder that this run writes to; choose a different --out"),
        (["--init", folder / "adapter.safetensors", "--out", folder], "is in the folder that this run writes to"),
    ):
        result = run(*args, *more)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert (folder / "adapter.safetensors").exists() and not (tmp_path / "second").exists()
