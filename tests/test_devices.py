"""Results on a GPU compared with the CPU. Every test runs on each device of the fixture `device`.

The expected result is computed in a different way, so that every test can also fail on a CPU. Gates are nonzero.
"""

from copy import deepcopy

import pytest
import torch
from click.testing import CliRunner
from helpers import make_adapter, make_example, make_model, make_tokens

from data import Request
from formats.bases import load_llama
from formats.loading import load_with_adapters
from generate import Responder, Sampling, decode_step, generate, main, penalize_repetition, prefill, sample, stream
from model import Config, KVCache
from multimodal import ImageAdapter
from runtime import decoding, quantization
from runtime.compilation import compile_decoding, compile_layers, prepare_to_compile
from runtime.decoding import PackedLinear, prepare_to_decode
from runtime.device import select_device
from runtime.quantization import QuantizedLinear, quantizer
from toy.language_model import BASE
from train import TrainConfig, make_optimizer, response_loss, train_step
from training import loss

SHAPE = Config(64, 3, 4, 2, 16, 96, 50)  # for quantized models: a row of a weight has two or three groups


# ---------------------------------------------------------------------------------------------------
# Sampling


PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])
DRAWS = 40_000


def draw(device, temperature, top_p, seed=0):
    """Return DRAWS tokens sampled from PROBABILITIES. Every other token is drawn from their reverse and mapped back."""
    logits = torch.stack([PROBABILITIES, PROBABILITIES.flip(0)]).log().repeat(DRAWS // 2, 1)  # (DRAWS, 4)
    generator = torch.Generator(device).manual_seed(seed)
    tokens = sample(logits.to(device), temperature, top_p, generator).cpu()
    tokens[1::2] = 3 - tokens[1::2]
    return tokens


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, PROBABILITIES),
        (1.0, 0.7, torch.tensor([0, 0.5, 0, 0.3])),  # 0.5 < 0.7 <= 0.5 + 0.3
        (0.5, 1.0, PROBABILITIES**2),
        (2.0, 0.3, torch.tensor([0, 1.0, 0, 0])),  # the largest square root is 0.38 of their sum
    ],
)
def test_sampled_frequencies_match_the_nucleus(device, temperature, top_p, expected):
    """Each frequency may differ from its probability by at most five standard deviations."""
    expected = expected / expected.sum()
    shares = draw(device, temperature, top_p).bincount(minlength=4) / DRAWS
    deviations = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((shares - expected).abs() <= 5 * deviations).all(), shares


def test_seed_determines_the_samples(device):
    first, again, other = (draw(device, 1.0, 0.9, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_temperature_0_is_argmax(device):
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits.to(device), 0.0, 0.5, None).cpu(), logits.argmax(dim=1))


def test_generate_py_samples_the_same_text_with_the_same_seed(tiny_adapter, device):
    """The command uses the device's default dtype, and a random generator on the device."""
    args = ["--adapter", str(tiny_adapter), "--device", device, "--temperature", "1", "--max-new-tokens", "12", "Hello"]
    results = [CliRunner().invoke(main, [*args, "--seed", seed]) for seed in ("0", "0", "1")]
    assert [result.exit_code for result in results] == [0, 0, 0], results[0].output
    first, again, other = (result.stdout for result in results)
    assert first == again != other


# ---------------------------------------------------------------------------------------------------
# Decoding


def decode_without_cache(model, ids, adaption_prompts, num_tokens, penalty=1.0):
    """Return `num_tokens` new ids of greedy decoding that recomputes the whole text for each of them."""
    ids = list(ids)
    for _ in range(num_tokens):
        logits = model(torch.tensor([ids]), adaption_prompts)[:, -1]  # (1, V)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, ids] = True
        ids.append(penalize_repetition(logits, seen, penalty).argmax().item())
    return ids[-num_tokens:]


def load_toy(device, *texts):
    """Return the toy's base, whose predictions depend on the context, and the ids of each text."""
    model, tokenizer = load_llama(BASE, device=device)
    return model, [tokenizer.start_ids + tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_batched_decoding_equals_single_rows_on_the_cpu(device, penalty):
    """Rows have different lengths, and one of them ends early. On a GPU, tokens of eight steps are read at a time."""
    model, rows = load_toy("cpu", "The capital of Peru is", "The owl", "What is the opposite of hot?")
    adapter = make_adapter(model, layers=3)
    expected = [decode_without_cache(model, row, adapter(), 20, penalty) for row in rows]
    end = next(id for id in expected[1][3:] if id not in expected[0])
    expected = [ids[: ids.index(end)] if end in ids else ids for ids in expected]
    assert len(expected[0]) == 20 > len(expected[1])
    model.to(device)
    adapter.to(device)
    options = {"max_new_tokens": 20, "end_ids": [end], "repetition_penalty": penalty}
    assert generate(model, rows, adapter(), **options) == expected


@pytest.fixture
def compiling(device, monkeypatch):
    """Use Inductor on a GPU only. On a CPU it takes half a minute, and other tests cover it there."""
    with torch._dynamo.config.patch(cache_size_limit=torch._dynamo.config.cache_size_limit):
        try:
            prepare_to_compile(torch.device(device))
        except ValueError as error:
            pytest.skip(str(error))
        if device == "cpu":
            original = torch.compile
            monkeypatch.setattr(torch, "compile", lambda *args, **options: original(*args, **options, backend="eager"))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
        torch._dynamo.reset()


def test_compiled_decoding_equals_eager_decoding(device, compiling):
    """The prompt, the adaption prompts, or both change between generations.

    On a GPU, a stale CUDA graph would use the inputs of an earlier generation.
    """
    texts = ("The capital of Peru is", "Anna likes the owl and")
    (model, rows), (prepared, _) = load_toy(device, *texts), load_toy(device)
    rows = [row[:6] for row in rows]
    prepare_to_decode(prepared, compiled=True)
    compiled = compile_decoding(decode_step, prepared)
    adaption_prompts = [make_adapter(model, seed=seed).to(device)() for seed in (1, 5)]
    found = []
    for row, own in [(0, 0), (0, 1), (1, 1), (0, 0)]:
        options = {"adaption_prompts": adaption_prompts[own], "max_new_tokens": 12}
        found += generate(prepared, [rows[row]], **options, decode_step=compiled)
        assert found[-1:] == generate(model, [rows[row]], **options)
    assert found[0] == found[3]
    assert found[0] != found[1] != found[2]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_compiled_decoding_continues_in_a_rewound_cache(device, compiling):
    """The cache keeps the first six tokens of an earlier generation, as a conversation keeps its earlier turns."""
    model, (first, second) = load_toy(device, "The capital of Peru is Lima.", "Name the capital of")
    adaption_prompts = make_adapter(model).to(device)()
    cache = KVCache(model, batch=1, capacity=40)
    options = {
        "sampling": Sampling(max_new_tokens=12),
        "decode_step": compile_decoding(decode_step, model),
        "cache": cache,
    }
    earlier = [ids[0] for ids in stream(model, [first], adaption_prompts, **options)]
    cache.lengths.fill_(6)
    found = [ids[0] for ids in stream(model, [second], adaption_prompts, **options)]
    for ids, row in ((earlier, first), (found, first[:6] + second)):
        assert [ids] == generate(model, [row], adaption_prompts, max_new_tokens=12)
    assert [found] != generate(model, [second], adaption_prompts, max_new_tokens=12)


# ---------------------------------------------------------------------------------------------------
# Training


def make_examples(model, images=False):
    """Return five examples of unequal length. With `images`, every other one has the features of an image."""
    examples = []
    for number, length in enumerate((9, 8, 30, 17, 6)):
        ids = make_tokens(model, length, seed=length).tolist()
        features = torch.linspace(-1, number, 6) if images and number % 2 else None
        examples.append(make_example(ids, 2 + number, f"row {number}", features))
    return examples


def make_image_adapter(model):
    """Return an ImageAdapter for 6 features, with the prompts and gates of `make_adapter`."""
    generator = torch.Generator().manual_seed(3)
    adapter = ImageAdapter(layers=2, length=5, dim=32, heads=4, features=6, bottleneck=3, generator=generator)
    adapter.load_state_dict(make_adapter(model).state_dict(), strict=False)
    return adapter


def train_adapter(device, make, steps=4, **config):
    """Train an adapter for `steps` steps; return its parameters as one vector on the CPU, and the losses."""
    model = make_model().to(device)
    adapter = make(model).to(device)
    optimizer = make_optimizer(adapter, weight_decay=0.02)
    examples = make_examples(model, images=make is make_image_adapter)
    train_config = TrainConfig(**config)
    losses = [train_step(model, adapter, optimizer, examples, 0.02, train_config) for _ in range(steps)]
    return torch.cat([parameter.detach().flatten().cpu() for parameter in adapter.parameters()]), losses


@pytest.mark.parametrize("make", [make_adapter, make_image_adapter])
@pytest.mark.parametrize("tokens, checkpointed", [(10_000, False), (10_000, True), (40, False)])
def test_training_steps_equal_those_of_the_cpu(device, monkeypatch, make, tokens, checkpointed):
    """Train with chunks of 7 rows of logits, in two cases also with micro-batches or activation checkpointing.

    The expected steps use none of these.
    """
    start, _ = train_adapter("cpu", make, steps=0)
    expected, expected_losses = train_adapter("cpu", make)
    monkeypatch.setitem(loss.ROWS, device, 7)
    found, losses = train_adapter(device, make, micro_batch_tokens=tokens, checkpoint_activations=checkpointed)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert (found - expected).norm() < 1e-3 * (expected - start).norm()


def loss_and_gradient(model, adapter):
    """Return the loss, and its gradient with respect to the adapter's parameters as one vector on the CPU."""
    adapter.zero_grad()
    total = response_loss(model, adapter, make_examples(model))
    total.backward()
    return total.item(), torch.cat([parameter.grad.flatten().cpu() for parameter in adapter.parameters()])


def test_bfloat16_gradient_is_close_to_float32(device):
    """bfloat16 is the default on a GPU, and its attention has a different backward kernel than that of float32."""
    expected_loss, expected = loss_and_gradient(make_model(), make_adapter(make_model()))
    adapter = make_adapter(make_model()).to(device)
    found_loss, found = loss_and_gradient(make_model().to(device, torch.bfloat16), adapter)
    assert found_loss == pytest.approx(expected_loss, rel=0.01)
    assert found_loss != expected_loss
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99


def test_loss_without_examples_and_its_gradient_are_zero(device):
    """A rank without data computes this loss."""
    model = make_model().to(device)
    adapter = make_adapter(model).to(device)
    total = response_loss(model, adapter, [])
    total.backward()
    assert total.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in adapter.parameters())


def test_compiled_layers_train_like_eager_ones(device, compiling):
    shape = Config(32, 2, 4, 2, 8, 48, 50)
    model, compiled = make_model(shape).to(device), make_model(shape).to(device)
    adapter = make_adapter(model).to(device)
    compile_layers(compiled.layers)
    expected_loss, expected = loss_and_gradient(model, adapter)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    found_loss, found = loss_and_gradient(compiled, adapter)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert found_loss == pytest.approx(expected_loss, rel=1e-5)
    assert (found - expected).norm() < 1e-4 * expected.norm()


# ---------------------------------------------------------------------------------------------------
# Quantization


def output_and_gradient(model, adapter):
    """Return the logits, and the gradient of their mean square with respect to prompts and gates, both on the CPU."""
    adapter.zero_grad()
    logits = model(make_tokens(model, 2, 9).to(model.device), adapter())
    logits.square().mean().backward()
    return logits.detach().cpu(), torch.cat([adapter.prompts.grad.flatten(), adapter.gates.grad.flatten()]).cpu()


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("bits", ["8", "4"])
def test_quantized_model_equals_dequantized_weights_on_the_cpu(device, monkeypatch, bits):
    """One model is quantized and then moved to the device; the other is moved first and quantized there."""
    quantized, dequantized = make_model(SHAPE), make_model(SHAPE)
    quantizer(bits)(quantized.layers)
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLinear):
            dequantized.get_submodule(name).weight.data = layer.dequantized()
    adapter = make_adapter(quantized)
    unquantized = output_and_gradient(make_model(SHAPE), adapter)
    expected = output_and_gradient(dequantized, adapter)
    monkeypatch.setitem(quantization.CHUNK, device, 1000)  # elements per chunk, a few rows
    adapter.to(device)
    moved = quantized.to(device)
    assert {buffer.device.type for buffer in moved.buffers()} == {device}
    quantized_on_device = make_model(SHAPE).to(device)
    quantizer(bits)(quantized_on_device.layers)
    for model in (moved, quantized_on_device):
        for found, correct, before in zip(output_and_gradient(model, adapter), expected, unquantized):
            # On a GPU a scale may differ in its last bit, and then a few integers by one.
            assert relative_error(found, correct) < 0.1 * relative_error(found, before) < 0.03


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_decode_like_the_quantized_ones(device, monkeypatch, bits, dtype):
    """The packed matmul is made to win the speed test, which it may lose for small layers."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the matmul with packed weights needs a GPU of compute capability 8.0 or later")
    monkeypatch.setattr(decoding, "seconds_of", lambda layer, row: 0.0 if isinstance(layer, PackedLinear) else 1.0)
    model = make_model(SHAPE)
    quantizer(bits)(model.layers)
    model.to(device, dtype)
    prepared = deepcopy(model)
    prepare_to_decode(prepared)
    assert type(prepared.output) is type(prepared.layers[0].attention.wq) is PackedLinear
    assert {tensor.device.type for tensor in [*prepared.parameters(), *prepared.buffers()]} == {device}
    adaption_prompts = make_adapter(model).to(device)(dtype=dtype)
    logits = []
    with torch.no_grad():
        for each in (model, prepared):
            cache = KVCache(each, batch=2, capacity=4)
            prefill(each, [[5, 7, 9], [4, 3]], adaption_prompts, cache)
            logits.append(decode_step(each, torch.tensor([6, 8], device=device), adaption_prompts, cache).float())
    assert 1e-5 < relative_error(logits[1], logits[0]) < 0.03


# ---------------------------------------------------------------------------------------------------
# Loading


@pytest.fixture
def toy_adapter(tmp_path):
    """Path of an adapter file for the toy's base."""
    model, _ = load_llama(BASE)
    path = tmp_path / "a.safetensors"
    make_adapter(model, layers=3, seed=3).save(path, base=BASE, prompt_template="alpaca")
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", ["none", "8", "4"])
def test_loaded_model_is_on_the_device_in_its_dtype(toy_adapter, device, dtype, bits):
    """Every parameter and buffer of the base is checked. The adapter is float32."""
    options = {"bits": bits, "decoding": False}
    model, _, adapters = load_with_adapters([str(toy_adapter)], None, *select_device(device, dtype), **options)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {device}
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}
    kinds = {"none": set(), "8": {torch.int8, torch.float32}, "4": {torch.uint8, torch.float32}}
    assert {buffer.dtype for buffer in model.buffers()} == kinds[bits]
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(quantized) == (0 if bits == "none" else 4 * 7)
    trained = adapters["a"].state_dict().values()
    assert {(tensor.device.type, tensor.dtype) for tensor in trained} == {(device, torch.float32)}


@pytest.mark.parametrize("bits", ["none", "8", "4"])
def test_toy_responses_equal_those_of_the_cpu(toy_adapter, device, bits):
    """Responses are generated in float32. The expected ones are computed on the CPU, without a cache."""
    prepare_layer = quantizer(bits)
    model, tokenizer = load_llama(BASE, prepare_layer=prepare_layer)
    adaption_prompts = make_adapter(model, layers=3, seed=3)()
    options = {"bits": bits, "decoding": bits == "none"}  # packed weights are rounded differently
    loaded = load_with_adapters([str(toy_adapter)], None, *select_device(device, "float32"), **options)
    responder = Responder(*loaded, max_new_tokens=16)
    for text in ("Name the capital of Peru.", "Translate cat into French."):
        request = Request(text, adapter="a")
        expected = tokenizer.decode(decode_without_cache(model, responder.prompt_ids(request), adaption_prompts, 16))
        assert "".join(responder.respond(request)) == expected
        assert "".join(responder.respond(Request(text))) != expected
