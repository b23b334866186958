"""Files with bytes changed, cut or inserted: every reader refuses in one line or reads a model of the right shape.

Readers run here in the process itself, where a crash would end the tests; the commands turn just ValueError and OSError
into a line, so any other exception would be a traceback.
"""

import base64
import json
import random
import struct

import pytest
import torch
from helpers import copy_base, make_adapter, make_model
from safetensors.torch import load_file, save_file

from adapter import Adapter
from convert import load_adapter
from data import read_examples
from formats.bases import load_llama
from model import Config
from training.runs import read_metrics

TIMES = 150  # of each kind of file: over 2,000 in all


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


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Still JSON, with a value of another kind or size somewhere, or a field less."""
    values = json.loads(content)
    inside = values
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        if not keys:
            return json.dumps(values).encode()
        key = rng.choice(keys)
        if isinstance(inside[key], (dict, list)) and rng.random() < 0.8:
            inside = inside[key]
            continue
        if rng.random() < 0.2:
            del inside[key]
        else:
            strange = [
                None,
                True,
                0,
                -1,
                3,
                2.5,
                10**30,
                10**400,
                float("nan"),
                float("inf"),
                "",
                "x",
                [],
                {},
                [1],
                "\ud800",
            ]
            inside[key] = rng.choice(strange)
        return json.dumps(values).encode()


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
    """What was read answers, in the shape that the unchanged files have."""
    model, _ = loaded
    assert (model.config.dim, model.config.n_layers) in {(16, 3), (64, 3), (16, 1)}
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, model.config.vocab_size)


ADAPTERS = ["adapter", "authors", "lit", "old pickle", "peft", "peft config"]
BASES = ["pth", "params", "tokenizer", "tiktoken", "safetensors", "config", "index", "llama2c"]


@pytest.mark.parametrize("kind", [*ADAPTERS, *BASES, "alpaca", "metrics"])
@pytest.mark.filterwarnings("ignore")
def test_changed_files(tiny_base, tmp_path, kind):
    base = tmp_path / "base"
    if kind in ("pth", "params", "tokenizer", "tiktoken"):
        copy_base(tiny_base, base)
        path = base / {"pth": "consolidated.00.pth", "params": "params.json"}.get(kind, "tokenizer.model")
        if kind == "tiktoken":
            tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
            path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    elif kind in ("safetensors", "config", "index"):
        hugging_face_folder(tiny_base, base)
        path = base / {"safetensors": "model.safetensors", "config": "config.json"}.get(
            kind, "model.safetensors.index.json"
        )
        if kind == "index":
            names = load_file(base / "model.safetensors")
            path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    elif kind == "llama2c":
        path = llama2c_file(tiny_base, base) / "model.bin"
    elif kind == "adapter":
        make_adapter(make_model()).save(path := tmp_path / "a.safetensors", base_layers=3)
    elif kind in ("authors", "lit", "old pickle"):
        path = tmp_path / "theirs.pth"
        tensors = {"transformer.h.1.attn.adapter_wte.weight": torch.ones(5, 32)}
        tensors["transformer.h.1.attn.gating_factor"] = torch.ones(1, 4, 1, 1)
        if kind == "authors":
            tensors = {"adapter_query.weight": torch.ones(10, 32), "layers.0.attention.gate": torch.ones(1, 4, 1, 1)}
        torch.save(tensors, path, _use_new_zipfile_serialization=kind != "old pickle")
    elif kind.startswith("peft"):
        peft_folder(tmp_path / "peft")
        path = tmp_path / "peft" / ("adapter_config.json" if kind == "peft config" else "adapter_model.safetensors")
    elif kind == "alpaca":
        path = tmp_path / "a.json"
        path.write_text(
            '[{"instruction": "Añade 1.", "input": "2", "output": "3"}, {"instruction": "a", "output": "b"}]'
        )
    else:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "val_loss": 2.0}\n')

    def read():
        if kind in ADAPTERS:
            check_adapter(load_adapter(path.parent if kind.startswith("peft") else path, heads=4))
        elif kind in BASES:
            check_model(load_llama(base))
        else:
            {"alpaca": read_examples, "metrics": read_metrics}[kind](path)

    read()
    whole, rng, refused = path.read_bytes(), random.Random(kind), 0
    for number in range(TIMES):
        is_json = kind in ("params", "config", "index", "alpaca", "peft config") and rng.random() < 0.7
        path.write_bytes((mutate_json if is_json else mutate)(whole, rng))
        try:
            read()
        except (ValueError, OSError) as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, (number, error)
    assert refused > TIMES / 10
