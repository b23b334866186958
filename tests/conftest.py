"""Fixtures: devices, the real data if available, tiny base models, and instructions to train them on."""

import json
import multiprocessing
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with two threads each would compete for the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # tests download nothing: Hub names are looked up in the local cache only

import pytest
import torch
from helpers import CHATML, DATA, KINDS, ROOT, copy_base, make_adapter, save_chatml, save_hugging_face
from helpers import save_roberta, split_for_parallel

from formats.bases import base_fingerprint, load_llama, read_base
from formats.tokenizers import load_tokenizer
from model import Config, LLaMA
from toy.language_model import BASE


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


@pytest.fixture
def data():
    """Folder with the real data. Tests that use it are skipped if it does not exist."""
    if not DATA.is_dir():
        pytest.skip(f"needs the real data: {DATA} is not a folder; set LLAMA_ADAPTER_DATA to the folder with the data")
    return DATA


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Give the experiments a temporary cache folder, so that tests leave no files in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.cached.CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a base in Meta's layout: the toy's tokenizer and a random model with 3 layers, width 16 and 2 heads."""
    folder = tmp_path_factory.mktemp("tiny-base")
    (folder / "tokenizer.model").write_bytes((BASE / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(folder)
    params = dict(dim=16, n_layers=3, n_heads=2, multiple_of=8, norm_eps=1e-5, vocab_size=-1)
    (folder / "params.json").write_text(json.dumps(params))
    torch.manual_seed(0)
    model = LLaMA(Config(16, 3, 2, 2, 8, 48, tokenizer.vocab_size))
    torch.save(model.state_dict(), folder / "consolidated.00.pth")
    return folder


@pytest.fixture(scope="module")
def small_digits(tmp_path_factory):
    """Folder with the toy's images of digits. Of these, 30 are held out, and an adapter is trained on 20 others."""
    pytest.importorskip("sklearn")
    from toy import digits

    folder = tmp_path_factory.mktemp("digits")
    digits.write_pictures(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "TRAINED_ON", 20)
        patch.setattr(digits, "HELD_OUT", 30)
        yield folder


@pytest.fixture(scope="session")
def forks():
    """A forkserver context. Its server has done the slow imports, so that each process starts with them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers", "train", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{ROOT}")
        context.Process(target=time.time).start()  # starts the server, which inherits PYTHONPATH
    return context


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    """Path of a JSON file with forty instructions of different lengths, with and without an input."""
    records = [
        {
            "instruction": f"Name the number {i}.",
            "input": "of animals" * (i % 3),
            "output": "cat " * (1 + i % 7) + str(i),
        }
        for i in range(40)
    ]
    path = tmp_path_factory.mktemp("data") / "forty.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def args(tiny_base, instructions, tmp_path):
    """Arguments of train.py for 3 epochs of 5 steps. One step of each epoch has 4 examples; the others have 8."""
    return [
        "--base", tiny_base, "--data", instructions, "--out", tmp_path / "run", "--epochs", 3, "--batch-size", 8,
        "--val-size", 4, "--length", 3, "--lr", 0.05, "--warmup-epochs", 0.5, "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """Folder of a small byte-level BPE in RoBERTa's layout (vocab.json, merges.txt), with all bytes and five merges."""
    folder = tmp_path_factory.mktemp("bpe")
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["Ġ t", "h e", "Ġt he", "k m", "Ġ km"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(m.replace(" ", "") for m in merges), *letters, "<mask>"]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder


@pytest.fixture
def roberta(tmp_path, bpe):
    return save_roberta(tmp_path / "roberta", bpe)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base, tmp_path_factory):
    """Path of an adapter file for `tiny_base`: L = 2, K = 5, all gates 2.0 before tanh, Alpaca's template."""
    model, _ = load_llama(tiny_base)
    adapter = make_adapter(model)
    torch.nn.init.constant_(adapter.gates, 2.0)
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    adapter.save(
        path,
        base=tiny_base,
        base_layers=3,
        base_fingerprint=base_fingerprint(*read_base(tiny_base)),
        prompt_template="alpaca",
    )
    return path


@pytest.fixture(scope="session")
def chat_base(tiny_base, tmp_path_factory):
    """Folder of a random LLaMA in Hugging Face's layout: a context of 1,024 tokens, tokenizer.json, chat template."""
    folder = tmp_path_factory.mktemp("chat-base")
    save_hugging_face(folder, tiny_base, **KINDS["gqa"])
    (folder / "tokenizer.model").unlink()
    values = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(values))
    save_chatml(folder, template=CHATML)
    return folder


@pytest.fixture(scope="session")
def large_base(tiny_base, tmp_path_factory):
    """Folder of a base with 10 layers of width 1024: 260 MB in bfloat16, in two files of Meta's layout."""
    folder = copy_base(
        tiny_base, tmp_path_factory.mktemp("large") / "base", dim=1024, n_layers=10, n_heads=8, multiple_of=256
    )
    weights = LLaMA(Config(1024, 10, 8, 8, 128, 2816, 1024)).bfloat16().state_dict()
    for i, shard in enumerate(split_for_parallel(weights, 2, False)):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    return folder
