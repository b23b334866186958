"""Weights of the base in 8 and 4 bits."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from helpers import KINDS, make_adapter, make_example, make_model, make_tokens, run, save_hugging_face

from adapter import Adapter
from formats import bases
from generate import generate
from generate import main as generate_command
from model import Config, LLaMA
from runtime.quantization import quantizer
from train import TrainConfig, make_optimizer, train_step


CPU = torch.device("cpu")
NF4 = [  # the quantiles of a normal distribution that QLoRA's paper lists (its appendix E), rounded
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
]  # fmt: skip


def nf4_by_hand(weight):
    """Each 64 numbers, by the greatest of them, as the nearest of sixteen; scales are kept wide."""
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(NF4)
    return (values[(blocks[:, :, None] / scales[:, None] - values).abs().argmin(dim=2)] * scales).view_as(weight)


def rounded_model(bits, config=Config(64, 3, 4, 4, 16, 96, 50)):
    pytest.importorskip("torchao")
    model = make_model(config)
    for block in model.layers:
        quantizer(bits, CPU)(block)
    return model


@pytest.mark.parametrize("bits, alike", [(8, 0.99), (4, 0.9)])
@pytest.mark.parametrize("again", [True, False])
def test_rounded_weights_train(bits, alike, again):
    """Gradients flow through them to prompts and gates, with checkpointed activations and without."""
    model, rounded = make_model(Config(64, 3, 4, 4, 16, 96, 50)), rounded_model(bits)
    examples = [make_example(make_tokens(model, n).tolist(), 4, f"row {n}") for n in (9, 6, 21)]
    losses, gradients = [], []
    for base in (model, rounded):
        adapter, config = make_adapter(model), TrainConfig(checkpoint_activations=again)
        losses.append(train_step(base, adapter, make_optimizer(adapter, 0.02), examples, 1e-3, config))
        gradients.append(torch.cat([adapter.prompts.grad.flatten(), adapter.gates.grad.flatten()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and losses[1] != losses[0]
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > alike


def test_4_bits_are_those_of_the_paper():
    """The nearest of sixteen values a block of 64; its scale in 8 bits may be off by a part in a hundred."""
    model, rounded = make_model(Config(64, 3, 4, 4, 16, 96, 50)), rounded_model(4)
    for (name, wide), narrow in zip(model.layers.named_parameters(), rounded.layers.parameters()):
        if name.endswith("norm.weight"):
            assert torch.equal(wide, narrow)
            continue
        held = narrow.to(torch.float32)
        torch.testing.assert_close(held, nf4_by_hand(wide), rtol=0, atol=0.02 * wide.abs().max().item(), msg=name)
        assert not torch.equal(held, wide)
    tokens = make_tokens(model, 12)[None]
    by_hand = make_model(Config(64, 3, 4, 4, 16, 96, 50))
    for parameter in by_hand.layers.parameters():
        if parameter.dim() == 2:
            parameter.copy_(nf4_by_hand(parameter))
    errors = [(other(tokens) - by_hand(tokens)).abs().max() for other in (rounded, model)]
    assert errors[0] < 0.3 * errors[1]


def test_4_bits_answer_as_they_score():
    """Token by token over the cache, as in one pass; zero gates are the base's own, bit for bit."""
    model = rounded_model(4)
    adapter, tokens = make_adapter(model), make_tokens(model, 12)
    answer = generate(model, [tokens.tolist()], adapter(), max_new_tokens=6)[0]
    whole = torch.cat([tokens, torch.tensor(answer)])[None]
    assert model(whole, adapter())[0, 11:-1].argmax(dim=-1).tolist() == answer
    assert torch.equal(model(whole, adapter(gate_scale=0.0)), model(whole))


def test_the_wide_model_is_never_whole(tiny_base, tmp_path, monkeypatch):
    """Each layer is rounded before the next is read."""
    pytest.importorskip("torchao")
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    wide = []
    quantize = quantizer(4, CPU)

    def watch(block):
        quantize(block)
        wide.append(sum(type(p.data) is torch.Tensor and not p.is_meta for p in model_parameters()))

    def model_parameters():
        return [p for other in seen[0].layers for name, p in other.named_parameters() if "norm" not in name]

    seen = []
    monkeypatch.setattr(bases, "LLaMA", lambda *args: seen.append(LLaMA(*args)) or seen[0])
    bases.load_llama(tmp_path / "hf", prepare_layer=watch)
    assert wide == [0, 0, 0]


@pytest.fixture
def hf_args(args, tiny_base, tmp_path):
    """A base whose weights come in sixty-fours."""
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    return [*args, "--base", tmp_path / "hf", "--layers", 2]


@pytest.mark.parametrize(
    "how", [["--int8"], ["--bits", "8"], ["--bits", "4"], ["--bits", "4", "--checkpoint-activations"]]
)
def test_a_run_over_rounded_weights(hf_args, tmp_path, how):
    """From the command line; the fingerprint is that of the weights before they are rounded."""
    pytest.importorskip("torchao")
    results = [run(*hf_args, "--out", tmp_path / name, *more) for name, more in (("wide", []), ("few", how))]
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    wide, rounded = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("wide", "few"))
    bits = "4" if "4" in how else "8"
    assert wide["options"] == rounded["options"] | {"bits": None}
    assert rounded["val_loss_after"] == pytest.approx(wide["val_loss_after"], rel=0.2)
    assert rounded["val_loss_after"] != wide["val_loss_after"]
    adapters = [Adapter.load(tmp_path / name / "adapter.safetensors") for name in ("wide", "few")]
    assert [adapter.metadata.get("bits") for adapter in adapters] == [None, bits]
    answers = []
    for name in ("wide", "few"):
        for more in ([], ["--bits", bits]):
            asked = [str(arg) for arg in ("--adapter", tmp_path / name, *more, "--greedy", "--max-new-tokens", 9, "Hi")]
            result = CliRunner().invoke(generate_command, asked)
            assert result.exit_code == 0 and result.stderr == ""  # no other weights: the same, held otherwise
            answers.append(result.stdout)
    assert answers[0] and len(answers) == 4


def test_a_resumed_run_keeps_its_bits(hf_args, tmp_path):
    pytest.importorskip("torchao")
    assert run(*hf_args, "--bits", 4, "--max-minutes", 1e-6).exit_code == 0
    result = run(*hf_args, "--resume")
    assert result.exit_code == 2 and "was made with bits = 4, not None: a resumed run cannot change it" in result.stderr
    assert run(*hf_args, "--bits", 4, "--resume").exit_code == 0


def test_what_cannot_be_rounded_is_said_in_a_line(hf_args, args, tmp_path, monkeypatch):
    for more, message in [
        (["--compile"], "--bits 4 and --compile go together on a GPU only"),
        (["--bits", "3"], "'3' is not one of '8', '4'"),
    ]:
        result = run(*hf_args, "--bits", 4, *more)
        assert result.exit_code == 2 and message in result.stderr, result.stderr
    with pytest.raises(ValueError, match="--bits 4 is for cpu and cuda, not for mps"):
        quantizer(4, torch.device("mps"))
    with pytest.raises(ValueError, match="--bits 4 takes 64 numbers at a time, and a weight has 12 x 20"):
        quantizer(4, CPU)(torch.nn.Sequential(torch.nn.Linear(20, 12)))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    result = run(*hf_args, "--bits", 4)
    assert (
        result.exit_code == 2 and "--bits 4 needs a package that is not installed: pip install torchao" in result.stderr
    )
