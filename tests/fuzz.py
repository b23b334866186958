"""Fuzzer for the kinds of files in KINDS: a broken file must be refused in one line, or read.

    python tests/fuzz.py --seed 1 --cases 3000 --cli 150

A traceback, a hang, a killed process, and an empty or unprintable message are failures. Most mutations keep the
structure of a file: they change a value in JSON, a tensor, a line of text, or a few bytes. A case depends only on the
seed, its number and --kind, so `--seed 1 --only 17` repeats case 17 of a run without --kind. Cases run in a separate
process, limited to MEMORY bytes and to SECONDS per case. With --cli, whole commands run as well, each in its own
process for at most 120 seconds; --only and --kind do not apply to them.
"""

import base64
import gzip
import json
import lzma
import multiprocessing
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import click  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import make_adapter, make_model, make_roberta, make_vit, openai_state_dict, save_coco, save_problems  # noqa: E402
from helpers import save_video, make_picture, split_for_parallel, timm_state_dict  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

MEMORY, SECONDS = 8 * 2**30, 30

# ---------------------------------------------------------------------------------------------------
# Mutations

STRANGE = [
    None,
    True,
    0,
    -1,
    3,
    2.5,
    1e308,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "é\x1b[31m",
    "9" * 5000,
]
STRANGE += [[], {}, [1], [[]], "\ud800", "../../etc/passwd", 2**31, 2**63, -(2**63), [None] * 3, {"a": {"b": 1}}]


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Apply one to four changes, preferably near the front, because errors in headers do the most harm."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        size = max(1, len(content))
        place = rng.randrange(min(size, rng.choice((40, 400, size))))
        change = rng.randrange(7)
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
        elif change == 5:
            content[place:place] = content[place : place + rng.choice((8, 100))]  # repeats some bytes
        else:
            content[place : place + 8] = struct.pack("<q", rng.choice((-1, 0, 1, 2**31, 2**62)))
    return bytes(content)


def mutate_value(values, rng: random.Random):
    """Change, delete or rename one entry of a parsed JSON list or object, in place, and return `values`.

    If the random descent ends in an empty list or object, return a single value of STRANGE instead.
    """
    inside = values
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        if not keys:
            return rng.choice(STRANGE)
        key = rng.choice(keys)
        if isinstance(inside[key], dict | list) and rng.random() < 0.8:
            inside = inside[key]
            continue
        if rng.random() < 0.15:
            del inside[key]
        elif rng.random() < 0.15 and isinstance(inside, dict):
            inside[rng.choice(["", "instruction", "image", "layers.0", key + "x"])] = inside.pop(key)
        elif isinstance(inside[key], int | float) and rng.random() < 0.3:
            inside[key] = inside[key] * rng.choice((-1, 0, 2, 1000, 1e-9))
        else:
            inside[key] = rng.choice(STRANGE)
        return values


def mutate_tensors(tensors: dict, rng: random.Random) -> dict:
    """Return a copy in which one tensor has a different shape, dtype, name or values, or is missing.

    The tensor may also be copied to a new name, or swapped with another tensor. An entry that is not a tensor is
    replaced with a value of STRANGE.
    """
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    if not isinstance(t, torch.Tensor):
        return tensors | {name: rng.choice(STRANGE[:8])}
    flat = t.flatten()
    ways = [
        lambda: t.to(
            rng.choice([torch.float64, torch.float16, torch.int8, torch.bool, torch.int64, torch.float8_e5m2])
        ),
        lambda: flat,
        lambda: t[None],
        lambda: t.T.contiguous() if t.dim() == 2 else flat[:0],
        lambda: flat[0].clone() if len(flat) else t,
        lambda: torch.zeros(0),
        lambda: torch.cat([t, t]) if t.dim() else t,
        lambda: t[..., : max(1, t.shape[-1] // 2)].contiguous() if t.dim() else t,
        lambda: torch.full_like(t.float(), rng.choice([float("nan"), float("inf"), 1e38, -1e38, 0.0])),
        lambda: torch.ones(rng.choice([(1,), (1, 1), (3, 5), (2, 2, 2), (1, 0)])),
    ]
    change = rng.randrange(len(ways) + 4)
    if change < len(ways):
        return tensors | {name: ways[change]()}
    rest = {key: value for key, value in tensors.items() if key != name}
    if change == len(ways):
        return rest
    if change == len(ways) + 1:
        return rest | {name.replace("0", "7", 1) if "0" in name else name + ".x": t}
    if change == len(ways) + 2:
        return tensors | {
            rng.choice(["x", "layers.0.lora", "norm.bias", "head.0.weight", "layers.999999.w1.weight"]): t
        }
    other = rng.choice(sorted(tensors))
    return tensors | {name: tensors[other], other: t}


def mutate_pickled(tensors: dict, rng: random.Random) -> dict:
    """Return a copy with one entry changed, possibly to something that only a pickle can contain.

    Examples are an expanded tensor, a sparse tensor and a list of tensors.
    """
    if rng.random() < 0.7:
        return mutate_tensors(tensors, rng)
    name = rng.choice(sorted(tensors))
    strange = [
        torch.zeros(1).expand(rng.choice([10**9, 10**12]), 4),
        torch.zeros(1).expand(1, *getattr(tensors[name], "shape", (3,)))[0],
        torch.zeros(3, 3).to_sparse(),
        torch.empty(3, 3, device="meta"),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        [torch.ones(2)] * 3,
        {"a": torch.ones(2)},
        torch.complex(torch.ones(2), torch.ones(2)),
    ]
    return tensors | {name: rng.choice(strange)}


def replace_file(path: Path, rng: random.Random) -> None:
    """Delete the file, and possibly replace it.

    The replacement is a folder, an empty file, a pipe, a link to a device or to itself, or 4 GiB of zeros.
    """
    path.unlink()
    ways = [lambda: None, path.mkdir, path.touch, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")]
    ways += [lambda: path.symlink_to(path), lambda: (path.touch(), os.truncate(path, 2**32))]
    rng.choice(ways)()


# ---------------------------------------------------------------------------------------------------
# Kinds of files: each is created in an empty folder, one of its files is mutated, and the result is read


def mutate_json(path: Path, rng: random.Random) -> None:
    opener = {".gz": gzip, ".xz": lzma}.get(path.suffix)
    content = path.read_bytes() if opener is None else opener.decompress(path.read_bytes())
    if rng.random() < 0.75:
        if path.name.endswith(("jsonl", "jsonl.gz")):
            lines = [json.loads(line) for line in content.decode().splitlines()]
            content = "\n".join(json.dumps(line) for line in mutate_records(lines, rng)).encode()
        else:
            content = json.dumps(mutate_value(json.loads(content), rng)).encode()
    else:
        content = mutate_bytes(content, rng)
    path.write_bytes(content if opener is None else opener.compress(content))


def mutate_records(lines, rng):
    lines = mutate_value(lines, rng)
    return lines if isinstance(lines, list) else [lines]


def mutate_safetensors(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.25:
        return path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if metadata and rng.random() < 0.4:
        key = rng.choice(sorted(metadata))
        metadata = metadata | {
            key: rng.choice(
                [s for s in STRANGE if isinstance(s, str) and s.isprintable()] + ["0", "-3", "nan", "[1]", "{}", "²"]
            )
        }
    else:
        tensors = {name: tensor.clone().contiguous() for name, tensor in mutate_tensors(tensors, rng).items()}
    save_file(tensors, path, metadata)


def mutate_pth(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.25:
        return path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    values = torch.load(path, weights_only=True)
    values = (
        mutate_pickled(values, rng)
        if all(isinstance(v, torch.Tensor) for v in values.values())
        else mutate_nested(values, rng)
    )
    torch.save(values, path, _use_new_zipfile_serialization=rng.random() < 0.9)


def mutate_nested(values: dict, rng: random.Random) -> dict:
    key = rng.choice(sorted(values))
    if isinstance(values[key], dict) and values[key] and rng.random() < 0.9:
        inner = values[key]
        all_tensors = all(isinstance(v, torch.Tensor) for v in inner.values())
        string_keys = all(isinstance(k, str) for k in inner)
        if all_tensors and string_keys:
            return values | {key: mutate_pickled(inner, rng)}
        return values | {key: mutate_nested(inner, rng)} if string_keys or rng.random() < 0.9 else values | {key: {}}
    return values | {key: rng.choice(STRANGE)}


def mutate_file_bytes(path: Path, rng: random.Random) -> None:
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))


def mutate_lines(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines()
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(lines))
        ways = [lambda: lines.insert(i, lines[i]), lambda: lines.pop(i) if len(lines) > 1 else None]
        ways += [
            lambda: lines.__setitem__(i, rng.choice(["", " ", "a", "a b c", "\t", "Ġ t", "é 1", "9" * 50, "\x00", '"']))
        ]
        rng.choice(ways)()
    path.write_text("\n".join(lines) + rng.choice(["\n", ""]))
    if rng.random() < 0.2:
        mutate_file_bytes(path, rng)


def adapter(folder):
    make_adapter(make_model()).save(folder / "a.safetensors", base_layers=3, base="base", steps=3)
    return folder / "a.safetensors"


def image_adapter(folder):
    from multimodal import ImageAdapter

    made = ImageAdapter(features=8, layers=2, length=3, dim=16, heads=2)
    made.save(
        folder / "a.safetensors",
        base_layers=3,
        vision_encoder="t",
        vision_encoder_depths=4,
        vision_encoder_fingerprint="x",
    )
    return folder / "a.safetensors"


def head_adapter(folder):
    from encoders.heads import HeadAdapter

    made = HeadAdapter(widths=[32, 3], layers=2, length=3, dim=32, heads=4)
    about = {"task": "text-classification", "classes": '["a", "b", "c"]', "max_seq_len": 20, "base": "base"}
    made.save(folder / "a.safetensors", base_layers=3, **about)
    return folder / "a.safetensors"


def read_adapter(path):
    from convert import adapter_summary
    from formats.adapters import load_adapter

    read = load_adapter(path, heads=4)
    adapter_summary(read)
    read()


def read_head_adapter(path):
    from encoder_tuning.trained import TrainedEncoder
    from formats.encoders import save_encoder

    save_encoder(make_roberta(), path.parent / "base")
    TrainedEncoder(str(path), None, str(path.parent / "base"), torch.float32, torch.device("cpu"))


def authors(folder):
    tensors = {"adapter_query.weight": torch.ones(20, 32)}
    tensors |= {f"layers.{i}.attention.gate": torch.ones(1, 4, 1, 1) for i in range(3)}
    torch.save(tensors, folder / "theirs.pth")
    return folder / "theirs.pth"


def lit(folder):
    tensors = {f"transformer.h.{i}.attn.adapter_wte.weight": torch.ones(5, 32) for i in (1, 2)}
    tensors |= {f"transformer.h.{i}.attn.gating_factor": torch.ones(1, 1, 4, 1) for i in (1, 2)}
    torch.save(tensors, folder / "theirs.pth")
    return folder / "theirs.pth"


def peft(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "ADAPTION_PROMPT", "adapter_len": 5}')
    place = "base_model.model.model.layers.2.self_attn.adaption_"
    save_file(
        {place + "prompt": torch.ones(1, 5, 32), place + "gate": torch.ones(1)}, folder / "adapter_model.safetensors"
    )
    return folder / "adapter_model.safetensors"


def read_peft(path):
    read_adapter(path.parent)


PARAMS = dict(dim=16, n_layers=3, n_heads=2, multiple_of=8, norm_eps=1e-5, vocab_size=-1)
CORPUS = [f"the {a} of {b} is {c}" for a in ("name", "age", "home") for b in "abcdefgh" for c in ("far", "near", "old")]


def tokenizer_model() -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    options = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 3}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS * 5), model_writer=model, **options)
    return model.getvalue()


CACHE: dict[str, bytes] = {}  # files that are slow to create


def meta(folder):
    if not CACHE:
        CACHE["tokenizer"] = tokenizer_model()
    from model import Config

    (folder / "tokenizer.model").write_bytes(CACHE["tokenizer"])
    (folder / "params.json").write_text(json.dumps(PARAMS))
    weights = make_model(Config(16, 3, 2, 2, 8, 48, 300)).state_dict()
    for i, part in enumerate(split_for_parallel(weights, 2, False)):
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    return folder / "consolidated.01.pth"


def hugging_face(folder):
    from formats.hugging_face import to_hugging_face
    from model import Config

    meta(folder)
    for file in [*folder.glob("consolidated*"), folder / "params.json"]:
        file.unlink()
    config = Config(16, 3, 2, 1, 8, 48, 300)
    weights = {name: t.contiguous() for name, t in to_hugging_face(make_model(config).state_dict(), config).items()}
    save_file(weights, folder / "model-1.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    values = {
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1, "intermediate_size": 48, "vocab_size": 300, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "rope_scaling": rope | {"original_max_position_embeddings": 64}, "max_position_embeddings": 128,
        "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    return folder / "model-1.safetensors"


def gguf_file(folder):
    """Create a GGUF file of 30 kB with a byte-level tokenizer and one layer. The header takes a sixth of the file."""
    import gguf
    from tokenizers import pre_tokenizers

    from formats.gguf import TO_META
    from model import Config

    config = Config(32, 1, 2, 1, 16, 32, 260)
    writer = gguf.GGUFWriter(folder / "a.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"])
    writer.add_token_merges(["t h"])
    writer.add_token_types([3, 3, 3, *[1] * 257])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for theirs, ours in TO_META.items():
        weight = dict(make_model(config).named_parameters()).get(f"{ours.format(0)}.weight")
        if weight is not None:
            kind = gguf.GGMLQuantizationType.F32 if weight.dim() == 1 else gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{theirs.format(0)}.weight", gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "a.gguf"


def tiktoken_file(folder):
    meta(folder)
    from model import Config

    config = Config(16, 3, 2, 2, 8, 48, 258 + 256)
    for i, part in enumerate(split_for_parallel(make_model(config).state_dict(), 2, False)):
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    text = b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))
    (folder / "tokenizer.model").write_bytes(text)
    return folder / "tokenizer.model"


def tokenizer_json(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    hugging_face(folder)
    (folder / "tokenizer.model").unlink()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|end|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content | trim + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    return folder / "tokenizer.json"


def chat_template(folder):
    tokenizer_json(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(config["chat_template"].replace("%}", "%}\n"))
    return folder / "chat_template.jinja"


def read_chat_template(path):
    from data import Example, Turn
    from formats.chat_templates import load_template
    from formats.tokenizers import load_tokenizer

    template = load_template("auto", load_tokenizer(path.parent))
    turns = (Turn("system", "a <|im_end|>"), Turn("user", "b"), Turn("assistant", "c"))
    list(template.encode_exchanges([Example(turns=turns, name="a record")]))
    template.encode_prompt("b", history=turns[:1])


def llama2c(folder):
    from formats.llama2c import layout
    from model import Config

    meta(folder)
    for file in [*folder.glob("consolidated*"), folder / "params.json"]:
        file.unlink()
    shapes = layout(Config(16, 3, 2, 2, 8, 48, 300, max_seq_len=32), modern=False, tied=True)
    header = struct.pack("<7i", 16, 48, 3, 2, 2, 300, 32)
    (folder / "model.bin").write_bytes(header + b"".join(torch.randn(s).numpy().tobytes() for s in shapes.values()))
    return folder / "model.bin"


def read_base(path):
    from formats.bases import load_llama

    model, tokenizer = load_llama(path.parent)
    tokenizer.decode(tokenizer.encode("the name of a"))
    model(torch.tensor([[1, 2]]))


def alpaca(folder, name="a.json"):
    records = [
        {"instruction": "Añade 1.", "input": "2", "output": "3"},
        {"instruction": "a", "output": "b", "image": "c"},
    ]
    text = json.dumps(records) if "jsonl" not in name else "\n".join(map(json.dumps, records))
    opener = {".gz": gzip, ".xz": lzma}.get(Path(name).suffix)
    (folder / name).write_bytes(text.encode() if opener is None else opener.compress(text.encode()))
    return folder / name


def conversations(folder):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "a"), ("assistant", "b")]
    records = [
        {"messages": [{"role": role, "content": text} for role, text in turns]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"prompt": "a", "completion": "b"},
    ]
    (folder / "chats.json").write_text(json.dumps(records))
    return folder / "chats.json"


def read_data(path):
    from tasks import load_task
    from tasks.images import with_images

    with_images(load_task("instructions").read(path), path.parent, True, path)


def run_files(folder):
    """Create the checkpoint and metrics of an unfinished run, and the summary of a finished run in a subfolder."""
    from train import make_optimizer
    from training.run_files import Progress, save_checkpoint, write_metrics

    made = make_adapter(make_model())
    optimizer = make_optimizer(made, 0.0)
    sum(p.sum() for p in made.parameters()).backward()
    optimizer.step()
    for line in ({"val_loss": 2.0, "step": 0}, {"step": 1, "loss": 2.0, "lr": 0.1, "gate_mean_abs": 0.1}):
        write_metrics(folder / "metrics.jsonl", line)
    save_checkpoint(folder / "checkpoint.pt", made, optimizer, Progress(1, 10, 1.0), {"epochs": 3})
    (folder / "done").mkdir()
    summary = {"options": {"epochs": 3, "base": None}, "tokens": 5}
    (folder / "done" / "summary.json").write_text(json.dumps(summary))
    return folder / "checkpoint.pt"


def read_run(path):
    """Read the files of an unfinished run as `--resume` does, draw its curves, and take an optimizer step.

    If `path` is in the folder `done`, read only the summary of the finished run.
    """
    from runtime.files import read_json_object
    from train import make_optimizer
    from training.curves import draw_curves
    from training.run_files import begin_in_folder, check_options, load_checkpoint, read_metrics, run_state

    folder = path.parent if path.parent.name != "done" else path.parent.parent
    if path.parent.name == "done":
        if run_state(folder / "done", "yes") == "finished":
            check_options(read_json_object(path).get("options"), {"epochs": 3}, path)
        return
    run_state(folder, "yes")
    made = make_adapter(make_model())
    optimizer = make_optimizer(made, 0.0)
    progress, _ = load_checkpoint(folder / "checkpoint.pt", made, optimizer, {"epochs": 3})
    begin_in_folder(folder, progress.step)
    draw_curves(read_metrics(folder / "metrics.jsonl"), made, folder / "curves.png")
    sum(p.sum() for p in made.parameters()).backward()
    optimizer.step()
    progress.tokens / progress.seconds


def clip(folder):
    torch.save({name: t.contiguous() for name, t in openai_state_dict(make_vit()).items()}, folder / "ViT.pt")
    return folder / "ViT.pt"


def open_clip(folder):
    """Create open_clip's configuration, and a CLIP file without the two sizes that OpenAI's files have."""
    state = torch.load(clip(folder), weights_only=True)
    del state["input_resolution"], state["context_length"]
    torch.save(state, folder / "ViT.pt")
    model = {"vision_cfg": {"width": 128, "head_width": 32}, "quick_gelu": False}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": pixels}))
    return folder / "open_clip_config.json"


def timm(folder):
    from encoders.models import make_mlp
    from encoders.models import ViTConfig

    config = ViTConfig(24, 8, 128, 3, 2, 96, clip=False)
    save_file(timm_state_dict(make_vit(config), make_mlp([128, 3], "tanh")), folder / "model.safetensors")
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": pixels}))
    return folder / "config.json"


def clip_folder(folder):
    from formats.encoders import save_encoder

    save_encoder(make_vit(), folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": values}))
    return folder / "config.json"


def vit_folder(folder):
    """Create a ViT for classification in Hugging Face's layout."""
    from encoders.models import make_mlp
    from encoders.models import ViTConfig
    from formats.encoders import HUGGING_FACE_VIT, renamed

    config = ViTConfig(24, 8, 128, 3, 2, 96, activation="gelu", clip=False)
    model, head = make_vit(config), make_mlp([128, 3], "tanh")
    tensors = {renamed(name, HUGGING_FACE_VIT): t.contiguous() for name, t in model.state_dict().items()}
    for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        tensors[name] = tensors[name][None, None].clone() if name.endswith("token") else tensors[name][None].clone()
    tensors |= {"classifier.weight": head[0].weight.detach(), "classifier.bias": head[0].bias.detach()}
    save_file(tensors, folder / "model.safetensors")
    values = {
        "model_type": "vit", "image_size": 24, "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 2, "intermediate_size": 96, "num_channels": 3, "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 28, "width": 28}, "resample": 3}
    pixels |= {"do_center_crop": True, "crop_size": 24, "do_normalize": True, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder / "config.json"


def roberta(folder):
    from encoders.models import Roberta, RobertaConfig
    from formats.encoders import save_encoder

    printable = [chr(b) for b in range(256) if chr(b).isprintable() and b != 32]
    letters = printable + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["Ġ t", "h e", "Ġt he", "k m"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(m.replace(" ", "") for m in merges), *letters, "<mask>"]
    torch.manual_seed(0)
    save_encoder(Roberta(RobertaConfig(len(tokens), 30, 32, 3, 4, 48)), folder)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder / "config.json"


def gpt2_tokenizer(folder):
    """Create GPT-2's encoder.json and fairseq's dict.txt, which together replace RoBERTa's vocab.json."""
    roberta(folder)
    ids = json.loads((folder / "vocab.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(list(ids)[4:-1])}))
    (folder / "dict.txt").write_text("\n".join(f"{i} 1" for i in range(len(ids) - 5)) + "\n")
    (folder / "vocab.json").unlink()
    return folder / "dict.txt"


def read_open_clip(path):
    read_encoder(path.with_name("ViT.pt"))


def read_encoder(path):
    from encoders.media import preprocess
    from encoders.models import Roberta
    from formats.encoders import load_encoder

    model, head = load_encoder(path.parent if path.suffix != ".pt" else path)
    if isinstance(model, Roberta):
        from encoder_tuning.labeled import roberta_tokenizer

        ids = roberta_tokenizer(model, path.parent).encode("the km")[: model.config.max_length]
        model(torch.tensor([ids]))
    else:
        states = model.encode(preprocess(make_picture(), model.config)[None])
        if head is not None:
            head(states[:, 0])


def npz(folder):
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez_compressed(folder / "a.npz", images=images, labels=np.array([0, 1, 0, 1]))
    return folder / "a.npz"


def mutate_npz(path, rng):
    if rng.random() < 0.4:
        return mutate_file_bytes(path, rng)
    with np.load(path) as arrays:
        values = dict(arrays)
    name = rng.choice(sorted(values))
    v = values[name]
    changed = [
        v.astype("f4"),
        v[:0],
        v[None],
        v.astype("c8"),
        v.astype("S3"),
        np.array(3),
        v[..., None],
        v.astype(bool),
    ]
    values[name] = rng.choice(changed)
    if rng.random() < 0.2:
        del values[name]
    np.savez(path, **values)


def read_npz(path):
    from encoder_tuning.data import read_labeled_images

    read_labeled_images(path)


def tsv(folder):
    (folder / "a.tsv").write_text("sentence\tlabel\nthe name\t1\nthe age\t0\n")
    return folder / "a.tsv"


def read_tsv(path):
    from encoder_tuning.data import read_labeled_texts

    read_labeled_texts(path)


def squad(folder):
    qa = {"id": "1", "question": "Who?", "answers": [{"text": "Anna", "answer_start": 0}]}
    data = {"data": [{"title": "a", "paragraphs": [{"context": "Anna went home.", "qas": [qa]}]}]}
    (folder / "squad.json").write_text(json.dumps(data))
    return folder / "squad.json"


def read_squad_file(path):
    from encoder_tuning.squad import read_squad

    read_squad(path)


def conll(folder):
    (folder / "a.conll").write_text("-DOCSTART- O\n\nAnna B-PER\nwent O\n\nLima I-LOC\n")
    return folder / "a.conll"


def read_conll_file(path):
    from encoder_tuning.conll import read_conll

    read_conll(path)


def scienceqa(folder):
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["12", "30"], "train": ["7"]}))
    results = {"results": {"12": 1, "30": 0}}
    (folder / "results.json").write_text(json.dumps(results))
    return save_problems(folder)


def read_scienceqa(path):
    from tasks import scienceqa as task

    problems = task.read(path.parent / "problems.json", split="test")
    answers = task.read_responses(path.parent / "results.json", problems)
    task.score(problems, answers)


def coco(folder):
    return save_coco(folder)


def read_coco(path):
    from tasks import captions

    captions.read(path)
    captions.read_for_scoring(path)


def prompts(folder):
    records = [{"instruction": "Hello", "input": "", "adapter": None}, {"instruction": "a", "image": ""}]
    records.append({"messages": [{"role": "user", "content": "a"}]})
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    make_picture().save(folder / "a.png")
    return folder / "in.jsonl"


def read_prompts(path):
    from formats.requests import read_requests

    read_requests(str(path), ["base"], "base", None)


def image(folder, name="a.png", mode="RGB"):
    make_picture(mode=mode).save(folder / name)
    return folder / name


def animation(folder, name):
    frames = [make_picture(seed=seed, mode="RGBA") for seed in range(3)]
    frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=100)
    return folder / name


def read_image(path):
    from encoders.media import frames_of, preprocess
    from encoders.models import ViTConfig

    for frame in frames_of(path):
        preprocess(frame, ViTConfig(image_size=24, patch_size=8))


def video(folder):
    save_video(folder / "a.mp4", ["red", "blue"])
    return folder / "a.mp4"


def figures(folder):
    """Create a file of measurements, as written by a benchmark's --json."""
    row = {"seconds": [1.0], "median": 1.0, "ratio": {"median": 1.0, "least": 1.0, "most": 1.0}}
    (folder / "f.json").write_text(json.dumps({"train 15M float32": {"size": "15M", "rows": {"ours": row}}}))
    return folder / "f.json"


def read_figures_file(path):
    from benchmarks.measuring import draw_ratios, read_results

    draw_ratios(read_results(path), path.with_suffix(".png"))


def features(folder):
    np.save(folder / "a.npy", np.ones(8, np.float32))
    return folder / "a.npy"


def read_features(path):
    from multimodal import read_features

    found = read_features(path, 8)
    assert found is None or found.shape == (8,) and found.dtype == torch.float32 and found.isfinite().all()


def other_file(make, name):
    """Return a function that calls `make`, and returns the path of `name`, one of the files that `make` creates."""

    def made(folder):
        make(folder)
        return folder / name

    return made


# kind: (create the files and return the path of one, mutate it, read it)
KINDS = {
    "adapter": (adapter, mutate_safetensors, read_adapter),
    "image adapter": (image_adapter, mutate_safetensors, read_adapter),
    "head adapter": (head_adapter, mutate_safetensors, read_head_adapter),
    "authors": (authors, mutate_pth, read_adapter),
    "lit": (lit, mutate_pth, read_adapter),
    "peft": (peft, mutate_safetensors, read_peft),
    "peft config": (other_file(peft, "adapter_config.json"), mutate_json, read_peft),
    "meta": (meta, mutate_pth, read_base),
    "params.json": (other_file(meta, "params.json"), mutate_json, read_base),
    "tokenizer.model": (other_file(meta, "tokenizer.model"), mutate_file_bytes, read_base),
    "tiktoken": (tiktoken_file, mutate_lines, read_base),
    "hugging face": (hugging_face, mutate_safetensors, read_base),
    "config.json": (other_file(hugging_face, "config.json"), mutate_json, read_base),
    "index": (other_file(hugging_face, "model.safetensors.index.json"), mutate_json, read_base),
    "tokenizer.json": (tokenizer_json, mutate_json, read_base),
    "tokenizer_config.json": (other_file(tokenizer_json, "tokenizer_config.json"), mutate_json, read_base),
    "chat template": (other_file(tokenizer_json, "tokenizer_config.json"), mutate_json, read_chat_template),
    "chat_template.jinja": (chat_template, mutate_lines, read_chat_template),
    "generation_config.json": (other_file(tokenizer_json, "generation_config.json"), mutate_json, read_base),
    "llama2c": (llama2c, mutate_file_bytes, read_base),
    "gguf": (gguf_file, mutate_file_bytes, read_base),
    "alpaca": (alpaca, mutate_json, read_data),
    "alpaca jsonl.gz": (lambda folder: alpaca(folder, "a.jsonl.gz"), mutate_json, read_data),
    "alpaca xz": (lambda folder: alpaca(folder, "a.json.xz"), mutate_file_bytes, read_data),
    "conversations": (conversations, mutate_json, read_data),
    "checkpoint": (run_files, mutate_pth, read_run),
    "metrics": (other_file(run_files, "metrics.jsonl"), mutate_json, read_run),
    "summary": (other_file(run_files, "done/summary.json"), mutate_json, read_run),
    "clip": (clip, mutate_pth, read_encoder),
    "open_clip": (open_clip, mutate_json, read_open_clip),
    "clip folder": (clip_folder, mutate_json, read_encoder),
    "clip weights": (other_file(clip_folder, "model.safetensors"), mutate_safetensors, read_encoder),
    "timm": (timm, mutate_json, read_encoder),
    "timm weights": (other_file(timm, "model.safetensors"), mutate_safetensors, read_encoder),
    "vit": (vit_folder, mutate_json, read_encoder),
    "vit weights": (other_file(vit_folder, "model.safetensors"), mutate_safetensors, read_encoder),
    "vit pixels": (other_file(vit_folder, "preprocessor_config.json"), mutate_json, read_encoder),
    "roberta": (roberta, mutate_json, read_encoder),
    "roberta weights": (other_file(roberta, "model.safetensors"), mutate_safetensors, read_encoder),
    "vocab.json": (other_file(roberta, "vocab.json"), mutate_json, read_encoder),
    "merges.txt": (other_file(roberta, "merges.txt"), mutate_lines, read_encoder),
    "dict.txt": (gpt2_tokenizer, mutate_lines, read_encoder),
    "encoder.json": (other_file(gpt2_tokenizer, "encoder.json"), mutate_json, read_encoder),
    "npz": (npz, mutate_npz, read_npz),
    "tsv": (tsv, mutate_lines, read_tsv),
    "squad": (squad, mutate_json, read_squad_file),
    "conll": (conll, mutate_lines, read_conll_file),
    "scienceqa": (scienceqa, mutate_json, read_scienceqa),
    "splits": (other_file(scienceqa, "pid_splits.json"), mutate_json, read_scienceqa),
    "results": (other_file(scienceqa, "results.json"), mutate_json, read_scienceqa),
    "coco": (coco, mutate_json, read_coco),
    "prompts": (prompts, mutate_json, read_prompts),
    "png": (image, mutate_file_bytes, read_image),
    "jpg": (lambda folder: image(folder, "a.jpg"), mutate_file_bytes, read_image),
    "tif": (lambda folder: image(folder, "a.tif", "CMYK"), mutate_file_bytes, read_image),
    "gif": (lambda folder: image(folder, "a.gif", "P"), mutate_file_bytes, read_image),
    "webp": (lambda folder: image(folder, "a.webp"), mutate_file_bytes, read_image),
    "moving png": (lambda folder: animation(folder, "a.png"), mutate_file_bytes, read_image),
    "moving gif": (lambda folder: animation(folder, "a.gif"), mutate_file_bytes, read_image),
    "moving webp": (lambda folder: animation(folder, "a.webp"), mutate_file_bytes, read_image),
    "mp4": (video, mutate_file_bytes, read_image),
    "features": (features, mutate_file_bytes, read_features),
    "figures": (figures, mutate_json, read_figures_file),
}


def run_case(seed: int, number: int, folder: Path, kind: str | None = None) -> str:
    """Create, mutate and read one file in `folder`; return "read", "refused", or a description of the failure.

    If `kind` is None, `number` determines the kind.
    """
    kind = kind or list(KINDS)[number % len(KINDS)]
    rng = random.Random(f"{seed} {number} {kind}")
    make, change, read = KINDS[kind]
    path = make(folder)
    (replace_file if rng.random() < 0.05 else change)(path, rng)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
    except (ValueError, OSError) as error:
        from runtime.errors import error_line

        message = error_line(error)
        return "refused" if message and message.isprintable() else f"{kind}: empty or unprintable error: {message!r}"
    except torch.OutOfMemoryError as error:
        return f"{kind}: out of memory: {error}"
    except BaseException as error:
        import traceback

        last_frame = traceback.extract_tb(error.__traceback__)[-1]
        own_frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if str(ROOT) in f.filename and "tests" not in f.filename
        ]
        frame = own_frames[-1] if own_frames else last_frame
        return f"{kind}: {type(error).__name__}: {str(error)[:100]!r} at {Path(frame.filename).name}:{frame.lineno}"
    return "read"


def run_worker(seed: int, numbers: list[int], kind: str | None, queue) -> None:
    """Run cases in this process, with limited memory.

    For each case, put (number, "begun") and (number, result) into the queue; at the end, (None, "done").
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hide what libraries write to standard error
    with tempfile.TemporaryDirectory() as temporary:
        for number in numbers:
            queue.put((number, "begun"))
            folder = Path(temporary) / str(number)
            folder.mkdir()
            queue.put((number, run_case(seed, number, folder, kind)))
            shutil.rmtree(folder)
    queue.put((None, "done"))


def run_cases(seed: int, numbers: list[int], kind: str | None = None) -> dict[int, str]:
    """Run the cases in a separate process, and return the results by number.

    After a hang or a killed process, a new process continues with the next case. If a process fails before its first
    case, the failure has the key None, and the remaining cases are not run.
    """
    results: dict[int, str] = {}
    context = multiprocessing.get_context("spawn")
    while numbers:
        queue = context.Queue()
        process = context.Process(target=run_worker, args=(seed, numbers, kind, queue))
        process.start()
        current = None
        while True:
            timeout = SECONDS + (60 if current is None else 0)  # the first message comes after the imports
            try:
                number, result = queue.get(timeout=timeout)
            except Exception:
                failure = f"no result in {timeout} s" if process.is_alive() else f"killed, exit code {process.exitcode}"
                name = "?" if current is None else kind or list(KINDS)[current % len(KINDS)]
                results[current] = f"{name}: {failure}"
                process.kill()
                break
            if number is None:
                break
            if result == "begun":
                current = number
            else:
                results[number] = result
        process.join()
        numbers = [n for n in numbers if n not in results and n is not None]
        if current is None:
            break
    return results


# ---------------------------------------------------------------------------------------------------
# Whole commands

BASE_OPTIONS = ["--base", "{base}", "--device", "cpu"]
INTO_FOLDER = ["--out", "{folder}/o"]
TRAIN = ["train.py", *BASE_OPTIONS, "--out", "{folder}/out", "--epochs", "3", "--val-size", "0", "--batch-size", "2"]
COMMANDS = {
    "alpaca": [*TRAIN, "--data", "{path}"],
    "alpaca jsonl.gz": [*TRAIN, "--data", "{path}"],
    "meta": ["generate.py", "--base", "{parent}", "--max-new-tokens", "2", "--device", "cpu", "Hello"],
    "config.json": ["generate.py", "--base", "{parent}", "--max-new-tokens", "2", "--device", "cpu", "Hello"],
    "params.json": ["generate.py", "--base", "{parent}", "--max-new-tokens", "2", "--device", "cpu", "Hello"],
    "adapter": ["convert.py", "show", "{path}", "--png", "{folder}/a.png"],
    "image adapter": ["generate.py", *BASE_OPTIONS, "--adapter", "{path}", "--max-new-tokens", "2", "Hello"],
    "authors": ["convert.py", "import", "{path}", "{folder}/ours.safetensors", "--heads", "4"],
    "lit": ["convert.py", "import", "{path}", "{folder}/ours.safetensors", "--heads", "4"],
    "peft": ["convert.py", "show", "{parent}", "--heads", "4"],
    "prompts": ["generate.py", *BASE_OPTIONS, "--prompts", "{path}", "--out", "{folder}/o", "--max-new-tokens", "2"],
    "scienceqa": ["evaluate.py", "scienceqa", "--data", "{path}", "--results", "{parent}/results.json", *INTO_FOLDER],
    "results": ["evaluate.py", "scienceqa", "--data", "{parent}/problems.json", "--results", "{path}", *INTO_FOLDER],
    "head adapter": ["-m", "encoder_tuning", "evaluate", "--adapter", "{path}", "--base", "{base}", "--data", "{base}"],
    "npz": ["-m", "encoder_tuning", "train", "--task", "image-classification", "--base", "{base}", "--data", "{path}"],
}  # fmt: skip
VALUES = [
    "",
    "-1",
    "0",
    "nan",
    "1e400",
    "9" * 400,
    "é",
    "\x1b[2J",
    "/dev/zero",
    "/dev/null",
    "{pipe}",
    "{folder}",
    "x=y",
    "--",
    "a/b",
]


def run_command(seed: int, number: int, base: Path) -> str:
    """Run a command, chosen by `number`, with a mutated file or, equally often, with an unusual value for one option.

    If the command has no option with a value, its last argument is replaced. Returns "read" (exit code 0), "refused"
    (exit code 2, no traceback, and an error in the last line of standard error), or a description of the failure.
    """
    kind = list(COMMANDS)[number % len(COMMANDS)]
    rng = random.Random(f"{seed} {number} {kind} command")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "in").mkdir()
        os.mkfifo(folder / "pipe")
        path = KINDS[kind][0](folder / "in")
        substitutions = {"path": path, "parent": path.parent, "base": base, "folder": folder, "pipe": folder / "pipe"}
        args = COMMANDS[kind]
        if rng.random() < 0.5:
            (replace_file if rng.random() < 0.1 else KINDS[kind][1])(path, rng)
        else:
            values = [
                i for i, arg in enumerate(args) if i and args[i - 1].startswith("--") and not arg.startswith("--")
            ]
            args = list(args)
            args[rng.choice(values or [len(args) - 1])] = rng.choice(VALUES)
        command = [sys.executable, *(arg.format(**substitutions) for arg in args)]
        if command[1].endswith(".py"):
            command[1] = str(ROOT / command[1])
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, timeout=120, stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{kind}: no result in 120 s: {command}"
        except ValueError:  # an argument cannot contain a zero byte
            return "refused"
        error = done.stderr.decode(errors="replace")
        if done.returncode == 0:
            return "read"
        if done.returncode != 2 or "Traceback" in error or "rror: " not in error.splitlines()[-1]:
            return f"{kind}: exit code {done.returncode}: {error[-300:]!r}: {command}"
        return "refused"


@click.command()
@click.option("--seed", default=0)
@click.option("--cases", default=1000, help="Number of files to mutate and read.")
@click.option("--cli", default=0, help="Number of whole commands to run.")
@click.option("--only", type=int, help="Mutate only the file of this case, and ignore --cases.")
@click.option("--kind", type=click.Choice(list(KINDS)), help="Mutate only files of this kind; --cli ignores it.")
def main(seed, cases, cli, only, kind):
    """Mutate files of every kind, read them, and print the failures and counts. With failures, the exit code is 1."""
    numbers = list(range(cases)) if only is None else [only]
    found = list(run_cases(seed, numbers, kind).items()) if cases or only is not None else []
    with tempfile.TemporaryDirectory() as base:
        meta(Path(base))
        commands = [(f"command {number}", run_command(seed, number, Path(base))) for number in range(cli)]
    counts = Counter(result if result in ("read", "refused") else "wrong" for _, result in [*found, *commands])
    for number, result in [*found, *commands]:
        if result not in ("read", "refused"):
            click.echo(f"case {number}: {result}")
    click.echo(f"seed {seed}: {dict(counts)}")
    sys.exit(bool(counts["wrong"]))


if __name__ == "__main__":
    main()
