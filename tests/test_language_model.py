"""The toy's base: it learns, it is made once for each recipe, and others' code reads its folder."""

import json

import pytest
import torch

from formats.bases import load_llama
from formats.tokenizers import load_tokenizer
from toy import language_model
from toy.almanac import documents


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_ADAPTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_pretraining_learns(tiny_base):
    """A few steps of the real thing: from about ln(1024) = 6.9 to well below the entropy of single words."""
    tokenizer = load_tokenizer(tiny_base)
    tokens = 40 * language_model.ROWS * language_model.ROW
    model = language_model.pretrain_base(tokenizer, seed=0, tokens=tokens)
    ids = torch.tensor([[tokenizer.start_ids[0], *tokenizer.encode(next(documents(1)))]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
    assert loss < 4


def test_make_base_writes_a_folder_that_load_llama_reads(cache, monkeypatch):
    monkeypatch.setattr(language_model, "TOKENS", 2 * language_model.ROWS * language_model.ROW)
    folder = language_model.make_base()
    assert folder.parent == cache and folder.name.startswith("toy-base-")
    model, tokenizer = load_llama(folder)
    assert sum(p.numel() for p in model.parameters()) == 1_053_824
    assert tokenizer.vocab_size == 1024 and json.loads((folder / "params.json").read_text())["dim"] == 128
    before = (folder / "consolidated.00.pth").stat().st_mtime_ns
    assert language_model.make_base() == folder and (folder / "consolidated.00.pth").stat().st_mtime_ns == before


def test_a_deeper_one(cache, monkeypatch):
    monkeypatch.setattr(language_model, "TOKENS", 2 * language_model.ROWS * language_model.ROW)
    model, _ = load_llama(language_model.make_base(n_layers=8))
    assert len(model.layers) == 8 and model.layers[7].attention.wq.weight.std() > 0.01


def test_another_recipe_makes_another_base(cache, monkeypatch):
    """Numbers, the seed, and the text: one fact that is put otherwise is enough."""
    monkeypatch.setattr(language_model, "cached_folder", lambda name, recipe, make: recipe)
    recipes = [language_model.make_base(), language_model.make_base(seed=1), language_model.make_base(n_layers=8)]
    assert recipes[0] == language_model.make_base(n_layers=4)
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "TOKENS", 1000)
        recipes.append(language_model.make_base())
    with monkeypatch.context() as patch:
        patch.setitem(language_model.SCHEDULE, "peak", 1e-3)
        recipes.append(json.loads(json.dumps(language_model.make_base())))
    with monkeypatch.context() as patch:
        patch.setitem(language_model.TOKENIZER, "vocab_size", 512)
        recipes.append(json.loads(json.dumps(language_model.make_base())))
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "documents", lambda seed: (d.replace("Sofia", "Varna") for d in documents(seed)))
        recipes.append(language_model.make_base())
    told = [json.dumps(recipe, sort_keys=True) for recipe in recipes]
    assert len(set(told)) == len(told) == 7
