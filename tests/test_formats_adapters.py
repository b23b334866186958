"""Adapters of others: their files, their attention, and the way back."""

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


# Files as the others write them, of L = 2 adapted layers of N = 3, K = 5, C = 32, H = 4.


def authors_file(path, **changes):
    tensors = {"adapter_query.weight": random_values(10, 32).half()}
    tensors |= {f"layers.{i}.attention.gate": random_values(1, 4, 1, 1, seed=i).half() for i in range(3)}
    torch.save(tensors | changes, path)
    return tensors


def lit_file(path, heads=4, **changes):
    tensors = {}
    for i in (1, 2):
        tensors[f"transformer.h.{i}.attn.adapter_wte.weight"] = random_values(5, 32, seed=i)
        tensors[f"transformer.h.{i}.attn.gating_factor"] = random_values(1, heads, 1, 1, seed=10 + i)
    torch.save({"model": tensors | changes}, path)
    return tensors


def logits_by_reference(prompts, gates):
    """gates (L, H), no activation any more: the reference puts tanh around what it is given."""
    model = make_model()
    tokens = make_tokens(model, 1, 6)
    expected = reference.logits(model.state_dict(), model.config, tokens[0].tolist(), prompts, gates.double().atanh())
    return model, tokens, expected


@pytest.mark.parametrize("gate", ["tanh", "identity"])
def test_authors_file(tmp_path, gate):
    """adapter_query (L*K, C), lowest layer first; gates in all layers, of which the topmost L count."""
    tensors = authors_file(tmp_path / "theirs.pth")
    load_adapter(tmp_path / "theirs.pth", gate=gate, length=5).save(tmp_path / "ours.safetensors")
    adapter = load_adapter(tmp_path / "ours.safetensors")
    assert adapter.gate_activation == adapter.metadata["gate_activation"] == gate
    assert torch.equal(adapter.prompts[1, 2], tensors["adapter_query.weight"][7].float())
    gates = torch.stack([tensors[f"layers.{i}.attention.gate"].flatten().float() for i in (1, 2)])
    values = gates.tanh() if gate == "tanh" else gates / 4  # within atanh's reach
    if gate == "identity":
        with torch.no_grad():
            adapter.gates /= 4
    model, tokens, expected = logits_by_reference(adapter.prompts, values)
    torch.testing.assert_close(model(tokens, adapter())[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_files_of_old_pytorch(tmp_path):
    """What torch.save wrote before 1.6 was no zip file."""
    tensors = authors_file(tmp_path / "new.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    new, old = (load_adapter(tmp_path / name, length=5) for name in ("new.pth", "old.pth"))
    assert torch.equal(new.prompts, old.prompts) and torch.equal(new.gates, old.gates)


@pytest.mark.parametrize("heads", [4, 1])  # older files have one gate for all heads
def test_lit_file(tmp_path, heads):
    tensors = lit_file(tmp_path / "theirs.pth", heads)
    adapter = load_adapter(tmp_path / "theirs.pth", heads=4)
    assert adapter.gate_activation == "identity" and adapter.metadata["base_layers"] == "3"
    gates = torch.stack([tensors[f"transformer.h.{i}.attn.gating_factor"].flatten().expand(4) for i in (1, 2)])
    assert torch.equal(adapter.gate_values(), gates)
    assert torch.equal(adapter.prompts[0], tensors["transformer.h.1.attn.adapter_wte.weight"])
    with torch.no_grad():
        adapter.gates /= 4
    model, tokens, expected = logits_by_reference(adapter.prompts, gates / 4)
    torch.testing.assert_close(model(tokens, adapter())[0].double(), expected, rtol=1e-4, atol=1e-4)
    if heads == 1:
        with pytest.raises(ValueError, match="one gate for all heads; give the base.s number of heads"):
            load_adapter(tmp_path / "theirs.pth")


def peft_model(config, layers=2, length=5):
    """Our random base as transformers has it, and PEFT's AdaptionPrompt on it, zero gates."""
    peft = pytest.importorskip("peft")
    from benchmarks.peers import as_transformers

    model = make_model(config)
    theirs = as_transformers(model)
    options = peft.AdaptionPromptConfig(adapter_len=length, adapter_layers=layers, task_type="CAUSAL_LM")
    return model, theirs, options, peft


@pytest.mark.parametrize("config", ["mha", "gqa"])  # with other head widths PEFT fails
@pytest.mark.filterwarnings("ignore")
def test_pefts_forward_is_ours(tmp_path, config):
    model, theirs, options, peft = peft_model(config)
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
def test_exported_to_peft_it_computes_the_same(tmp_path, config):
    model, theirs, _, peft = peft_model(config)
    adapter = make_adapter(model)
    with torch.no_grad():
        adapter.gates.copy_(random_values(2, 1).expand(2, 4))
    adapter.metadata["base_layers"] = "3"
    write_peft(adapter, tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "theirs")
    tokens = make_tokens(model, 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, adapter()), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    again = load_adapter(tmp_path / "theirs", heads=4)
    assert torch.equal(again.prompts, adapter.prompts) and torch.equal(again.gate_values(), adapter.gate_values())


def test_an_export_that_is_killed_halfway_is_not_mixed_with_an_earlier_one(tmp_path, monkeypatch):
    """Tensors of two layers beside the configuration of one would be read without a word."""
    adapters = [make_adapter(make_model("gqa"), layers=layers, gates=False) for layers in (1, 2)]
    for adapter in adapters:
        adapter.metadata["base_layers"] = "3"
    write_peft(adapters[0], tmp_path)
    monkeypatch.setattr(formats_adapters, "write_json", lambda *args, **options: sys.exit(1))
    with pytest.raises(SystemExit):
        write_peft(adapters[1], tmp_path)
    with pytest.raises((ValueError, OSError), match="adapter_config.json"):
        load_adapter(tmp_path, heads=4)


def test_what_peft_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="PEFT has one gate for all heads"):
        write_peft(make_adapter(make_model()), tmp_path / "theirs")
    with pytest.raises(ValueError, match="does not say how many layers"):
        write_peft(make_adapter(make_model(), gates=False), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_generate_takes_whosever_adapter(tiny_base, tmp_path):
    """generate.py --adapter theirs, its one gate spread over the base's heads."""
    tensors = {}
    for i in (1, 2):
        tensors[f"transformer.h.{i}.attn.adapter_wte.weight"] = random_values(5, 16, seed=i)
        tensors[f"transformer.h.{i}.attn.gating_factor"] = torch.full((1,), 2.0)
    torch.save(tensors, tmp_path / "lit.pth")
    args = ["--base", str(tiny_base), "--greedy", "--max-new-tokens", "8", "hello"]
    alone, adapted = (
        CliRunner().invoke(generate_main, [*more, *args]) for more in ([], ["--adapter", str(tmp_path / "lit.pth")])
    )
    assert alone.exit_code == adapted.exit_code == 0, adapted.output
    assert alone.stdout != adapted.stdout


def test_broken_files_of_others_are_named(tmp_path, capsys):
    path = tmp_path / "theirs.pth"

    def refused(message, **options):
        with pytest.raises(ValueError, match=f"theirs.pth: .*{message}") as caught:
            load_adapter(path, **options)
        assert "\n" not in str(caught.value)

    authors_file(path)
    refused("expected a multiple of 10000 rows", length=10000)
    refused("2 prompts for each of 5 layers, but gates for only 3", length=2)
    authors_file(path, **{"layers.2.attention.gate": random_values(1, 3, 1, 1)})
    refused(r"layers have \[3, 4\] gates", length=5)
    for gate in (
        random_values(1, 4, 1, 1).to_sparse(),
        torch.ones(4, dtype=torch.long),
        torch.ones(4).to(torch.float8_e4m3fn),
    ):
        authors_file(path, **{"layers.2.attention.gate": gate})
        refused("layer 2: is (not a dense tensor|torch.*, not floating-point)", length=5)
    authors_file(path, **{"layers.2.attention.gate": torch.full((1, 4, 1, 1), 1e300, dtype=torch.float64)})
    refused("layer 2: contains values that are not finite", length=5)
    authors_file(path, **{"adapter_query.weight": random_values(10, 32).to_sparse()})
    refused("adapter_query.weight", length=5)
    authors_file(path, **{"adapter_query.weight": torch.full((10, 32), torch.nan)})
    refused("layer 1: contains values that are not finite", length=5)
    lit_file(path)
    refused(r"layers have \[4\] gates, the base has 8 heads", heads=8)
    lit_file(path, **{"transformer.h.2.attn.adapter_wte.weight": random_values(4, 32)})
    refused(r"prompts are \(4, 32\) in layer 2, \(5, 32\) in layer 1")
    lit_file(path, **{"transformer.h.7.attn.adapter_wte.weight": random_values(5, 32)})
    refused(r"prompts for layers \[1, 2, 7\] and gates for layers \[1, 2\]")
    torch.save({"something": random_values(2)}, path)
    refused("unknown adapter format; it contains something")
    torch.save({"adapter_query.weight": Malicious()}, path)
    refused("not a file of tensors")
    assert "ran code" not in capsys.readouterr().out
    torch.save([1], path)
    refused("not a file of tensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a file of tensors")


def test_broken_folders_of_peft_are_named(tmp_path):
    config = tmp_path / "adapter_config.json"
    for text, message in [
        (None, "adapter_config.json: no such file"),
        ("{", "not JSON with a peft_type"),
        ("[]", "not JSON with a peft_type"),
        ('{"peft_type": "LORA"}', "peft_type is 'LORA', not 'ADAPTION_PROMPT'"),
        ('{"peft_type": "ADAPTION_PROMPT"}', "has neither adapter_model.safetensors nor"),
    ]:
        if text is not None:
            config.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_adapter(tmp_path, heads=4)
    place = "base_model.model.model.layers.2.self_attn.adaption_"
    for prompt in (torch.ones(5, 32), torch.ones(2, 5, 32), torch.ones(1, 1, 5, 32)):
        torch.save({place + "prompt": prompt, place + "gate": torch.ones(1)}, tmp_path / "adapter_model.bin")
        with pytest.raises(ValueError, match=r"adapter_model.bin: the prompt of layer 2 is \(.*\), not \(1, K, C\)"):
            load_adapter(tmp_path, heads=4)
    torch.save({place + "prompt": torch.ones(1, 5, 32), place + "gate": torch.ones(1)}, tmp_path / "adapter_model.bin")
    assert load_adapter(tmp_path, heads=4).prompts.shape == (1, 5, 32)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="adapter_model.safetensors: not a complete"):
        load_adapter(tmp_path, heads=4)


def test_a_file_of_ours_tells_its_class(tmp_path):
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
def test_a_file_of_ours_is_known_though_its_length_looks_like_another_kind(start, tmp_path):
    """safetensors begins with the length of its header, in eight bytes, the lowest first."""
    adapter, path = Adapter(layers=2, length=3, dim=8, heads=2), tmp_path / "a.safetensors"
    adapter.save(path, data="")
    length = int.from_bytes(path.read_bytes()[:8], "little")
    adapter.save(path, data="x" * (int.from_bytes(start, "little") - length))
    assert path.read_bytes().startswith(start)
    assert torch.equal(load_adapter(path).prompts, adapter.prompts)


def test_how_a_file_was_read_is_one_line(tmp_path):
    authors_file(tmp_path / "theirs.pth")
    line = describe_reading(load_adapter(tmp_path / "theirs.pth", length=5))
    assert line == "the authors' release: theirs.pth: read as 2 layers of 5 prompts of width 32, gates with tanh"


@pytest.mark.parametrize(
    "more, said",
    [
        ("layers.1.attention.wq_bias", "layers.1.attention.wq_bias.*LLaMA-Adapter V2, which trains"),
        ("layers.1.feed_forward.w1_scale", "w1_scale.*LLaMA-Adapter V2"),
        ("norm.weight", "norm.weight.*LLaMA-Adapter V2"),
        ("layers.1.attention.lora_wq_l1.weight", "lora_wq_l1.*LLaMA-Adapter V2"),
        ("llama.layers.1.attention.gate", "llama.layers.1.attention.gate.*multimodal LLaMA-Adapter V2"),
        ("image_bind_proj.weight", "image_bind_proj.weight.*ImageBind-LLM"),
        ("anything", r"1 of its tensors do not belong to an adapter: anything \.\.\.$"),
    ],
)
def test_what_the_authors_files_have_besides_is_not_lost(tmp_path, more, said):
    authors_file(tmp_path / "theirs.pth", **{more: torch.ones(2)})
    with pytest.raises(ValueError, match=said):
        load_adapter(tmp_path / "theirs.pth", length=5)


@pytest.mark.parametrize("more", ["attn.attn.adapter_bias", "attn.attn.adapter_scale", "norm_1.weight"])
def test_what_litgpts_files_have_besides_is_not_lost(tmp_path, more):
    lit_file(tmp_path / "theirs.pth", **{f"transformer.h.0.{more}": torch.ones(2)})
    with pytest.raises(ValueError, match=f"transformer.h.0.{more} .*LLaMA-Adapter V2"):
        load_adapter(tmp_path / "theirs.pth", heads=4)


def test_files_of_other_methods_alone_are_named(tmp_path):
    torch.save({"image_bind.a": torch.ones(1), "llama.b": torch.ones(1)}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match="unknown adapter format; .* This looks like ImageBind-LLM"):
        load_adapter(tmp_path / "theirs.pth")


def test_the_authors_first_files_have_one_gate_a_layer(tmp_path):
    """For all heads, and without tanh, unless something else is asked for."""
    gates = {f"layers.{i}.attention.gate": torch.full((1,), 0.25 * i) for i in range(3)}
    authors_file(tmp_path / "theirs.pth", **gates)
    with pytest.raises(ValueError, match="one gate for all heads"):
        load_adapter(tmp_path / "theirs.pth", length=5)
    adapter = load_adapter(tmp_path / "theirs.pth", length=5, heads=4)
    assert adapter.gate_activation == "identity"
    assert torch.equal(adapter.gate_values(), torch.tensor([[0.25], [0.5]]).expand(2, 4))
    assert load_adapter(tmp_path / "theirs.pth", length=5, heads=4, gate="tanh").gate_activation == "tanh"
    authors_file(tmp_path / "theirs.pth")
    assert load_adapter(tmp_path / "theirs.pth", length=5).gate_activation == "tanh"


@pytest.mark.parametrize("kind", ["projection", "head"])
def test_peft_has_no_place_for_half_an_adapter(tmp_path, kind):
    shape = {"layers": 2, "length": 5, "dim": 32, "heads": 4}
    adapter = ImageAdapter(features=8, **shape) if kind == "projection" else HeadAdapter(widths=[32, 3], **shape)
    adapter.metadata["base_layers"] = "3"
    with pytest.raises(ValueError, match=f"PEFT's AdaptionPrompt has no .*{kind}"):
        write_peft(adapter, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_litgpts_newer_files_are_warned_of(tmp_path, capsys):
    """They look like the older ones, and their prompts are projected by other rows."""
    lit_file(tmp_path / "theirs.pth")
    load_adapter(tmp_path / "theirs.pth")
    assert "theirs.pth: if litgpt v0.5.5 or later wrote this file, it does not work here" in capsys.readouterr().err


def test_an_adapter_of_too_many_prompts_is_not_read(tmp_path):
    """A sparse file: its header is small, its zeros are nowhere."""
    shape = [1, 3_000_000, 512]
    size = 4 * 3_000_000 * 512
    header = {"prompts": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    header |= {"gates": {"dtype": "F32", "shape": [1, 4], "data_offsets": [size, size + 16]}}
    text = json.dumps(header | {"__metadata__": {"format": "llama-adapter", "version": "1"}}).encode()
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size + 16)
    with pytest.raises(ValueError, match="a.safetensors: has 3,000,000 prompts per layer, the maximum is 4,096"):
        load_adapter(tmp_path / "a.safetensors")
