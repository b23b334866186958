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
from helpers import KINDS, copy_base, make_adapter, make_model, save_hugging_face
from safetensors.torch import load_file, save_file

from adapter import Adapter
from data import read_examples
from formats.adapters import load_adapter
from formats.bases import load_llama
from model import Config
from training.run_files import read_metrics

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


STRANGE = [None, True, 0, -1, 3, 2.5, 10**30, 10**400, float("nan"), float("inf"), "", "x", [], {}, [1], "\ud800"]


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
            inside[key] = rng.choice(STRANGE)
        return json.dumps(values).encode()


def check_adapter(adapter: Adapter):
    prompts = adapter()
    assert len(prompts) == len(adapter.gates) and all(p.tokens.isfinite().all() for p in prompts)


def check_model(loaded):
    """What was read answers, in the shape that the unchanged files have."""
    model, _ = loaded
    assert (model.config.dim, model.config.n_layers) in {(16, 3), (64, 3), (16, 1)}
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, model.config.vocab_size)


# Each makes the files of its kind in an empty folder, and returns the one to change.


def adapter_file(folder, tiny_base):
    make_adapter(make_model()).save(folder / "a.safetensors", base_layers=3)
    return folder / "a.safetensors"


def authors_file(folder, tiny_base):
    tensors = {"adapter_query.weight": torch.ones(10, 32), "layers.0.attention.gate": torch.ones(1, 4, 1, 1)}
    torch.save(tensors, folder / "theirs.pth")
    return folder / "theirs.pth"


def lit_file(folder, tiny_base, **options):
    tensors = {"transformer.h.1.attn.adapter_wte.weight": torch.ones(5, 32)}
    tensors["transformer.h.1.attn.gating_factor"] = torch.ones(1, 4, 1, 1)
    torch.save(tensors, folder / "theirs.pth", **options)
    return folder / "theirs.pth"


def old_pickle(folder, tiny_base):
    return lit_file(folder, tiny_base, _use_new_zipfile_serialization=False)


def peft_tensors(folder, tiny_base):
    (folder / "adapter_config.json").write_text('{"peft_type": "ADAPTION_PROMPT"}')
    place = "base_model.model.model.layers.2.self_attn.adaption_"
    tensors = {place + "prompt": torch.ones(1, 5, 32), place + "gate": torch.ones(1)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder / "adapter_model.safetensors"


def peft_config(folder, tiny_base):
    return peft_tensors(folder, tiny_base).with_name("adapter_config.json")


def meta_weights(folder, tiny_base):
    return copy_base(tiny_base, folder / "base") / "consolidated.00.pth"


def meta_params(folder, tiny_base):
    return copy_base(tiny_base, folder / "base") / "params.json"


def sentencepiece_file(folder, tiny_base):
    return copy_base(tiny_base, folder / "base") / "tokenizer.model"


def tiktoken_file(folder, tiny_base):
    path = sentencepiece_file(folder, tiny_base)
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


def hugging_face_weights(folder, tiny_base):
    save_hugging_face(folder / "base", tiny_base, **KINDS["gqa"])
    return folder / "base" / "model.safetensors"


def hugging_face_config_json(folder, tiny_base):
    return hugging_face_weights(folder, tiny_base).with_name("config.json")


def hugging_face_index(folder, tiny_base):
    weights = hugging_face_weights(folder, tiny_base)
    path = weights.with_name("model.safetensors.index.json")
    path.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(weights), weights.name)}))
    return path


def llama2c_file(folder, tiny_base):
    (folder / "tokenizer.model").write_bytes((tiny_base / "tokenizer.model").read_bytes())
    w = make_model(Config(16, 1, 2, 2, 8, 24, 1024)).state_dict()
    attention = [f"layers.0.attention.{name}" for name in ("wq", "wk", "wv", "wo")]
    mlp = [f"layers.0.feed_forward.{name}" for name in ("w1", "w2", "w3")]
    names = ["tok_embeddings", "layers.0.attention_norm", *attention, "layers.0.ffn_norm", *mlp, "norm"]
    tensors = [w[f"{name}.weight"] for name in names] + [torch.zeros(2, 32, 4)]
    header = struct.pack("<7i", 16, 24, 1, 2, 2, 1024, 32)
    (folder / "model.bin").write_bytes(header + b"".join(t.numpy().tobytes() for t in tensors))
    return folder / "model.bin"


def alpaca_file(folder, tiny_base):
    path = folder / "a.json"
    path.write_text('[{"instruction": "Añade 1.", "input": "2", "output": "3"}, {"instruction": "a", "output": "b"}]')
    return path


def metrics_file(folder, tiny_base):
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "val_loss": 2.0}\n')
    return path


def read_adapter(path):
    check_adapter(load_adapter(path, heads=4))


def read_peft_folder(path):
    check_adapter(load_adapter(path.parent, heads=4))


def read_base_folder(path):
    check_model(load_llama(path.parent))


CASES = [
    (adapter_file, read_adapter),
    (authors_file, read_adapter),
    (lit_file, read_adapter),
    (old_pickle, read_adapter),
    (peft_tensors, read_peft_folder),
    (peft_config, read_peft_folder),
    (meta_weights, read_base_folder),
    (meta_params, read_base_folder),
    (sentencepiece_file, read_base_folder),
    (tiktoken_file, read_base_folder),
    (hugging_face_weights, read_base_folder),
    (hugging_face_config_json, read_base_folder),
    (hugging_face_index, read_base_folder),
    (llama2c_file, read_base_folder),
    (alpaca_file, read_examples),
    (metrics_file, read_metrics),
]


@pytest.mark.parametrize("make, read", CASES, ids=[make.__name__ for make, _ in CASES])
@pytest.mark.filterwarnings("ignore")
def test_changed_files(tiny_base, tmp_path, make, read):
    path = make(tmp_path, tiny_base)
    read(path)
    whole, rng, refused = path.read_bytes(), random.Random(make.__name__), 0
    for number in range(TIMES):
        is_json = path.suffix == ".json" and rng.random() < 0.7
        path.write_bytes((mutate_json if is_json else mutate)(whole, rng))
        try:
            read(path)
        except (ValueError, OSError) as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, (number, error)
    assert refused > TIMES / 10
