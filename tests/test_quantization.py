"""Bases quantized to 8 or 4 bits: rounding, outputs and gradients of layers and models, and the commands."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers import KINDS, make_adapter, make_example, make_model, make_tokens, run, save_hugging_face

from adapter import Adapter
from formats import bases
from generate import generate
from generate import main as generate_command
from model import Config, LLaMA
from runtime.quantization import QuantizedLinear, held_bytes, num_weights, quantize, quantizer
from train import TrainConfig, make_optimizer, train_step

SHAPE = Config(64, 3, 4, 2, 16, 96, 50)
SHAPES = [(8, 24), (24, 8), (64, 172), (172, 344), (344, 64), (576, 172)]  # N, K


def linear(N, K, bias=False):
    torch.manual_seed(N + K)
    layer = torch.nn.Linear(K, N, bias=bias).requires_grad_(False)
    layer.weight[0, :5] = 0
    return layer


def dequantized(layer):
    """Return the weight in float64, computed from the format that the docstring of `chunks` describes."""
    q, scales = layer.q.numpy().astype(int), layer.scales.double()
    if layer.offsets is None:
        return (torch.from_numpy(q) * scales).flatten(1)[:, : layer.in_features]
    halves = torch.stack([torch.from_numpy(q % 16), torch.from_numpy(q // 16)], dim=2)  # (N, K/32, 2, 16)
    return (halves.flatten(2) * scales + layer.offsets.double()).flatten(1)[:, : layer.in_features]


@pytest.mark.parametrize("bits, values", [(8, 255), (4, 16)])
@pytest.mark.parametrize("N, K", SHAPES)
def test_weights_are_rounded_to_the_nearest_value(bits, values, N, K):
    """The error is at most half the step between adjacent values. The range of a group determines its step."""
    layer = linear(N, K)
    quantized = quantize(layer, bits)
    found = dequantized(quantized)
    padded = torch.nn.functional.pad(layer.weight, (0, -K % 32)).unflatten(1, (-1, 32)).double()
    extent = padded.amax(2) - padded.amin(2) if bits == 4 else 2 * padded.abs().amax(2)  # (N, K/32)
    step = (extent / (values - 1)).repeat_interleave(32, dim=1)[:, :K]
    assert ((found - layer.weight).abs() <= 0.501 * step + 1e-9).all()
    assert not torch.equal(found.float(), layer.weight)
    torch.testing.assert_close(quantized.dequantized(), found.float(), rtol=1e-5, atol=1e-6)


def test_8_bit_weights_equal_q8_0_blocks_of_gguf():
    gguf = pytest.importorskip("gguf")
    layer = linear(24, 64)
    kind = gguf.GGMLQuantizationType.Q8_0  # with scales in float16
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(layer.weight.numpy(), kind), kind))
    torch.testing.assert_close(quantize(layer, 8).dequantized(), theirs, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("N, K", SHAPES)
def test_outputs_and_gradients_equal_those_of_the_dequantized_weight(monkeypatch, bits, dtype, tolerance, N, K):
    """Inputs have one row or several, the weight is dequantized in several chunks, and there is a bias."""
    monkeypatch.setitem(__import__("runtime.quantization").quantization.CHUNK, "cpu", 1000)
    layer = linear(N, K, bias=True).to(dtype)
    quantized = quantize(layer, bits)
    weight = dequantized(quantized)
    for shape in [(1, K), (5, K), (2, 3, K)]:
        x = torch.randn(shape, dtype=dtype).requires_grad_()
        y = quantized(x)
        assert y.dtype == dtype and y.shape == (*shape[:-1], N)
        exact = x.detach().double().requires_grad_()
        expected = exact @ weight.T + layer.bias.double()
        grad_output = torch.randn_like(y)
        y.backward(grad_output)
        expected.backward(grad_output.double())
        for found, expected_value in ((y, expected), (x.grad, exact.grad)):
            assert (found - expected_value).norm() < tolerance * expected_value.norm()


@pytest.mark.parametrize("bits", ["8", "4"])
def test_no_dequantized_weight_is_saved_for_backward(bits):
    layer = quantize(linear(96, 64), int(bits))
    saved = []
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert saved and sum(tensor.nbytes for tensor in saved) <= held_bytes(layer) < 1.2 * 96 * 64 * int(bits) / 8 * 1.5


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("checkpoint_activations", [True, False])
def test_adapter_gradients_equal_the_dequantized_model(bits, checkpoint_activations):
    """The gradients of prompts and gates are also close to those of the unquantized model. The gates are nonzero."""
    model, quantized, dequantized_model = make_model(SHAPE), make_model(SHAPE), make_model(SHAPE)
    quantizer(bits)(quantized.layers)
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLinear):
            dequantized_model.get_submodule(name).weight.data = dequantized(layer).float()
    examples = [make_example(make_tokens(model, n).tolist(), 4, f"row {n}") for n in (9, 6, 21)]
    losses, gradients = [], []
    for base in (model, quantized, dequantized_model):
        adapter, config = make_adapter(model), TrainConfig(checkpoint_activations=checkpoint_activations)
        assert adapter.gates.all()
        losses.append(train_step(base, adapter, make_optimizer(adapter, 0.02), examples, 1e-3, config))
        gradients.append(torch.cat([adapter.prompts.grad.flatten(), adapter.gates.grad.flatten()]))
    assert losses[1] == pytest.approx(losses[2], rel=1e-5) != losses[0]
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-4, atol=1e-6)
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.9


@pytest.mark.parametrize("bits", ["8", "4"])
def test_cached_decoding_equals_one_forward_pass(bits):
    """The logits equal those of the quantized base bit for bit if gate_scale is 0."""
    model = make_model(SHAPE)
    quantizer(bits)(model.layers)
    adapter, tokens = make_adapter(model), make_tokens(model, 12)
    response = generate(model, [tokens.tolist()], adapter(), max_new_tokens=6)[0]
    whole = torch.cat([tokens, torch.tensor(response)])[None]
    assert model(whole, adapter())[0, 11:-1].argmax(dim=-1).tolist() == response
    assert torch.equal(model(whole, adapter(gate_scale=0.0)), model(whole))
    assert not torch.equal(model(whole, adapter()), model(whole))


def test_weights_and_bytes_are_counted():
    model = make_model(SHAPE)
    count, float_bytes = num_weights(model), held_bytes(model.layers)
    quantizer("4")(model.layers)
    assert num_weights(model) == count == sum(p.numel() for p in make_model(SHAPE).parameters())
    # 32 bits per weight become 4, and 32 weights share 64 bits (scale and offset): 32 / (4 + 64 / 32) = 5.33
    assert 4.9 < float_bytes / held_bytes(model.layers) < 5.4


def test_unquantized_model_is_never_held_as_a_whole(tiny_base, tmp_path, monkeypatch):
    """Each layer is quantized before the next one is read."""
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    num_float_weights, models = [], []
    quantize_layer = quantizer("4")

    def quantize_and_count(block):
        quantize_layer(block)
        parameters = [p for layer in models[0].layers for name, p in layer.named_parameters() if "norm" not in name]
        num_float_weights.append(sum(not p.is_meta for p in parameters))

    monkeypatch.setattr(bases, "LLaMA", lambda *args: models.append(LLaMA(*args)) or models[0])
    bases.load_llama(tmp_path / "hf", prepare_layer=quantize_and_count)
    assert num_float_weights == [0, 0, 0]


@pytest.fixture
def hf_args(args, tiny_base, tmp_path):
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    return [*args, "--base", tmp_path / "hf", "--layers", 2]


@pytest.mark.parametrize("how", [["--int8"], ["--bits", "8"], ["--bits", "4", "--checkpoint-activations"]])
def test_training_on_a_quantized_base_is_close_to_training_on_the_unquantized_one(hf_args, tmp_path, how):
    """The base's fingerprint is that of the unquantized weights."""
    names = ("unquantized", "quantized")
    results = [run(*hf_args, "--out", tmp_path / name, *extra) for name, extra in zip(names, ([], how))]
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    frozen = [next(line for line in result.stderr.splitlines() if "frozen" in line) for result in results]
    assert frozen[0] == frozen[1]
    unquantized, quantized = (json.loads((tmp_path / name / "summary.json").read_text()) for name in names)
    bits = "4" if "4" in how else "8"
    assert unquantized["options"] == quantized["options"] | {"bits": None}
    assert quantized["val_loss_after"] == pytest.approx(unquantized["val_loss_after"], rel=0.2)
    assert quantized["val_loss_after"] != unquantized["val_loss_after"]
    adapters = [Adapter.load(tmp_path / name / "adapter.safetensors") for name in names]
    assert [adapter.metadata.get("bits") for adapter in adapters] == [None, bits]
    for name in names:
        for extra in ([], ["--bits", bits]):
            args = [str(arg) for arg in ("--adapter", tmp_path / name, *extra, "--greedy", "--max-new-tokens", 9, "Hi")]
            result = CliRunner().invoke(generate_command, args)
            assert result.exit_code == 0 and result.stderr == "" and result.stdout  # no warning about the base


def test_resumed_run_needs_the_same_bits(hf_args, tmp_path):
    assert run(*hf_args, "--bits", 4, "--out", tmp_path / "whole").exit_code == 0
    hf_args += ["--out", tmp_path / "stopped"]
    assert run(*hf_args, "--bits", 4, "--max-minutes", 1e-6).exit_code == 0
    result = run(*hf_args, "--resume")
    assert result.exit_code == 2 and "was made with bits = 4, not None; a resumed run cannot change it" in result.stderr
    assert run(*hf_args, "--bits", 4, "--resume").exit_code == 0
    stopped, whole = (Adapter.load(tmp_path / name / "adapter.safetensors") for name in ("stopped", "whole"))
    assert torch.equal(stopped.prompts, whole.prompts) and torch.equal(stopped.gates, whole.gates)


def test_unsupported_numbers_of_bits_are_refused(hf_args):
    result = run(*hf_args, "--bits", 3)
    assert result.exit_code == 2 and "'3' is not one of 'auto', 'none', '8', '4'" in result.stderr
