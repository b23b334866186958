"""Files with bytes changed, cut or inserted: every reader refuses in one line or reads a model of the right shape.

Readers run here in the process itself, where a crash would end the tests; the commands turn just ValueError and OSError
into a line, so any other exception would be a traceback.
"""

import random
import struct

import pytest
import torch
from conftest import copy_base, make_adapter, make_model
from safetensors.torch import save_file

from adapter import Adapter
from checkpoints import load_llama
from data import read_examples
from exchange import load_adapter
from model import Config, LLaMA
from runs import read_metrics

TIMES = 220  # of each of ten kinds of file


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes, near the front as often as anywhere: headers are where the harm is."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        size = max(1, len(content))
        place = rng.randrange(min(size, rng.choice((40, 400, size))))
        change = rng.randrange(6)
        if change == 0:
            content[place : place + 1] = bytes([rng.randrange(256)])
        elif change == 1 and content:
            content[place % size] ^= 1 << rng.randrange(8)
        elif change == 2:
            del content[place : place + rng.choice((1, 8, 100))]
        elif change == 3:
            del content[place:]
        elif change == 4:
            content[place:place] = rng.randbytes(rng.choice((1, 8, 50)))
        else:
            content[place : place + 8] = struct.pack("<q", rng.choice((-1, 0, 1, 2**31, 2**62)))
    return bytes(content)


def hugging_face_folder(tiny_base, folder):
    from test_checkpoints import KINDS, save_hugging_face

    pytest.importorskip("transformers")
    save_hugging_face(folder, tiny_base, **KINDS["gqa"])
    return folder


def llama2c_file(tiny_base, folder):
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((tiny_base / "tokenizer.model").read_bytes())
    w = make_model(Config(16, 1, 2, 2, 8, 24, 1024)).state_dict()
    names = [
        "tok_embeddings",
        "layers.0.attention_norm",
        *(f"layers.0.attention.{n}" for n in ("wq", "wk", "wv", "wo")),
    ]
    names += ["layers.0.ffn_norm", *(f"layers.0.feed_forward.{n}" for n in ("w1", "w2", "w3")), "norm"]
    tensors = [w[f"{name}.weight"] for name in names] + [torch.zeros(2, 32, 4)]
    header = struct.pack("<7i", 16, 24, 1, 2, 2, 1024, 32)
    (folder / "model.bin").write_bytes(header + b"".join(t.numpy().tobytes() for t in tensors))
    return folder


def lit_pth(path):
    tensors = {"transformer.h.1.attn.adapter_wte.weight": torch.ones(5, 32)}
    torch.save(tensors | {"transformer.h.1.attn.gating_factor": torch.ones(1, 4, 1, 1)}, path)


def peft_folder(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "ADAPTION_PROMPT"}')
    place = "base_model.model.model.layers.2.self_attn.adaption_"
    save_file(
        {place + "prompt": torch.ones(1, 5, 32), place + "gate": torch.ones(1)}, folder / "adapter_model.safetensors"
    )


def check_adapter(adapter: Adapter):
    prompts = adapter()
    assert len(prompts) == len(adapter.gates) and all(p.tokens.isfinite().all() for p in prompts)


def check_model(loaded):
    model, _ = loaded
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, model.config.vocab_size)


@pytest.mark.parametrize(
    "kind",
    ["adapter", "lit", "peft", "pth", "params", "tokenizer", "safetensors", "config", "llama2c", "alpaca", "metrics"],
)
def test_changed_files(tiny_base, tmp_path, kind):
    """At least 2,000 files in all."""
    base = tmp_path / "base"
    if kind in ("pth", "params", "tokenizer"):
        copy_base(tiny_base, base)
        path = base / {"pth": "consolidated.00.pth", "params": "params.json", "tokenizer": "tokenizer.model"}[kind]
        if kind == "pth":  # smaller, so that more of the changes matter
            torch.save({n: p for n, p in LLaMA(Config(16, 3, 2, 2, 8, 48, 1024)).state_dict().items()}, path)
    elif kind in ("safetensors", "config"):
        hugging_face_folder(tiny_base, base)
        path = base / {"safetensors": "model.safetensors", "config": "config.json"}[kind]
    elif kind == "llama2c":
        path = llama2c_file(tiny_base, base) / "model.bin"
    elif kind == "adapter":
        make_adapter(make_model()).save(path := tmp_path / "a.safetensors", base_layers=3)
    elif kind == "lit":
        lit_pth(path := tmp_path / "lit.pth")
    elif kind == "peft":
        peft_folder(tmp_path / "peft")
        path = tmp_path / "peft" / "adapter_model.safetensors"
    elif kind == "alpaca":
        path = tmp_path / "a.json"
        path.write_text(
            '[{"instruction": "Añade 1.", "input": "2", "output": "3"}, {"instruction": "a", "output": "b"}]'
        )
    else:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "val_loss": 2.0}\n')

    read = {
        "peft": lambda: check_adapter(load_adapter(path.parent, heads=4)),
        "adapter": lambda: check_adapter(load_adapter(path, heads=4)),
        "lit": lambda: check_adapter(load_adapter(path, heads=4)),
        "alpaca": lambda: read_examples(path),
        "metrics": lambda: read_metrics(path),
    }.get(kind, lambda: check_model(load_llama(base)))
    read()
    whole, rng, refused = path.read_bytes(), random.Random(kind), 0
    for number in range(TIMES):
        changed = mutate(whole, rng)
        path.write_bytes(changed)
        try:
            read()
        except (ValueError, OSError) as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, (number, error)
    assert refused > TIMES / 10
