"""Run the commands with each of their options, and expect exit code 0.

The options are read from the commands, so that a new option without a line in this file is detected. Other test files
run the commands in ELSEWHERE and SAME_AS, and `experiments few` and `experiments roberta`.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import (
    FOUR_LAYER_VIT,
    make_vit,
    openai_state_dict,
    save_coco,
    save_harness_task,
    save_problem_images,
    save_problems,
)
from helpers import save_roberta, subcommands, randomize
from PIL import Image
from safetensors.torch import load_file

import convert
import evaluate
import experiments.__main__ as experiments
import generate
import train
from benchmarks import __main__ as benchmarks
from benchmarks import measuring, true_size, workload
from demo import __main__ as demo
from encoder_tuning import __main__ as encoder_tuning
from encoders.heads import HeadAdapter
from model import Config

PROGRAMS = {
    "train": train.main, "generate": generate.main, "evaluate": evaluate.main, "convert": convert.main,
    "encoder_tuning": encoder_tuning.main, "benchmarks": benchmarks.main, "experiments": experiments.main,
    "demo": demo.main,
}  # fmt: skip
ADAPTER = "--layers 2 --length 3 --epochs 3 --warmup-epochs 0.5 --batch-size 8 --weight-decay 0.01 --seed 1"
RUN = (
    "--save-every 2 --log-every 2 --max-minutes 5 --device cpu --dtype float32 --eval-every 3 --keep best --tensorboard"
)
BENCH = "--size 15M --device cpu --dtype float32 --repeat 1 --data {forty} --tokenizer {base}/tokenizer.model"
TESTBED = (
    "--base {base} --data {forty} --task instructions --text {text} --limit 16 --held-out 3 --max-seq-len 300 "
    "--batch-size 16 --lr 0.05 --layers 2 --length 3 --epochs 3 --device cpu --dtype float32 --seeds 1 --out {new}"
)
# The arguments of each command, one line per run. Every option or an alias of it occurs in at least one line.
LINES = {
    "train": [
        f"--base {{base}} --data {{forty}} --task instructions --limit 30 --out {{new}} {ADAPTER} {RUN} --lr 0.05 "
        "--max-seq-len 400 --val-size 4 --micro-batch-tokens 500 --checkpoint-activations --attention paper "
        "--strategy ddp --resume auto",
        "--base {base} --toy text --limit 8 --layers 2 --epochs 2 --blr 0.01 --device cpu --out {new}",
        "--base {base} --data {forty} --limit 20 --template llama-2 --device cpu --int8 --out {new}",
        "--base {base} --data {forty} --limit 4 --val-size 0 --epochs 3 --device cpu --compile --out {new}",
        "--base {base} --data {forty} --limit 8 --epochs 3 --device cpu --bits 8 --out {new}",
        "--base {base} --data {album}/data.json --images {album} --clip {album}/ViT.pt --features {new}-features "
        "--skip-missing --epochs 3 --val-size 0 --device cpu --out {new}",
        "--base {base} --data {album}/data.json --skip-missing --encoder {album}/eye.py:rows --device cpu --out {new}",
        "--base {base} --data {forty} --limit 8 --epochs 3 --init {text_only} --freeze gates --device cpu --out {new}",
    ],
    "generate": [
        "--adapter {text_only} --adapter other={text_only} --base {base} --input cat --compare --max-new-tokens 2 "
        "--temperature 0.5 --top-p 0.9 --seed 1 --strength 0.5 --device cpu --dtype float32 --attention paper Hello",
        "--base {base} --raw --greedy --bits 8 --max-new-tokens 2 --stop x --repetition-penalty 1.1 --device cpu Hello",
        "--base {base} --int8 --template llama-2 --max-new-tokens 2 --device cpu Hello",
        "--base {base} --compile --max-new-tokens 2 --device cpu Hello",
        "--adapter {seeing} --image {album}/1.png --clip {album}/ViT.pt --max-new-tokens 2 --device cpu Hello",
        "--adapter {heard} --video {album}/1.png --encoder {album}/eye.py:rows --max-new-tokens 2 Hello",
        "--adapter {seeing} --prompts {album}/in.jsonl --images {album} --out {new} --batch-size 1 --max-new-tokens 2",
    ],
    "evaluate scienceqa": [
        "--data {science}/problems.json --images {science} --split test --limit 2 --adapter {seeing} --base {base} "
        "--clip {album}/ViT.pt --skip-missing --choose --max-new-tokens 3 --batch-size 2 --device cpu --dtype float32 "
        "--out {new}",
        "--data {science}/problems.json --adapter {heard} --encoder {album}/eye.py:rows --max-new-tokens 2 --bits 8 "
        "--out {new}",
        "--data {science}/problems.json --base {base} --int8 --limit 1 --max-new-tokens 2 --compile --device cpu "
        "--out {new}",
        "--data {science}/problems.json --results {science}/results.json --out {new}",
    ],
    "evaluate captions": [
        "--data {coco}/captions.json --images {coco} --limit 2 --adapter {seeing} --base {base} --clip {album}/ViT.pt "
        "--skip-missing --max-new-tokens 3 --batch-size 2 --device cpu --dtype float32 --out {new}",
        "--data {coco}/captions.json --adapter {heard} --encoder {album}/eye.py:rows --max-new-tokens 2 --bits 8 "
        "--out {new}",
        "--data {coco}/captions.json --adapter {seeing} --base {base} --images {coco} --int8 --limit 1 "
        "--clip {album}/ViT.pt --skip-missing --max-new-tokens 2 --compile --device cpu --out {new}",
        "--data {coco}/captions.json --results {coco}/results.json --out {new}",
    ],
    "evaluate toy": [
        "--adapter {text_only} --base {base} --with-images --device cpu --dtype float32 --bits 8",
        "--adapter {text_only} --base {base} --int8",
    ],
    "evaluate harness": [
        "--tasks capitals --include-path {tasks} --adapter {text_only} --base {base} --strength 0.5 --compare "
        "--limit 2 --num-fewshot 0 --template alpaca --batch-size 2 --log-samples --device cpu --dtype float32 "
        "--bits 8 --out {new}",
        "--tasks {tasks}/capitals.yaml --base {base} --int8 --stop x --repetition-penalty 1.1 --compile --device cpu "
        "--out {new}",
    ],
    "experiments bits": ["--base {base} --base {grouped} --text {text} --rows 2 --device cpu --out {new}"],
    "convert show": ["{theirs} --png {new}.png --heads 2 --gate identity --length 3"],
    "convert import": [
        "{theirs} {new} --heads 2 --gate identity --length 3",
    ],
    "convert export": ["{one_gate} {new} --heads 2 --gate identity --length 3"],
    "encoder_tuning train": [
        f"--task image-classification --base {{vit}} --data {{digits}}.npz --limit 30 --out {{new}} {ADAPTER} {RUN} "
        "--lr 0.01 --max-seq-len 100 --val-size 4 --micro-batch-tokens 100 --resume auto",
        "--task image-classification --base {vit} --data {digits}.npz --blr 0.1 --layers 1 --epochs 3 --out {new}",
        "--task question-answering --base {reader} --data {squad} --max-seq-len 30 --stride 8 --layers 1 --epochs 3 "
        "--device cpu --out {new}",
    ],
    "encoder_tuning evaluate": [
        "--task image-classification --adapter {head} --base {vit} --data {digits}.npz --limit 5 --out {new} "
        "--micro-batch-tokens 100 --device cpu --dtype float32",
        "--adapter {asked} --data {squad} --stride 100 --no-answer-threshold 0.5 --device cpu --out {new}",
    ],
    "benchmarks train": [
        f"{BENCH} --json {{new}}.json --examples 4 --batch-size 2 --micro-batch-tokens 500 --checkpoint-activations",
        f"{BENCH} --ablation --examples 4",
        f"{BENCH} --peers --precisions --examples 4",
        f"{BENCH} --compile --examples 4",
        "--base {base} --device cpu --repeat 1 --examples 4",
    ],
    "benchmarks generate": [
        f"{BENCH} --json {{new}}.json --tokens 3",
        f"{BENCH} --peers --precisions --batch-size 2 --tokens 3",
        f"{BENCH} --compile --tokens 3",
        "--base {base} --device cpu --repeat 1 --tokens 3",
    ],
    "benchmarks score": [
        f"{BENCH} --json {{new}}.json --questions 2 --choices 2 --batch-size 2",
        f"{BENCH} --peers --questions 2",
        "--base {base} --device cpu --repeat 1 --questions 2",
    ],
    "benchmarks memory": ["--size 15M --check --device cpu --dtype float32 --json {new}.json"],
    "benchmarks checkpoint": [
        "--size TinyLlama-1.1B --tokenizer {base}/tokenizer.model --out {new}",
        "--size 15M --gguf --tokenizer {base}/tokenizer.model --out {new}.gguf",
    ],
    "benchmarks load": [
        "--base {base} --tokens 8 --new 2 --device cpu --dtype float32 --bits 8 --json {new}.json",
        "--base {base} --tokens 8 --new 2 --device cpu --int8",
    ],
    "benchmarks gpu": [
        "--size 15M --device cpu --dtype float32 --minutes 0.0001 --skip-tests --out {new}.json",
    ],
    "benchmarks plan": ["--gpu-memory 24 --peak 165 --utilization 0.5"],
    "experiments gates": [
        TESTBED,
        "--toy-layers 3 --limit 8 --held-out 3 --epochs 3 --seeds 1 --device cpu --out {new}",
    ],
    "experiments vit": [
        "--base {vit} --train {digits}.npz --test {digits}.npz --seeds 1 --epochs 2 --batch-size 20 --length 2 "
        "--rank 2 --out {new}",
        "--base {vit} --train {digits}.npz --test {digits}.npz --epochs 2 --search --out {new}",
    ],
}  # fmt: skip
# Commands whose options are those of `experiments gates`. test_experiments.py runs them.
SAME_AS = dict.fromkeys(["methods", "zero-init", "layers", "epochs", "design", "rates", "all"], "gates")

ELSEWHERE = {  # commands that have test files of their own
    "demo": "--adapter --base --device --dtype --clip --encoder --template --bits --host --port",
    "experiments stages": "--pictures --epochs --seeds --device --out",
    "experiments stories": "--base --data --per-kind --max-tokens --epochs --layers --length --batch-size --seeds "
    "--at-a-time --search --curve --device --out",
    "experiments real": "--base --reviews --text --problems --alpaca --device --dtype --part --at-a-time --out",
    "experiments sounds": "--model --speech --clips --base --epochs --lr --seeds --device --out",
}


def commands(program, name):
    """Yield (full name, command) for each subcommand of `program`, or for `program` itself if it has none."""
    if isinstance(program, click.Group):
        for child, command in subcommands(program).items():
            yield f"{name} {child}", command
    else:
        yield name, program


COMMANDS = {name: command for program, main in PROGRAMS.items() for name, command in commands(main, program)}


def options_of(command):
    """Return the options that the command's help shows, except --help. Hidden ones are old names."""
    shown = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    return {option for param in shown for option in param.opts} - {"--help"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text_and_a_line(name):
    command = COMMANDS[name]
    subcommand = name.split()[-1] if name.startswith("experiments") else ""
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden:
            assert param.help, f"{name} {param.opts[0]}"
            assert len(f"{param.opts[0]} {param.help.split('  [')[0]}") <= 120, param.opts[0]
    if " " in name:
        assert "..." not in command.get_short_help_str(limit=60), "the list of commands truncates its first sentence"
    if subcommand in SAME_AS:
        assert options_of(command) == options_of(COMMANDS[f"experiments {SAME_AS[subcommand]}"])
        return
    if name in ELSEWHERE:
        assert options_of(command) == set(ELSEWHERE[name].split())
        return
    if name == "experiments few":
        assert options_of(command) == options_of(COMMANDS["experiments vit"]) - {"--search"}
        return
    if name == "experiments roberta":
        assert options_of(command) - options_of(COMMANDS["experiments vit"]) == {"--text", "--tokenizer"}
        return
    used = {word for line in LINES[name] for word in line.split() if word.startswith("--")}
    aliases = {"--image", "--video", "--audio"}  # three names of one option
    assert options_of(command) - used <= aliases and used - {"--int8"} <= options_of(command)


@pytest.fixture(scope="module")
def places(tiny_base, instructions, bpe, tmp_path_factory):
    """Dict from the names in braces in LINES, except {new}, to paths of files and folders."""
    folder = tmp_path_factory.mktemp("options")
    for name in ("album", "science", "coco", "vit", "grouped", "tasks"):
        (folder / name).mkdir()
    album = folder / "album"
    torch.save(openai_state_dict(make_vit(FOUR_LAYER_VIT)), album / "ViT.pt")
    (album / "eye.py").write_text("import torch\ndef rows(path): return torch.arange(1.0, 65).view(2, 32)\n")
    records = []
    for i in range(4):
        Image.new("RGB", (30, 30), (60 * i, 0, 0)).save(album / f"{i}.png")
        records.append({"instruction": "Name the color.", "output": "red", "image": f"{i + i // 3}.png"})
    (album / "data.json").write_text(json.dumps(records))
    (album / "in.jsonl").write_text(json.dumps(records[0]))
    save_problems(folder / "science")
    save_problem_images(folder / "science")
    (folder / "science" / "results.json").write_text(json.dumps({"results": {"12": 1, "30": 0, "31": 1}}))
    save_coco(folder / "coco")
    for number in (2, 5, 9):
        Image.new("RGB", (20, 20)).save(folder / "coco" / f"{number}.jpg")
    captions = [{"image_id": number, "caption": "A dog."} for number in (5, 9)]
    (folder / "coco" / "results.json").write_text(json.dumps(captions))

    from multimodal import ImageAdapter

    shape = {"layers": 3, "length": 2, "dim": 16, "heads": 2}
    metadata = {"base": str(tiny_base), "base_layers": 3}
    train.Adapter(**shape).save(folder / "text_only", **metadata)
    ImageAdapter(features=512, **shape).save(folder / "seeing", vision_encoder=album / "ViT.pt", **metadata)
    ImageAdapter(features=64, **shape).save(folder / "heard", encoder="eye.py:rows", **metadata)
    gates = {f"layers.{i}.attention.gate": torch.full((1,), 0.5) for i in range(3)}
    torch.save({"adapter_query.weight": torch.ones(6, 16)} | gates, folder / "theirs")
    shutil.copy(folder / "theirs", folder / "one_gate")
    lit = {f"transformer.h.{i}.attn.adapter_wte.weight": torch.randn(3, 16) for i in (1, 2)}
    lit |= {f"transformer.h.{i}.attn.gating_factor": torch.ones(1, 1, 4, 1) for i in (1, 2)}
    torch.save(lit, folder / "lit")
    grouped = {"dim": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8, "norm_eps": 1e-5}
    (folder / "grouped" / "params.json").write_text(json.dumps(grouped))
    torch.manual_seed(0)
    model = train.LLaMA(Config(16, 3, 4, 2, 4, 48, 1024))
    torch.save(model.state_dict(), folder / "grouped" / "consolidated.00.pth")
    shutil.copy(tiny_base / "tokenizer.model", folder / "grouped")

    transformers = pytest.importorskip("transformers")
    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.ViTConfig(**shape, intermediate_size=48, num_channels=3, num_labels=2)
    randomize(transformers.ViTForImageClassification(config)).save_pretrained(folder / "vit")
    images = np.random.default_rng(0).integers(0, 255, (40, 16, 16), dtype=np.uint8)
    np.savez(folder / "digits.npz", images=images, labels=np.arange(40) % 2)
    head = HeadAdapter(layers=2, length=3, dim=32, heads=4, widths=[32, 2])
    head.save(folder / "head", base=folder / "vit", base_layers=3, task="image-classification", classes='["0", "1"]')
    metadata = {"base": save_roberta(folder / "reader", bpe), "base_layers": 2, "task": "question-answering"}
    HeadAdapter(layers=1, length=3, dim=32, heads=4, widths=[32, 2]).save(folder / "asked", **metadata)
    questions = [{"id": str(i), "question": "Where?", "answers": [], "is_impossible": True} for i in range(8)]
    paragraph = {"context": "Anna went home by the river.", "qas": questions}
    (folder / "squad").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    (folder / "text").write_text("The capital of Peru is Lima, and Anna went home.\n" * 100)
    names = ("album", "science", "coco", "vit", "grouped", "text_only", "seeing", "heard", "theirs", "one_gate", "lit")
    names += ("digits", "head", "text", "reader", "asked", "squad", "tasks")
    save_harness_task(folder / "tasks")
    return {name: folder / name for name in names} | {"base": tiny_base, "forty": instructions}


@pytest.mark.parametrize("name, line", [(name, line) for name, lines in LINES.items() for line in lines])
def test_each_line_runs(places, tmp_path, monkeypatch, small_digits, name, line):
    program, *command = name.split()
    if "captions" in name:
        pytest.importorskip("pycocoevalcap")
        if shutil.which("java") is None:
            pytest.skip("needs java")
    if "harness" in name or "benchmarks score" in name:
        pytest.importorskip("lm_eval")
    # The real compiler would take a minute; test_train.py and test_generate.py use it.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    if program == "benchmarks":
        monkeypatch.setitem(true_size.SIZES, "TinyLlama-1.1B", Config(32, 3, 4, 2, 8, 48, 1100))
        monkeypatch.setattr("benchmarks.memory.ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
        monkeypatch.setitem(workload.CONFIGS, "15M", Config(32, 4, 4, 4, 8, 48, 2000))
        monkeypatch.setitem(measuring.MATRIX, "cpu", 64)
        monkeypatch.setitem(measuring.COPIED, "cpu", 2**10)
    if "--toy-layers" in line:
        monkeypatch.setattr("experiments.testbed.toy_base", lambda n_layers: places["base"])
    result = CliRunner().invoke(PROGRAMS[program], [*command, *line.format(**places, new=tmp_path / "new").split()])
    assert result.exit_code == 0, result.output + str(result.exception)
    if "{new}" in line and "--search" not in line:
        assert list(tmp_path.iterdir())
    if name == "train" and "--clip" in line:
        assert load_file(tmp_path / "new" / "adapter.safetensors")["projection.0.weight"].shape[1] == 512
