"""Loading a base: weights that are missing or unknown, the tokenizer, memory use, and the fingerprint."""

import pytest
import torch
from helpers import KINDS, copy_base, peak_anonymous, save_hugging_face

from formats.bases import base_fingerprint, load_llama, read_base
from model import Config, LLaMA
from runtime.files import hash_tensors


def test_meta_folder_is_loaded(tiny_base):
    model, tokenizer = load_llama(tiny_base)
    weights = torch.load(tiny_base / "consolidated.00.pth", weights_only=True)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config == Config(16, 3, 2, 2, 8, 48, tokenizer.vocab_size)
    assert load_llama(tiny_base, torch.bfloat16)[0].norm.weight.dtype == torch.bfloat16


def test_missing_and_unknown_weights_are_named(tiny_base, tmp_path):
    folder = copy_base(tiny_base, tmp_path / "base")
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save(weights | {"layers.1.attention.wq.bias": torch.zeros(16)}, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="has the weight layers.1.attention.wq.bias, but its configuration"):
        load_llama(folder)
    del weights["norm.weight"]
    torch.save(weights, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="has no weight norm.weight"):
        load_llama(folder)


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(tiny_base, tmp_path):
    folder = copy_base(tiny_base, tmp_path / "base")
    torch.save(LLaMA(Config(16, 3, 2, 2, 8, 48, 1000)).state_dict(), folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="1000 embeddings, but its tokenizer has 1024 tokens"):
        load_llama(folder)


def test_tokenizer_is_found_in_the_original_folder_of_llama_3(tiny_base, tmp_path):
    folder = tmp_path / "hf"
    save_hugging_face(folder, tiny_base, **KINDS["gqa"])
    (folder / "original").mkdir()
    (folder / "tokenizer.model").rename(folder / "original" / "tokenizer.model")
    assert load_llama(folder)[1].vocab_size == 1024


def test_tokenizer_is_found_in_the_parent_of_metas_folder(tiny_base, tmp_path, monkeypatch):
    """download.sh of LLaMA 1 and 2 writes tokenizer.model to the parent folder.

    A tokenizer.model in the base's own folder has priority, even a broken one. Other layouts ignore the parent.
    """
    folder = copy_base(tiny_base, tmp_path / "7B")
    expected = load_llama(folder)[1].encode("The capital of Peru")
    (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert load_llama(folder)[1].encode("The capital of Peru") == expected
    monkeypatch.chdir(folder)
    for path in (".", "../7B"):
        assert load_llama(path)[1].vocab_size == 1024
    (folder / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="7B/tokenizer.model: is neither a SentencePiece model nor"):
        load_llama(folder)
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    (tmp_path / "hf" / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match="hf/tokenizer.model: no such tokenizer file"):
        load_llama(tmp_path / "hf")


def test_missing_base_error_shows_the_download_command():
    with pytest.raises(FileNotFoundError, match="hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf"):
        load_llama("meta-llama/Llama-2-7b-hf")


@pytest.mark.parametrize("layers", [10**6, 2])
def test_layer_count_is_checked_before_the_model_is_built(tiny_base, tmp_path, monkeypatch, layers):
    base = copy_base(tiny_base, tmp_path / "base", n_layers=layers)
    monkeypatch.setattr("formats.bases.LLaMA", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=f"has weights for 3 layers, but the configuration requires {layers}"):
        read_base(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_needs_little_more_memory_than_the_model(forks, tiny_base, large_base, dtype):
    """The peak of anonymous memory is 0.9 to 1.15 times the size of the model."""
    results = forks.SimpleQueue()
    process = forks.Process(target=load_and_measure, args=(tiny_base, large_base, dtype, results))
    process.start()
    size, peak = results.get()
    process.join()
    assert size > 250e6
    assert 0.9 * size < peak < 1.15 * size


def load_and_measure(tiny_base, base, dtype, results):
    load_llama(tiny_base)  # the first load also allocates the libraries' own memory, which must not be counted
    (model, _), peak = peak_anonymous(lambda: load_llama(base, dtype))
    results.put((sum(p.numel() * p.element_size() for p in model.parameters()), peak))


def test_output_head_is_stored_transposed_on_a_cpu(tiny_base, data):
    """The matmul is faster in float32 if the weight is stored as (C, V). A tied head is (V, C), as embeddings are."""
    model, _ = load_llama(tiny_base)
    assert LLaMA(model.config).output.weight.stride() == (model.config.dim, 1)
    assert model.output.weight.stride() == (1, model.config.vocab_size)
    tied, _ = load_llama(data / "stories260K")
    assert tied.output.weight is tied.tok_embeddings.weight and tied.output.weight.is_contiguous()


def test_layers_are_prepared_one_by_one(tiny_base):
    prepared = []

    def prepare(module):
        assert not any(parameter.is_meta for parameter in module.parameters())
        prepared.append(module)

    model, _ = load_llama(tiny_base, prepare_layer=prepare)
    assert prepared == [*model.layers]


def test_fingerprint_depends_on_the_weights_only(tiny_base, tmp_path):
    """The fingerprint is a hash of the first four rows of four weights."""
    copy_base(tiny_base, tmp_path / "other", norm_eps=1e-6)
    model, _ = load_llama(tiny_base)
    hashed = (model.tok_embeddings, model.layers[0].attention.wq, model.layers[-1].feed_forward.w2, model.output)
    expected = hash_tensors([module.weight[:4] for module in hashed])
    assert base_fingerprint(*read_base(tiny_base)) == base_fingerprint(*read_base(tmp_path / "other")) == expected
    for name in (
        "tok_embeddings.weight",
        "layers.0.attention.wq.weight",
        "layers.2.feed_forward.w2.weight",
        "output.weight",
    ):
        weights = torch.load(tiny_base / "consolidated.00.pth", weights_only=True)
        weights[name][3] += 1
        torch.save(weights, tmp_path / "other" / "consolidated.00.pth")
        assert base_fingerprint(*read_base(tmp_path / "other")) != expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(tiny_base, tmp_path, value):
    copy_base(tiny_base, tmp_path / "base")
    file = tmp_path / "base" / "consolidated.00.pth"
    weights = torch.load(file, weights_only=True)
    weights["layers.1.attention.wk.weight"][3, 2] = value
    torch.save(weights, file)
    with pytest.raises(ValueError, match="layers.1.attention.wk.weight contains values that are not finite"):
        load_llama(tmp_path / "base")
