"""Bases in Hugging Face's layout: the model compared with transformers, and errors for invalid files."""

import json
import shutil

import pytest
import torch
from helpers import KINDS, LLAMA3_ROPE, Malicious, copy_base, save_hugging_face, split_for_parallel
from safetensors.torch import load_file, save_file

from adapter import Adapter
from formats.bases import load_llama
from formats.hugging_face import to_hugging_face


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(tiny_base, tmp_path, kind, shard_size):
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, shard_size, **KINDS[kind])
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 2) == (shard_size == "100KB")
    model, _ = load_llama(tmp_path / "hf")
    tokens = torch.randint(1056, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        difference = (model(tokens) - expected).abs().max()
    assert expected.abs().max() > 5
    assert difference < 1e-4
    assert model.config.max_seq_len == 256
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    "changes, context_length",
    [
        (dict(model_type="mistral", sliding_window=100), 100),
        (dict(model_type="mistral", sliding_window=None), 256),
        (dict(sliding_window=100), 256),
        (dict(sliding_window=100, use_sliding_window=True), 100),
    ],
)
def test_sliding_window_limits_the_context_length(tiny_base, tmp_path, changes, context_length):
    """The context ends with the window: up to that length, attention with and without the window is the same."""
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert load_llama(tmp_path / "hf")[0].config.max_seq_len == context_length


def test_config_json_of_earlier_versions_is_read(tiny_base, tmp_path):
    """Before transformers 5, rope_theta and rope_scaling were separate fields. head_dim may be missing."""
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["llama3 rope"])
    new, _ = load_llama(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    values = json.loads(file.read_text())
    scaling = values.pop("rope_parameters")
    values |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    del values["head_dim"]
    file.write_text(json.dumps(values))
    assert load_llama(tmp_path / "hf")[0].config == new.config


@pytest.mark.parametrize("rope_type", ["linear", "llama3"])
def test_rope_scaling_overrides_rope_parameters(tiny_base, tmp_path, rope_type):
    """Users may add rope_scaling to a file that transformers 5 wrote. transformers then uses it, and so do we."""
    transformers = pytest.importorskip("transformers")
    before = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    file = tmp_path / "hf" / "config.json"
    scaling = LLAMA3_ROPE | {"rope_type": rope_type}
    del scaling["rope_theta"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_scaling": scaling}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(100)[None]
    expected = theirs(tokens).logits
    assert (expected - before(tokens).logits).abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(load_llama(tmp_path / "hf")[0](tokens), expected, rtol=1e-4, atol=1e-4)


def test_meta_and_hugging_face_layouts_give_the_same_model(tiny_base, tmp_path):
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    from_hugging_face, _ = load_llama(tmp_path / "hf")
    params = dict(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, multiple_of=32, norm_eps=1e-6, ffn_dim_multiplier=0.5)
    folder = copy_base(tiny_base, tmp_path / "meta", **params)
    for i, shard in enumerate(split_for_parallel(from_hugging_face.state_dict(), 2, False)):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    from_meta, _ = load_llama(folder)
    tokens = torch.arange(50)[None]
    assert torch.equal(from_hugging_face(tokens), from_meta(tokens))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(model_type="bert"),
            "config.json: model_type is 'bert'; only 'llama', 'mistral', 'qwen2', 'qwen3' are supp",
        ),
        (dict(model_type="gemma2"), "'gemma2'; only .* are supported .its embeddings are scaled"),
        (dict(model_type="qwen2_moe"), "'qwen2_moe'; only .* are supported .it is a mixture of experts"),
        (dict(model_type=["llama"]), r"model_type is \['llama'\]"),
        (dict(model_type="qwen2"), "has no weight layers.0.attention.wk.bias"),
        (dict(model_type="mistral", sliding_window="far"), "sliding_window is 'far'"),
        (dict(attention_bias=True), "config.json: attention_bias is true; only false"),
        (dict(hidden_act="gelu"), 'config.json: hidden_act is "gelu"; only "silu"'),
        (dict(quantization_config={"bits": 4}), "config.json: the weights are quantized .*; use the original model"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "config.json: rope_type is 'yarn'"),
        (
            dict(rope_parameters={"rope_type": "dynamic", "factor": 2}),
            "'dynamic'; only 'default', 'linear' and 'llama3'",
        ),
        (
            dict(rope_parameters={"rope_type": "linear", "factor": "2"}),
            "the scaling factor of the rotary embedding is '2'",
        ),
        (dict(partial_rotary_factor=0.5), "config.json: partial_rotary_factor is 0.5; only 1 is supported"),
        (dict(rope_parameters={"rope_type": "llama3"}), "config.json: has no field 'factor'"),
        (
            dict(rope_parameters=LLAMA3_ROPE | {"factor": "8"}),
            "config.json: factor of the rotary embedding is '8'",
        ),
        (
            dict(rope_parameters=LLAMA3_ROPE | {"high_freq_factor": 0.5}),
            "config.json: low_freq_factor is 1.0; it must be smaller than high_freq_factor, 0.5",
        ),
        (dict(hidden_size=None), "config.json: has no field 'hidden_size'"),
        (dict(hidden_size=128), r"has shape \(\d+,.*but the configuration requires"),
        (dict(num_hidden_layers=4), "weights for 3 layers, but the configuration requires 4"),
        (dict(intermediate_size=97), r"w\d.weight has shape \(\d+, \d+\), but the configuration requires"),
        (dict(num_key_value_heads=3), "config.json: n_heads 4 is not a multiple of n_kv_heads 3"),
        (dict(vocab_size=1000), "has 1000 embeddings, but its tokenizer has 1024"),
        (dict(max_position_embeddings="many"), "config.json: max_seq_len is 'many'"),
        (dict(rms_norm_eps=10**400), "config.json: norm_eps is 1"),
        (dict(hidden_size=2**23, head_dim=16, vocab_size=2**23), "tok_embeddings.weight"),
    ],
)
def test_invalid_config_json_is_refused(tiny_base, tmp_path, changes, message):
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    file = tmp_path / "hf" / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        load_llama(tmp_path / "hf")


def test_missing_and_broken_shards_are_named(tiny_base, tmp_path):
    folder = tmp_path / "hf"
    save_hugging_face(folder, tiny_base, "100KB", **KINDS["gqa"])
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()

    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: is listed in .*, but is not a file in this folder"):
        load_llama(folder)
    for broken in (content[:-1], content[:20], b""):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{shard.name}: not a complete safetensors file"):
            load_llama(folder)
    shard.write_bytes(content)
    for text, message in [
        ("{", "not JSON"),
        ("[]", r"contains \[\], not an object"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        (good.replace(shard.name, "../" + shard.name), "is listed in .*, but is not a file in this folder"),
        (good.replace("model.norm.weight", "model.norm.scale"), "lists model.norm.scale in"),
    ]:
        index.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_llama(folder)
    index.unlink()
    with pytest.raises(ValueError, match="contains none of model.safetensors, model.safetensors.index.json, "):
        load_llama(folder)
    with pytest.raises(ValueError, match=f"{shard.name}: this file alone is not a base model; give the folder"):
        load_llama(shard)
    Adapter(layers=1, length=2, dim=16, heads=2).save(folder / "adapter.safetensors")
    with pytest.raises(ValueError, match="adapter.safetensors: is an adapter, not a base; give it to --adapter"):
        load_llama(folder / "adapter.safetensors")


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_model_bin_is_read_without_running_code(tiny_base, tmp_path, shards):
    """Older repositories, such as many of Vicuna's, have only pickles. A file that contains code is refused."""
    folder = tmp_path / "hf"
    save_hugging_face(folder, tiny_base, **KINDS["gqa"])
    expected, _ = load_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        places = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(names)}
        for file in set(places.values()):
            torch.save({name: tensors[name] for name in names if places[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    loaded, _ = load_llama(folder)
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in expected.state_dict().items())
    torch.save({"model.norm.weight": Malicious()}, next(folder.glob("pytorch_model*.bin")))
    with pytest.raises(ValueError, match="not a file of tensors: it is corrupt, or contains code"):
        load_llama(folder)


def test_unexpected_bias_is_named(tiny_base, tmp_path):
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    file = tmp_path / "hf" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="has the weight layers.0.attention.wq.bias, but its configuration"):
        load_llama(tmp_path / "hf")


def test_to_hugging_face_restores_names_and_weights(tiny_base, tmp_path):
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    model, _ = load_llama(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    theirs = load_file(file)
    written = to_hugging_face(model.state_dict(), model.config)
    assert written.keys() == theirs.keys() and all(torch.equal(written[name], theirs[name]) for name in theirs)


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(3, 11)[None])


def test_weight_files_have_the_same_priority_as_in_transformers(tiny_base, tmp_path, capsys):
    """The folder has files from two calls of save_pretrained. A message names the files that are ignored."""
    transformers = pytest.importorskip("transformers")
    save_hugging_face(tmp_path / "old", tiny_base, shard_size="30KB", **KINDS["gqa"])
    save_hugging_face(tmp_path / "new", tiny_base, **KINDS["gqa"])
    new = load_file(tmp_path / "new" / "model.safetensors")
    doubled = {name: 2 * weight for name, weight in new.items()}
    save_file(doubled, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    for file in (tmp_path / "old").glob("model*"):
        shutil.copy(file, tmp_path / "new")
    (tmp_path / "new" / "pytorch_model.bin.index.json").write_text("{}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    expected = theirs(torch.arange(3, 11)[None]).logits
    capsys.readouterr()
    model, _ = load_llama(tmp_path / "new")
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    other = "model.safetensors.index.json, pytorch_model.bin.index.json"
    assert f"loading model.safetensors; ignoring {other}" in capsys.readouterr().err
    for file in (tmp_path / "new").glob("model-*"):  # the index then refers to missing files
        file.unlink()
    torch.testing.assert_close(logits_of(load_llama(tmp_path / "new")[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["equal", "other", "absent", "alone"])
def test_tied_output_heads_are_read(tiny_base, tmp_path, capsys, head):
    transformers = pytest.importorskip("transformers")
    save_hugging_face(tmp_path / "l2", tiny_base, **KINDS["tied"])
    file = tmp_path / "l2" / "model.safetensors"
    weights = load_file(file)
    embeddings = weights["model.embed_tokens.weight"]
    if head != "absent":
        weights["lm_head.weight"] = embeddings.flip(0).contiguous() if head == "other" else embeddings.clone()
    if head == "alone":
        del weights["model.embed_tokens.weight"]
    save_file(weights, file, {"format": "pt"})
    model, _ = load_llama(tmp_path / "l2")
    warned = "lm_head.weight differs from the embeddings; using lm_head.weight" in capsys.readouterr().err
    assert warned == (head == "other") and (model.output.weight is model.tok_embeddings.weight) == (head != "other")
    if head == "other":
        torch.testing.assert_close(model.output.weight, embeddings.flip(0))
    else:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "l2")
        expected = theirs(torch.arange(3, 11)[None]).logits
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def test_missing_output_head_is_named_as_in_the_file(tiny_base, tmp_path):
    save_hugging_face(tmp_path / "l2", tiny_base, **KINDS["gqa"])
    weights = load_file(tmp_path / "l2" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "l2" / "model.safetensors")
    with pytest.raises(ValueError, match="l2: has no weight lm_head.weight, and config.json does not tie it"):
        load_llama(tmp_path / "l2")


def test_cloned_mistral_folder_is_read(tiny_base, tmp_path):
    """The files of Mistral's own layout, params.json and consolidated.safetensors, are ignored beside config.json."""
    save_hugging_face(tmp_path / "m", tiny_base, **KINDS["gqa"])
    expected = logits_of(load_llama(tmp_path / "m")[0])
    (tmp_path / "m" / "params.json").write_text('{"dim": 64}')
    shutil.copy(tmp_path / "m" / "model.safetensors", tmp_path / "m" / "consolidated.safetensors")
    assert torch.equal(logits_of(load_llama(tmp_path / "m")[0]), expected)


@pytest.mark.parametrize(
    "rename, message",
    [
        (lambda name: f"module.{name}", r"the weight names begin with 'module.' .module.model.embed_tokens.weight."),
        (lambda name: f"_orig_mod.{name}", "the weight names begin with '_orig_mod.'"),
        (
            lambda name: name.replace("q_proj.weight", "q_proj.qweight"),
            "is quantized with GPTQ or AWQ .contains model.layers.0",
        ),
        (lambda name: name.replace("q_proj.weight", "q_proj.weight.absmax"), "is quantized with bitsandbytes"),
    ],
)
def test_wrapped_and_quantized_checkpoints_are_recognized_by_names(tiny_base, tmp_path, rename, message):
    save_hugging_face(tmp_path / "l2", tiny_base, **KINDS["gqa"])
    weights = load_file(tmp_path / "l2" / "model.safetensors")
    save_file({rename(name): weight for name, weight in weights.items()}, tmp_path / "l2" / "model.safetensors")
    with pytest.raises(ValueError, match=f"l2: {message}"):
        load_llama(tmp_path / "l2")


def test_adapter_is_refused_as_a_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=f"{tmp_path}: is an adapter .LORA., not a base"):
        load_llama(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_git_lfs_pointers_are_refused(tiny_base, tmp_path, name):
    save_hugging_face(tmp_path / "l2", tiny_base, **KINDS["gqa"])
    (tmp_path / "l2" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(ValueError, match=f"{name}: is a Git LFS pointer, not the file; fetch it with `git lfs pull`"):
        load_llama(tmp_path / "l2")


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_missing_embeddings_are_named_as_in_the_file(tiny_base, tmp_path, kind):
    save_hugging_face(tmp_path / "l2", tiny_base, **KINDS[kind])
    weights = load_file(tmp_path / "l2" / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "l2" / "model.safetensors")
    with pytest.raises(ValueError, match="l2: has no weight model.embed_tokens.weight"):
        load_llama(tmp_path / "l2")
