"""Linear layers prepared for decoding, compared with matmuls in float64 and with the layers that they replace."""

import subprocess
import sys
import weakref
from copy import deepcopy

import pytest
import torch
from helpers import ROOT, make_adapter, make_model

from formats.loading import load_with_adapters
from generate import decode_step, generate, prefill
from model import Config, KVCache
from runtime import decoding
from runtime.decoding import PackedBfloat16, PackedLinear, RowLinear, prepare_to_decode, replace_linear
from runtime.quantization import QuantizedLinear, quantize, quantizer

SHAPE = Config(64, 3, 4, 2, 16, 96, 50)

# Run in a subprocess, because a kernel may crash if it does not support a shape.
PACKED = """
import torch
from runtime.decoding import PackedLinear
from runtime.quantization import quantize
torch.manual_seed(0)
for N in (8, 24, 64, 172, 344, 576):
    for K in (8, 24, 64, 172, 344, 576):
        for bits in (8, 4):
            layer = torch.nn.Linear(K, N).requires_grad_(False)
            layer.bias.mul_(N % 3)
            quantized = quantize(layer, bits)
            packed = PackedLinear(quantized)
            weight = quantized.dequantized(torch.float64)
            for rows in range(1, 18):
                for dtype in (torch.float32, torch.bfloat16):
                    x = torch.randn(rows, 1, K, dtype=dtype)
                    y, right = packed(x), x.double() @ weight.T + layer.bias
                    assert y.dtype == torch.promote_types(dtype, torch.float32) and y.shape == (rows, 1, N)
                    print(((y - right).norm() / right.norm()).item(), N, K, bits, rows, dtype)
"""


@pytest.fixture(autouse=True)
def prefer_fast_matmuls(monkeypatch):
    """Let the fast matmuls win the speed test, which they may lose at these small sizes."""
    monkeypatch.setattr(decoding, "LARGE", 0)
    monkeypatch.setattr(
        decoding, "seconds_of", lambda layer, row: float(isinstance(layer, (QuantizedLinear, torch.nn.Linear)))
    )


def test_packed_matmuls_of_all_shapes_are_accurate():
    result = subprocess.run([sys.executable, "-c", PACKED], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    errors = [(float(line.split()[0]), line) for line in result.stdout.splitlines()]
    assert len(errors) == 36 * 2 * 17 * 2
    assert 1e-4 < max(errors)[0] < 1e-2, max(errors)


def step_logits(model, rows, adaption_prompts):
    cache = KVCache(model, len(rows), 12)
    with torch.no_grad():
        prefill(model, rows, adaption_prompts, cache)
        return decode_step(model, torch.tensor([6] * len(rows)), adaption_prompts, cache)


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_model_equals_the_quantized_one(bits, dtype):
    """Batches have two rows, or 70, which exceeds MAX_ROWS, the limit for the packed matmul.

    A row has the same logits in the batch as alone, up to rounding. With gate values of zero, the logits of the
    prepared model equal those without adaption prompts bit for bit.
    """
    model = make_model(SHAPE)
    quantizer(bits)(model.layers)
    model = model.to(dtype)
    prepared = deepcopy(model)
    prepare_to_decode(prepared)
    packed = [module for module in prepared.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 3 * 7 + 1 and type(prepared.output) is PackedLinear
    assert prepared.output.weight is prepared.output.layer.weight
    adaption_prompts = make_adapter(model)(dtype=dtype)
    for rows in ([[5, 7, 9], [4, 3]], [[i % 50, 7, 9] for i in range(70)]):
        both = [step_logits(each, rows, adaption_prompts) for each in (model, prepared)]
        assert (both[0] - both[1]).norm() < 0.03 * both[0].norm()
        alone = step_logits(prepared, rows[1:2], adaption_prompts)
        assert (alone[0] - both[1][1]).norm() < 0.03 * alone.norm()
    assert not torch.equal(step_logits(prepared, [[5, 7]], adaption_prompts), step_logits(prepared, [[5, 7]], ()))
    zero = make_adapter(model)(gate_scale=0.0, dtype=dtype)
    assert torch.equal(step_logits(prepared, [[5, 7]], zero), step_logits(prepared, [[5, 7]], ()))


def test_packing_in_pieces_equals_packing_at_once():
    nibbles = torch.randint(0, 16, (2 * 1024 + 48, 64), dtype=torch.uint8)
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
    assert torch.equal(decoding.pack(nibbles), whole)


def test_fast_matmul_with_a_wrong_result_is_not_used(monkeypatch, capsys):
    monkeypatch.setattr(decoding, "packed_product", lambda rows, packed, factors: rows.new_zeros(1, factors.shape[1]))
    model = make_model(SHAPE)
    quantizer("4")(model.layers)
    prepare_to_decode(model)
    assert type(model.output) is torch.nn.Linear and "no fast kernel" in capsys.readouterr().err


def has_bfloat16_matmul():
    """Return True if oneDNN has a bfloat16 matmul for this CPU; on x86-64, it needs AVX-512."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not has_bfloat16_matmul(), reason="needs oneDNN, and a CPU with bfloat16 instructions")
@pytest.mark.parametrize("config", ["gqa", "qwen2"])
def test_bfloat16_in_onednns_layout_equals_the_plain_matmul(config):
    """Logits are equal up to rounding, for one row and for two, without biases (gqa) and with biases (qwen2)."""
    model = make_model(config).bfloat16()
    prepared = deepcopy(model)
    prepare_to_decode(prepared)
    assert not any(isinstance(module, torch.nn.Linear) for module in prepared.modules())
    torch.testing.assert_close(prepared.output.weight, model.output.weight, rtol=0, atol=0)
    adaption_prompts = make_adapter(model)(dtype=torch.bfloat16)
    for rows in ([[5, 7, 9]], [[5, 7, 9], [4, 3, 2]]):
        both = [step_logits(each, rows, adaption_prompts) for each in (model, prepared)]
        torch.testing.assert_close(*both, rtol=0.02, atol=0.02)


def test_layers_are_not_packed_if_that_is_not_faster(monkeypatch, capsys):
    """Only quantized weights then cause a warning, because they are dequantized at every step."""
    monkeypatch.setattr(decoding, "seconds_of", lambda layer, row: 1.0)
    model = make_model(SHAPE)
    quantizer("4")(model.layers)
    for each in (model, make_model("gqa").bfloat16()):
        kinds = [type(module) for module in each.modules()]
        prepare_to_decode(each)
        assert [type(module) for module in each.modules()] == kinds
    assert capsys.readouterr().err.count("no fast kernel for 4-bit weights; dequantizing") == 1


def test_fast_matmul_that_pytorch_lacks_is_not_used(monkeypatch, capsys):
    def not_implemented(*_):
        raise NotImplementedError("not for this device")

    monkeypatch.setattr(decoding, "pack", not_implemented)
    model = make_model(SHAPE)
    quantizer("8")(model.layers)
    prepare_to_decode(model)
    assert type(model.layers[0].attention.wq) is QuantizedLinear and "no fast kernel" in capsys.readouterr().err


def test_compiled_layers_are_single_graphs_with_equal_outputs():
    """Both one row and three are tested, because a compiled RowLinear computes a single row in a different way."""
    torch.manual_seed(0)
    x, rows = torch.randn(1, 1, 64), torch.randn(3, 64)
    linear = torch.nn.Linear(64, 40).requires_grad_(False)
    for layer in (RowLinear(deepcopy(linear)), PackedLinear(quantize(linear, 8)), PackedLinear(quantize(linear, 4))):
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for each in (x, rows):
            torch.testing.assert_close(compiled(each), layer(each), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_base_is_prepared(tiny_adapter, dtype, compiled):
    model, _, _ = load_with_adapters([str(tiny_adapter)], None, torch.device("cpu"), dtype, compiled=compiled)
    packs = dtype == torch.bfloat16 and has_bfloat16_matmul()
    expected = RowLinear if compiled else PackedBfloat16 if packs else torch.nn.Linear
    assert type(model.layers[0].attention.wq) is type(model.output) is expected
    packed = load_with_adapters([str(tiny_adapter)], None, torch.device("cpu"), dtype, bits="8", compiled=compiled)[0]
    assert type(packed.layers[0].attention.wq) is type(packed.output) is PackedLinear


def test_layers_are_packed_module_by_module():
    """Replaced layers must be freed module by module, because a 7B model in bfloat16 may fit into memory only once."""
    model, alive = make_model(SHAPE), []

    def pack(layer):
        alive.append(weakref.ref(layer))
        assert sum(reference() is not None for reference in alive) <= 4  # the layers of one parent module
        return torch.nn.Identity()

    replace_linear(model.layers, torch.nn.Linear, pack)
    assert len(alive) == 3 * 7


def test_replacing_leaves_other_layer_types_alone():
    model = make_model(SHAPE)
    replace_linear(model, QuantizedLinear, PackedLinear)
    assert type(model.output) is torch.nn.Linear
    expected = generate(model, [[5, 7]], max_new_tokens=4)
    replace_linear(model, torch.nn.Linear, RowLinear)
    assert generate(model, [[5, 7]], max_new_tokens=4) == expected
