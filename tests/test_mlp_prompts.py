"""Prompts that a small network makes while they are learnt."""

import os
import signal

import pytest
import torch
from helpers import before_step, run
from safetensors.torch import load_file

import train
from adapter import Adapter
from multimodal import ImageAdapter
from training.mlp_prompts import PromptMLP, make_prompts_by_mlp, with_plain_prompts


def made_by_mlp(kind=Adapter, **more):
    shape = dict(layers=2, length=3, dim=16, heads=2, generator=torch.Generator().manual_seed(0)) | more
    adapter = kind(**shape)
    make_prompts_by_mlp(adapter, torch.Generator().manual_seed(1))
    torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(2))
    return adapter


def test_the_prompts_are_the_network_s():
    """P = W2 relu(W1 e + b1) + b2, number by number; as large as plain ones at the start."""
    adapter = made_by_mlp()
    (network,) = adapter.parametrizations.prompts
    e = adapter.parametrizations.prompts.original.detach().double()  # (L, E)
    W1, b1, W2, b2 = (parameter.detach().double() for parameter in network.mlp.parameters())
    for layer, prompts in enumerate(adapter.prompts):
        hidden = [max(0.0, float(W1[i] @ e[layer] + b1[i])) for i in range(len(b1))]
        expected = W2 @ torch.tensor(hidden, dtype=torch.double) + b2  # (K*C,)
        torch.testing.assert_close(prompts.double(), expected.view(3, 16), rtol=1e-5, atol=1e-5)
    assert adapter.prompts.std().item() == pytest.approx(1)
    assert (adapter.prompts[0] - adapter.prompts[1]).abs().mean() > 0.1  # one network, an embedding for each layer
    large = PromptMLP(10, 4096)
    assert sum(p.numel() for p in large.parameters()) == 64 * 64 + 64 + 64 * 40960 + 40960


def test_both_parts_and_the_gates_learn():
    """And nothing else; the network at a projection's rate."""
    adapter = made_by_mlp()
    gates, others = train.make_optimizer(adapter, 0.1).param_groups
    assert gates["params"] == [adapter.gates] and len(others["params"]) == 5  # embeddings, two weights, two biases
    assert others["scale"] == train.LINEAR_LR_SCALE
    sum(prompt.tokens.square().sum() + prompt.gate.sum() for prompt in adapter()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


@pytest.mark.parametrize("kind, more", [(Adapter, {}), (ImageAdapter, {"features": 6, "bottleneck": 4})])
def test_what_is_saved_is_plain(tmp_path, kind, more):
    """The same prompts, and the network goes on learning after it."""
    adapter = made_by_mlp(kind, **more)
    plain = with_plain_prompts(adapter)
    assert type(plain) is kind and with_plain_prompts(plain) is plain
    plain.save(tmp_path / "a.safetensors")
    loaded = kind.load(tmp_path / "a.safetensors")
    for ours, theirs in zip(adapter(), loaded(), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.gate, theirs.gate)
    before = adapter.prompts.detach().clone()
    with torch.no_grad():
        adapter.parametrizations.prompts.original += 1
    assert not torch.equal(adapter.prompts, before) and torch.equal(plain.prompts, before)


def test_a_run(args, tmp_path, monkeypatch):
    """It learns, its file is as any other, and stopped and resumed it is the same to the last bit."""
    args = [*args, "--prompts", "mlp"]
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", before_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert run(*args).exit_code == 0
    stopped = load_file(tmp_path / "run" / "adapter.safetensors")
    assert set(stopped) == {"prompts", "gates"} and (tmp_path / "run" / "checkpoint.pt").exists()
    result = run(*args[:-2], "--resume")
    assert result.exit_code == 2 and "was made with prompts = mlp, not None" in result.stderr
    assert run(*args, "--resume").exit_code == 0
    whole, resumed = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in ("prompts", "gates"))
    assert not torch.equal(stopped["prompts"], whole["prompts"])
    assert Adapter.load(tmp_path / "whole" / "adapter.safetensors").metadata["prompts_by"] == "mlp"


def test_frozen_or_begun_with(args, tmp_path):
    """Frozen prompts stay as they began; a network cannot begin with those of a file."""
    assert run(*args, "--prompts", "mlp", "--freeze", "prompts").exit_code == 0
    learnt = load_file(tmp_path / "run" / "adapter.safetensors")
    assert learnt["prompts"].std().item() == pytest.approx(1, abs=1e-6) and learnt["gates"].abs().sum() > 0
    result = run(*args, "--prompts", "mlp", "--init", tmp_path / "run", "--out", tmp_path / "second")
    assert (
        result.exit_code == 2
        and "--prompts mlp: a network cannot be initialized from the prompts of --init" in result.stderr
    )
