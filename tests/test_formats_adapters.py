"""Adapter files of the authors, lit-llama and PEFT: import, equality of outputs, export, and refused files."""

import json
import sys

import pytest
import reference
import torch
from click.testing import CliRunner
from helpers import Malicious, make_adapter, make_model, make_tokens

from adapter import Adapter
from encoders.heads import HeadAdapter
from formats import adapters as formats_adapters
from formats.adapters import describe_reading, load_adapter, write_peft
from generate import main as generate_main
from multimodal import ImageAdapter


def random_values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Third-party files with L = 2 adapted layers of N = 3, K = 5, C = 32, H = 4.


def save_authors_file(path, **changes):
    tensors = {"adapter_query.weight": random_values(10, 32).half()}
    tensors |= {f"layers.{i}.attention.gate": random_values(1, 4, 1, 1, seed=i).half() for i in range(3)}
    torch.save(tensors | changes, path)
    return tensors


def save_lit_file(path, heads=4, **changes):
    tensors = {}
    for i in (1, 2):
        tensors[f"transformer.h.{i}.attn.adapter_wte.weight"] = random_values(5, 32, seed=i)
        tensors[f"transformer.h.{i}.attn.gating_factor"] = random_values(1, heads, 1, 1, seed=10 + i)
    torch.save({"model": tensors | changes}, path)
    return tensors


def reference_logits(prompts, gates):
    """Return a model, tokens, and the reference's logits. `gates` (L, H) are values after the activation.

    The reference applies tanh, so it is given the atanh of these values.
    """
    model = make_model()
    tokens = make_tokens(model, 1, 6)
    expected = reference.logits(model.state_dict(), model.config, tokens[0].tolist(), prompts, gates.double().atanh())
    return model, tokens, expected


@pytest.mark.parametrize("gate", ["tanh", "identity"])
def test_authors_file_equals_the_reference(tmp_path, gate):
    """adapter_query is (L*K, C), lowest layer first. All layers have gates; those of the topmost L are used."""
    tensors = save_authors_file(tmp_path / "theirs.pth")
    load_adapter(tmp_path / "theirs.pth", gate=gate, length=5).save(tmp_path / "ours.safetensors")
    adapter = load_adapter(tmp_path / "ours.safetensors")
    assert adapter.gate_activation == adapter.metadata["gate_activation"] == gate
    assert torch.equal(adapter.prompts[1, 2], tensors["adapter_query.weight"][7].float())
    gates = torch.stack([tensors[f"layers.{i}.attention.gate"].flatten().float() for i in (1, 2)])
    values = gates.tanh() if gate == "tanh" else gates / 4  # within the domain of atanh
    if gate == "identity":
        with torch.no_grad():
            adapter.gates /= 4
    model, tokens, expected = reference_logits(adapter.prompts, values)
    torch.testing.assert_close(model(tokens, adapter())[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_files_of_old_pytorch_are_read(tmp_path):
    """Before version 1.6, torch.save did not write zip files."""
    tensors = save_authors_file(tmp_path / "new.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    new, old = (load_adapter(tmp_path / name, length=5) for name in ("new.pth", "old.pth"))
    assert torch.equal(new.prompts, old.prompts) and torch.equal(new.gates, old.gates)


@pytest.mark.parametrize("heads", [4, 1])  # older files have one gate for all heads
def test_lit_file_equals_the_reference(tmp_path, heads):
    tensors = save_lit_file(tmp_path / "theirs.pth", heads)
    adapter = load_adapter(tmp_path / "theirs.pth", heads=4)
    assert adapter.gate_activation == "identity" and adapter.metadata["base_layers"] == "3"
    gates = torch.stack([tensors[f"transformer.h.{i}.attn.gating_factor"].flatten().expand(4) for i in (1, 2)])
    assert torch.equal(adapter.gate_values(), gates)
    assert torch.equal(adapter.prompts[0], tensors["transformer.h.1.attn.adapter_wte.weight"])
    with torch.no_grad():
        adapter.gates /= 4
    model, tokens, expected = reference_logits(adapter.prompts, gates / 4)
    torch.testing.assert_close(model(tokens, adapter())[0].double(), expected, rtol=1e-4, atol=1e-4)
    if heads == 1:
        with pytest.raises(ValueError, match="one gate per layer for all heads; give the base.s number of heads"):
            load_adapter(tmp_path / "theirs.pth")


def make_peft_model(config, layers=2, length=5):
    """Return a random base, the same base in transformers, PEFT's AdaptionPromptConfig, and the module `peft`."""
    peft = pytest.importorskip("peft")
    from benchmarks.peers import as_transformers

    model = make_model(config)
    theirs = as_transformers(model)
    options = peft.AdaptionPromptConfig(adapter_len=length, adapter_layers=layers, task_type="CAUSAL_LM")
    return model, theirs, options, peft


@pytest.mark.parametrize("config", ["mha", "gqa"])  # PEFT fails if H * D differs from C
@pytest.mark.filterwarnings("ignore")
def test_imported_peft_adapter_equals_peft(tmp_path, config):
    model, theirs, options, peft = make_peft_model(config)
    theirs = peft.get_peft_model(theirs, options)
    for seed, (name, parameter) in enumerate(theirs.named_parameters()):
        if "adaption_gate" in name:
            parameter.data = random_values(1, seed=seed)
        if "adaption_prompt" in name:
            parameter.data = random_values(*parameter.shape, seed=seed)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs", heads=4)
    tokens = make_tokens(model, 2, 9)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (expected - model(tokens)).abs().max() > 0.1
        torch.testing.assert_close(model(tokens, adapter()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", ["mha", "gqa"])
@pytest.mark.filterwarnings("ignore")
def test_exported_adapter_computes_the_same_in_peft(tmp_path, config):
    model, theirs, _, peft = make_peft_model(config)
    adapter = make_adapter(model)
    with torch.no_grad():
        adapter.gates.copy_(random_values(2, 1).expand(2, 4))
    adapter.metadata["base_layers"] = "3"
    write_peft(adapter, tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "theirs")
    tokens = make_tokens(model, 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, adapter()), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    imported = load_adapter(tmp_path / "theirs", heads=4)
    assert torch.equal(imported.prompts, adapter.prompts) and torch.equal(imported.gate_values(), adapter.gate_values())


def test_interrupted_export_is_not_mixed_with_an_earlier_one(tmp_path, monkeypatch):
    """Tensors of two layers with the configuration of one would be read without an error."""
    adapters = [make_adapter(make_model("gqa"), layers=layers, gates=False) for layers in (1, 2)]
    for adapter in adapters:
        adapter.metadata["base_layers"] = "3"
    write_peft(adapters[0], tmp_path)
    monkeypatch.setattr(formats_adapters, "write_json", lambda *args, **options: sys.exit(1))
    with pytest.raises(SystemExit):
        write_peft(adapters[1], tmp_path)
    with pytest.raises((ValueError, OSError), match="adapter_config.json"):
        load_adapter(tmp_path, heads=4)


def test_adapters_that_peft_cannot_represent_are_refused(tmp_path):
    with pytest.raises(ValueError, match="PEFT has one gate for all heads"):
        write_peft(make_adapter(make_model()), tmp_path / "theirs")
    with pytest.raises(ValueError, match="does not state base_layers, the number of layers"):
        write_peft(make_adapter(make_model(), gates=False), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_generate_py_accepts_third_party_adapters(tiny_base, tmp_path):
    """The file has one gate per layer, which is expanded to all heads of the base."""
    tensors = {}
    for i in (1, 2):
        tensors[f"transformer.h.{i}.attn.adapter_wte.weight"] = random_values(5, 16, seed=i)
        tensors[f"transformer.h.{i}.attn.gating_factor"] = torch.full((1,), 2.0)
    torch.save(tensors, tmp_path / "lit.pth")
    args = ["--base", str(tiny_base), "--greedy", "--max-new-tokens", "8", "hello"]
    plain, adapted = (
        CliRunner().invoke(generate_main, [*more, *args]) for more in ([], ["--adapter", str(tmp_path / "lit.pth")])
    )
    assert plain.exit_code == adapted.exit_code == 0, adapted.output
    assert plain.stdout != adapted.stdout


def test_broken_third_party_files_are_named(tmp_path, capsys):
    path = tmp_path / "theirs.pth"

    def check_refused(message, **options):
        with pytest.raises(ValueError, match=f"theirs.pth: .*{message}") as caught:
            load_adapter(path, **options)
        assert "\n" not in str(caught.value)

    save_authors_file(path)
    check_refused("expected a multiple of 10000 rows", length=10000)
    check_refused("2 prompts for each of 5 layers, but gates for only 3 layers", length=2)
    save_authors_file(path, **{"layers.2.attention.gate": random_values(1, 3, 1, 1)})
    check_refused(r"layers have \[3, 4\] gates", length=5)
    for gate in (
        random_values(1, 4, 1, 1).to_sparse(),
        torch.ones(4, dtype=torch.long),
        torch.ones(4).to(torch.float8_e4m3fn),
    ):
        save_authors_file(path, **{"layers.2.attention.gate": gate})
        check_refused("gates.*: (is not a dense tensor|has dtype torch.*; expected a floating-point dtype)", length=5)
    save_authors_file(path, **{"layers.2.attention.gate": torch.full((1, 4, 1, 1), 1e300, dtype=torch.float64)})
    check_refused("gates of layer 2: contains values that are not finite", length=5)
    save_authors_file(path, **{"adapter_query.weight": random_values(10, 32).to_sparse()})
    check_refused("adapter_query.weight", length=5)
    save_authors_file(path, **{"adapter_query.weight": torch.full((10, 32), torch.nan)})
    check_refused("prompts of layer 1: contains values that are not finite", length=5)
    save_lit_file(path)
    check_refused(r"layers have \[4\] gates; expected one per layer, or one for each of 8 heads", heads=8)
    save_lit_file(path, **{"transformer.h.2.attn.adapter_wte.weight": random_values(4, 32)})
    check_refused(r"prompts have shape \(4, 32\) in layer 2, but \(5, 32\) in layer 1")
    save_lit_file(path, **{"transformer.h.7.attn.adapter_wte.weight": random_values(5, 32)})
    check_refused(r"prompts for layers \[1, 2, 7\] and gates for layers \[1, 2\]")
    torch.save({"something": random_values(2)}, path)
    check_refused("unknown adapter format; the file contains something")
    torch.save({"adapter_query.weight": Malicious()}, path)
    check_refused("not a file of tensors")
    assert "ran code" not in capsys.readouterr().out
    torch.save([1], path)
    check_refused("not a file of tensors")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    check_refused("not a file of tensors")


def test_broken_peft_folders_are_named(tmp_path):
    config = tmp_path / "adapter_config.json"
    for text, message in [
        (None, r"contains neither adapter.safetensors \(this project\) nor adapter_config.json \(PEFT\)"),
        ("{", "not a JSON object with a field peft_type"),
        ("[]", "not a JSON object with a field peft_type"),
        ('{"peft_type": "LORA"}', "peft_type is 'LORA'; expected 'ADAPTION_PROMPT'"),
        ('{"peft_type": "ADAPTION_PROMPT"}', "has neither adapter_model.safetensors nor"),
    ]:
        if text is not None:
            config.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_adapter(tmp_path, heads=4)
    prefix = "base_model.model.model.layers.2.self_attn.adaption_"
    for prompt in (torch.ones(5, 32), torch.ones(2, 5, 32), torch.ones(1, 1, 5, 32)):
        torch.save({prefix + "prompt": prompt, prefix + "gate": torch.ones(1)}, tmp_path / "adapter_model.bin")
        with pytest.raises(
            ValueError,
            match=r"adapter_model.bin: the adaption prompt of layer 2 has shape \(.*\); expected \(1, K, C\)",
        ):
            load_adapter(tmp_path, heads=4)
    torch.save(
        {prefix + "prompt": torch.ones(1, 5, 32), prefix + "gate": torch.ones(1)}, tmp_path / "adapter_model.bin"
    )
    assert load_adapter(tmp_path, heads=4).prompts.shape == (1, 5, 32)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="adapter_model.safetensors: not a complete"):
        load_adapter(tmp_path, heads=4)


def test_our_file_determines_the_class(tmp_path):
    shape = dict(layers=2, length=3, dim=8, heads=2)
    for adapter in (
        Adapter(**shape),
        ImageAdapter(features=6, bottleneck=4, **shape),
        HeadAdapter(widths=[8, 3], **shape),
    ):
        adapter.save(tmp_path / "a.safetensors")
        loaded = load_adapter(tmp_path / "a.safetensors")
        assert type(loaded) is type(adapter)
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in adapter.state_dict().items())
    (tmp_path / "a.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="a.safetensors: not a complete safetensors file"):
        load_adapter(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="absent: no such adapter file"):
        load_adapter(tmp_path / "absent")


@pytest.mark.parametrize("start", [b"\x80\x02", b"PK"], ids=["pickle", "zip"])
def test_our_file_may_begin_like_a_pickle_or_zip(start, tmp_path):
    """A safetensors file begins with the length of its header (8 bytes, little-endian), which can be any number."""
    adapter, path = Adapter(layers=2, length=3, dim=8, heads=2), tmp_path / "a.safetensors"
    adapter.save(path, data="")
    length = int.from_bytes(path.read_bytes()[:8], "little")
    adapter.save(path, data="x" * (int.from_bytes(start, "little") - length))
    assert path.read_bytes().startswith(start)
    assert torch.equal(load_adapter(path).prompts, adapter.prompts)


def test_description_of_an_import_is_one_line(tmp_path):
    save_authors_file(tmp_path / "theirs.pth")
    line = describe_reading(load_adapter(tmp_path / "theirs.pth", length=5))
    assert line == "the authors' release: theirs.pth: read as 2 layers of 5 prompts of width 32, gate activation tanh"


@pytest.mark.parametrize(
    "name, message",
    [
        ("layers.1.attention.wq_bias", "layers.1.attention.wq_bias.*LLaMA-Adapter V2, which also trains"),
        ("layers.1.feed_forward.w1_scale", "w1_scale.*LLaMA-Adapter V2"),
        ("norm.weight", "norm.weight.*LLaMA-Adapter V2"),
        ("layers.1.attention.lora_wq_l1.weight", "lora_wq_l1.*LLaMA-Adapter V2"),
        ("llama.layers.1.attention.gate", "llama.layers.1.attention.gate.*multimodal LLaMA-Adapter V2"),
        ("image_bind_proj.weight", "image_bind_proj.weight.*ImageBind-LLM"),
        ("anything", r"has tensors other than prompts and gates: anything \.\.\.$"),
    ],
)
def test_additional_tensors_in_authors_files_are_refused(tmp_path, name, message):
    save_authors_file(tmp_path / "theirs.pth", **{name: torch.ones(2)})
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "theirs.pth", length=5)


@pytest.mark.parametrize("name", ["attn.attn.adapter_bias", "attn.attn.adapter_scale", "norm_1.weight"])
def test_additional_tensors_in_litgpt_files_are_refused(tmp_path, name):
    save_lit_file(tmp_path / "theirs.pth", **{f"transformer.h.0.{name}": torch.ones(2)})
    with pytest.raises(ValueError, match=f"transformer.h.0.{name} .*LLaMA-Adapter V2"):
        load_adapter(tmp_path / "theirs.pth", heads=4)


def test_files_of_other_methods_are_named(tmp_path):
    torch.save({"image_bind.a": torch.ones(1), "llama.b": torch.ones(1)}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match="unknown adapter format; .*; it looks like ImageBind-LLM"):
        load_adapter(tmp_path / "theirs.pth")


def test_early_files_of_the_authors_have_one_gate_per_layer(tmp_path):
    """The gate applies to all heads, without tanh unless `gate` is "tanh"."""
    gates = {f"layers.{i}.attention.gate": torch.full((1,), 0.25 * i) for i in range(3)}
    save_authors_file(tmp_path / "theirs.pth", **gates)
    with pytest.raises(ValueError, match="one gate per layer for all heads"):
        load_adapter(tmp_path / "theirs.pth", length=5)
    adapter = load_adapter(tmp_path / "theirs.pth", length=5, heads=4)
    assert adapter.gate_activation == "identity"
    assert torch.equal(adapter.gate_values(), torch.tensor([[0.25], [0.5]]).expand(2, 4))
    assert load_adapter(tmp_path / "theirs.pth", length=5, heads=4, gate="tanh").gate_activation == "tanh"
    save_authors_file(tmp_path / "theirs.pth")
    assert load_adapter(tmp_path / "theirs.pth", length=5).gate_activation == "tanh"


@pytest.mark.parametrize("kind", ["projection", "head"])
def test_export_of_a_projection_or_head_to_peft_is_refused(tmp_path, kind):
    shape = {"layers": 2, "length": 5, "dim": 32, "heads": 4}
    adapter = ImageAdapter(features=8, **shape) if kind == "projection" else HeadAdapter(widths=[32, 3], **shape)
    adapter.metadata["base_layers"] = "3"
    with pytest.raises(ValueError, match=f"PEFT's AdaptionPrompt has no .*{kind}"):
        write_peft(adapter, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_newer_litgpt_files_cause_a_warning(tmp_path, capsys):
    """Newer files look like older ones, but litgpt projects their prompts with different rows of the weights."""
    save_lit_file(tmp_path / "theirs.pth")
    load_adapter(tmp_path / "theirs.pth")
    assert "theirs.pth: if litgpt v0.5.5 or later wrote this file, it does not work here" in capsys.readouterr().err


def test_adapter_with_too_many_prompts_is_refused(tmp_path):
    """The file is sparse: its tensors take no space on the disk."""
    shape = [1, 3_000_000, 512]
    size = 4 * 3_000_000 * 512
    header = {"prompts": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    header |= {"gates": {"dtype": "F32", "shape": [1, 4], "data_offsets": [size, size + 16]}}
    text = json.dumps(header | {"__metadata__": {"format": "llama-adapter", "version": "1"}}).encode()
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size + 16)
    with pytest.raises(ValueError, match="a.safetensors: has 3,000,000 prompts per layer; the maximum is 4,096"):
        load_adapter(tmp_path / "a.safetensors")
