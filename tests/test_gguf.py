"""GGUF files: logits equal those of transformers, tokenizers equal their originals, and broken files are refused."""

import json
import struct
from itertools import islice

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import KINDS, SAMPLES, run, save_hugging_face
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import generate
from data import read_examples
from formats.bases import load_llama, read_base
from formats.chat_templates import load_template
from formats.gguf import StoredWeight, read_header
from formats.tokenizers import SentencePieceTokenizer, TiktokenTokenizer, load_tokenizer
from runtime.quantization import QuantizedLinear
from sentencepiece import SentencePieceProcessor

gguf = pytest.importorskip("gguf")
F32, F16, BF16, Q8_0, Q4_0, Q4_1 = (
    getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
)
MODULES = {  # Hugging Face's names to GGUF's
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down", "mlp.up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
}  # fmt: skip


def interleaved(weight, heads):
    """Reorder the rows of wq or wk as llama.cpp does for LLaMA: the two halves of each head alternate."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def save_gguf(path, theirs, architecture="llama", kind=F32, tokenizer=None, change=lambda writer: None, **options):
    """Write a transformers model and a tokenizer to a GGUF file, with ggml-org's writer. Return the path.

    `kind` is the format of the matrices; vectors are float32. `tokenizer` and `change` are functions that add fields or
    tensors to the writer; the default tokenizer is byte-level. `options` are those of the writer.
    """
    config = theirs.config
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    (tokenizer or add_byte_tokenizer)(writer)
    change(writer)
    for name, weight in theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = weight.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads and architecture == "llama":
            weight = interleaved(weight, heads)
        for module, gguf_name in MODULES.items():
            name = name.replace(module, gguf_name)
        name = name.replace("model.layers.", "blk.")
        tensor_kind = F32 if weight.ndim == 1 else kind
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(weight), tensor_kind), raw_dtype=tensor_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_tokenizer(writer):
    """Add a tokenizer of all bytes, three special tokens and one merge."""
    tokens = ["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    add_byte_level(writer, tokens, ["t h"], [3, 3, 3, *[1] * 257], "gpt-2")


def add_byte_level(writer, tokens, merges, kinds, pre, bos=0, eos=1):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)


TOKENS = torch.arange(3, 40)[None]


CASES = [(name, kind) for name in ("gqa", "tied", "wide heads", "qwen2", "qwen3") for kind in (F32, Q8_0)] + [
    ("qwen2", Q4_1)
]


@pytest.mark.parametrize("name, kind", [*CASES, ("gqa", F16), ("gqa", BF16), ("gqa", Q4_0), ("gqa", Q4_1)])
def test_logits_equal_transformers(tiny_base, tmp_path, name, kind):
    """Compare with transformers on the same file. For float32, compare with the model that was written to the file.

    For models whose head dimension differs from C / H, compare with that model after its weights were quantized.
    """
    transformers = pytest.importorskip("transformers")
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS[name])
    architecture = name if name.startswith("qwen") else "llama"
    path = save_gguf(tmp_path / "model.gguf", theirs, architecture, kind)
    model, tokenizer = load_llama(path)
    assert model.config.max_seq_len == 256 and tokenizer.vocab_size == 260
    if name in ("wide heads", "qwen3"):  # transformers ignores the head dimension of a GGUF file
        for weight in theirs.parameters():
            if weight.dim() == 2:
                weight.data = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.data.numpy(), kind), kind))
    elif kind != F32:
        options = {"gguf_file": "model.gguf", "quantization_config": transformers.GgufConfig(dequantize=True)}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    with_blocks, _ = load_llama(path, keep_blocks=True)
    in_blocks = [type(layer) is QuantizedLinear for layer in with_blocks.layers[1].feed_forward.children()]
    assert in_blocks == 3 * [kind in (Q8_0, Q4_0, Q4_1)] and type(with_blocks.output) is torch.nn.Linear
    with torch.no_grad():
        for loaded in (model, with_blocks):
            torch.testing.assert_close(loaded(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert (model.output.weight is model.tok_embeddings.weight) == KINDS[name].get("tie_word_embeddings", False)


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q6_K", "IQ4_NL"])
def test_block_formats_of_llama_cpp_are_dequantized(tiny_base, tmp_path, kind):
    """The blocks are random bytes. Each row of blocks is a row of the weight."""
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    kind = gguf.GGMLQuantizationType[kind]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 60, (12, 256 // per_block * block_bytes), dtype=np.uint8)
    path = save_gguf(tmp_path / "a.gguf", theirs, change=lambda w: w.add_tensor("extra", rows, raw_dtype=kind))
    from formats.gguf import read_tensor

    found = read_tensor(read_header(path).tensors["extra"])
    assert found.shape == (12, 256)
    torch.testing.assert_close(found[7], torch.from_numpy(gguf.dequantize(rows[7:8], kind)[0]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama3 rope", "linear rope"])
def test_scaled_rotary_embeddings_equal_transformers(tiny_base, tmp_path, name):
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS[name])

    def scale(writer):
        if name == "linear rope":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(4.0)
        else:
            factors = 1e4 ** (-torch.arange(0, 16, 2) / 16) / theirs.model.rotary_emb.inv_freq
            factors *= (5e5 / 1e4) ** (-torch.arange(0, 16, 2) / 16)
            writer.add_tensor("rope_freqs.weight", factors.float().numpy())

    model, _ = load_llama(save_gguf(tmp_path / "model.gguf", theirs, change=scale))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_split_model_is_read_from_any_part(tiny_base, tmp_path):
    """The path is that of the first part, of a later part, or of the folder."""
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    (tmp_path / "parts").mkdir()
    save_gguf(tmp_path / "parts" / "model.gguf", theirs, split_max_tensors=10)
    files = sorted((tmp_path / "parts").iterdir())
    assert len(files) == 3
    with torch.no_grad():
        for path in (files[0], files[2], tmp_path / "parts"):
            torch.testing.assert_close(load_llama(path)[0](TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.gguf"):
        load_llama(files[0])
    files[0].unlink()
    with pytest.raises(FileNotFoundError, match="model-00001-of-00003.gguf"):
        load_llama(tmp_path / "parts")


def test_merged_model_is_read(tiny_base, tmp_path):
    """llama-gguf-split --merge writes a file whose number of parts is 0."""
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    path = save_gguf(tmp_path / "merged.gguf", theirs, change=lambda writer: writer.add_uint16("split.count", 0))
    assert load_llama(path)[0].config.dim == 64


def test_file_without_suffix_is_read_and_ambiguous_folder_is_refused(tiny_base, tmp_path):
    """Ollama names its files by a hash, without a suffix."""
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    (tmp_path / "blobs").mkdir()
    path = save_gguf(tmp_path / "blobs" / "sha256-0123", theirs)
    assert load_llama(path)[0].config.dim == 64
    for name in ("a", "b"):
        save_gguf(tmp_path / "blobs" / f"{name}.gguf", theirs)
    with pytest.raises(ValueError, match="contains 2 GGUF models .a.gguf ....; give the path of one of the files"):
        load_llama(tmp_path / "blobs")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(architecture="gemma2"), "general.architecture is 'gemma2'; only 'llama', 'qwen2' and 'qwen3'"),
        (dict(change=lambda w: w.add_type("adapter")), "general.type is 'adapter'; expected 'model'"),
        (dict(change=lambda w: w.add_type("mmproj")), "general.type is 'mmproj'; expected 'model'"),
        (
            dict(change=lambda w: w.add_expert_count(8)),
            "llama.expert_count is 8; a mixture of experts is not supported",
        ),
        (dict(change=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)), "rope.scaling.type is 'yarn'"),
        (
            dict(change=lambda w: w.add_rope_dimension_count(8)),
            "rope.dimension_count is 8; only the head dimension, 16, is",
        ),
        (dict(tokenizer=lambda w: add_byte_level(w, ["a"], [], [1], "grok")), "tokenizer.ggml.pre is 'grok'; only"),
        (
            dict(tokenizer=lambda w: add_byte_level(w, ["a"], ["a a"], [1, 1], "gpt-2")),
            "has 1 tokens, 2 token types; expected",
        ),
        (dict(tokenizer=lambda w: add_byte_level(w, ["a"], ["a b"], [1], "gpt-2")), "cannot be read as a tokenizer"),
        (dict(tokenizer=lambda w: w.add_tokenizer_model("gpt2")), "has no field 'tokenizer.ggml.tokens'"),
        (dict(tokenizer=lambda w: add_byte_level(w, ["a"], [], [1], "gpt-2")), "has no field 'tokenizer.ggml.merges'"),
        (
            dict(tokenizer=lambda w: add_byte_level(w, ["a", "b", "ab"], ["a b"], [1] * 3, "gpt-2", 9, 9)),
            "tokenizer.ggml.eos_token_id is 9; expected an id from 0 to 2",
        ),
    ],
)
def test_unsupported_fields_are_named(tiny_base, tmp_path, change, message):
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    path = save_gguf(tmp_path / "model.gguf", theirs, **change)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        load_llama(path)


def test_missing_gguf_package_is_reported(tiny_base, tmp_path, monkeypatch):
    path = save_gguf(tmp_path / "m.gguf", save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"]))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match="m.gguf: reading GGUF needs one more package: pip install gguf"):
        read_base(path)


def test_truncated_and_malicious_files_are_refused(tiny_base, tmp_path):
    """Truncated files and unknown versions are refused.

    A file with a huge number in its header is read, or refused with an error that names it and is shorter than
    2,000 characters.
    """
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    path = save_gguf(tmp_path / "model.gguf", theirs)
    content = path.read_bytes()
    header = min(place.offset for place in read_header(path).tensors.values())
    bad = tmp_path / "bad.gguf"
    for length in (4, 23, 24, 100, header // 2, header - 1, header + 100, len(content) - 1):
        bad.write_bytes(content[:length])
        with pytest.raises(ValueError, match="bad.gguf"):
            load_llama(bad)
    huge = struct.pack("<Q", 2**62)
    random = np.random.default_rng(0)
    for place in (8, 16, 24, *random.integers(24, header - 8, 60).tolist()):
        bad.write_bytes(content[:place] + huge + content[place + 8 :])
        try:
            load_llama(bad)
        except (ValueError, OSError) as error:
            assert "bad.gguf" in str(error) and len(str(error)) < 2000
    for version, message in ((1, "GGUF version 1"), (3 << 24, "GGUF version 50331648")):
        bad.write_bytes(content[:4] + struct.pack("<I", version) + content[8:])
        with pytest.raises(ValueError, match=message):
            read_header(bad)


# ---------------------------------------------------------------------------------------------------
# Tokenizers

SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def texts(data):
    examples = read_examples(data / "instructions" / "alpaca_data.json.xz")[::200]
    return [*SAMPLES, "\n\n1", "12345\r\n\r\n 6 ", *(example.output for example in examples if example.output)]


def tokenizer_from_gguf(tmp_path, tiny_base, tokenizer):
    model = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    return load_tokenizer(save_gguf(tmp_path / "model.gguf", model, tokenizer=tokenizer))


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_tokenizer_survives_a_round_trip(data, tiny_base, tmp_path, pre):
    """A tokenizer with this pre-tokenizer is trained, written to GGUF, and read; the ids stay the same."""
    original = Tokenizer(models.BPE())
    original.pre_tokenizer = SPLITS[pre]
    original.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    original.train_from_iterator(
        texts(data),
        trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    values = json.loads(original.to_str())["model"]
    tokens = sorted(values["vocab"], key=values["vocab"].get)
    kinds = [3, 3, *[1] * (len(tokens) - 2)]
    merges = [" ".join(merge) for merge in values["merges"]]
    loaded = tokenizer_from_gguf(tmp_path, tiny_base, lambda w: add_byte_level(w, tokens, merges, kinds, pre))
    assert (loaded.start_ids, loaded.eos_id, loaded.special_ids) == ([], 1, {"<|begin|>": 0, "<|end|>": 1})
    for text in texts(data):
        ids = loaded.encode(text)
        assert ids == original.encode(text, add_special_tokens=False).ids, text
        assert loaded.decode([0, *ids, 1]) == text
    assert not {0, 1} & set(loaded.encode("<|end|> of <|begin|>"))


def test_llama3_tokenizer_equals_tiktoken(data, tiny_base, tmp_path):
    """The merges in the file were derived from Meta's file by transformers. The ids equal those of Meta's tokenizer."""
    converter = pytest.importorskip("transformers.convert_slow_tokenizer")
    original = tmp_path / "tokenizer.model"  # with its first 12,000 tokens only
    with open(data / "tokenizers" / "llama3_tokenizer.model", "rb") as file:
        original.write_bytes(b"".join(islice(file, 12000)))
    converted = converter.TikTokenConverter(str(original), pattern=TiktokenTokenizer.PATTERN, extra_special_tokens=[])
    vocabulary, merges = converted.extract_vocab_merges_from_model(str(original))
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokens = [*sorted(vocabulary, key=vocabulary.get), *special]
    kinds = [1] * len(vocabulary) + [3] * 3
    merges = [" ".join(merge) for merge in merges]

    def add(writer):
        add_byte_level(writer, tokens, merges, kinds, "llama-bpe", 12000, 12001)
        writer.add_eot_token_id(12002)

    loaded = tokenizer_from_gguf(tmp_path, tiny_base, add)
    assert (loaded.start_ids, loaded.end_ids) == ([12000], [12001, 12002])
    expected = TiktokenTokenizer(original)
    for text in texts(data):
        assert loaded.encode(text) == expected.encode(text), text


@pytest.mark.parametrize("name", ["llama2", "stories"])
def test_sentencepiece_tokenizer_in_gguf_equals_the_original(data, tiny_base, tmp_path, name):
    path = {
        "llama2": data / "tokenizers" / "llama2_tokenizer.model",
        "stories": data / "stories260K" / "tokenizer.model",
    }
    original = SentencePieceProcessor(model_file=str(path[name]))
    ids = range(original.vocab_size())
    kinds = [
        2 if original.is_unknown(i) else 3 if original.is_control(i) else 6 if original.is_byte(i) else 1 for i in ids
    ]

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([original.id_to_piece(id) for id in ids])
        writer.add_token_scores([original.get_score(id) for id in ids])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    loaded = tokenizer_from_gguf(tmp_path, tiny_base, add)
    assert (loaded.start_ids, loaded.end_ids, loaded.vocab_size) == ([1], [2], original.vocab_size())
    expected = SentencePieceTokenizer(path[name])
    for text in texts(data):
        ids = loaded.encode(text)
        assert ids == expected.encode(text), text
        assert loaded.decode([1, *ids, 2]) == text


# ---------------------------------------------------------------------------------------------------
# A real model


@pytest.fixture
def smollm(data):
    path = data / "models" / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


def test_smollm_responses_equal_transformers(smollm):
    """Greedy decoding in float32 with the model's own chat template writes the same first 16 tokens."""
    model, tokenizer = load_llama(smollm)
    template = load_template("auto", tokenizer)
    assert (tokenizer.start_ids, template.end_ids, len(model.layers)) == ([], [2], 30)
    expected = json.loads((smollm.parent / "expected.json").read_text())
    rows = [template.encode_prompt(prompt) for prompt in expected]
    assert rows == [each["prompt_ids"] for each in expected.values()]
    assert generate.generate(model, rows, max_new_tokens=16) == [each["new_ids"][:16] for each in expected.values()]
    with torch.no_grad():
        logits = model(torch.tensor(rows[:1]))[0, -1]
    for id, value in next(iter(expected.values()))["first_logits"].items():
        assert logits[int(id)].item() == pytest.approx(value, abs=1e-3)


def test_train_and_generate_accept_a_gguf_file(tiny_base, instructions, tmp_path):
    """train.py and generate.py use the file and the chat template in it."""
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    path = save_gguf(tmp_path / "m.gguf", theirs, kind=Q8_0, change=lambda writer: writer.add_chat_template(source))
    options = ("--base", path, "--data", instructions, "--template", "auto", "--epochs", 1, "--warmup-epochs", 0)
    result = run(*options, "--limit", 8, "--val-size", 0, "--device", "cpu", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    args = ["--adapter", str(tmp_path / "run"), "--device", "cpu", "--greedy", "--max-new-tokens", "3", "Hi"]
    result = CliRunner().invoke(generate.main, args)
    assert result.exit_code == 0 and "warning" not in result.stderr, result.output


def test_norms_are_dequantized_and_empty_tensors_refused(tiny_base, tmp_path):
    """A vector is dequantized, whatever its format in the file. A tensor without elements is refused."""
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    path = save_gguf(tmp_path / "a.gguf", theirs, kind=Q8_0)
    place = read_header(path).tensors["blk.0.ffn_gate.weight"]
    assert StoredWeight(place._replace(shape=(32,)), None).quantized(torch.Size([32])) is None
    with pytest.raises(ValueError, match="do not consist of Q8_0 blocks"):
        StoredWeight(place._replace(shape=(0, 32)), None).quantized(torch.Size([0, 32]))
