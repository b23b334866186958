"""Several ranks that answer together, each with its part of every layer, say what a process alone says."""

import json
import os
import signal
import time

import pytest
import torch
from click.testing import CliRunner
from helpers import KINDS, Ranks, copy_base, launch, make_adapter, peak_anonymous, said_by, save_hugging_face
from helpers import save_problems, split_for_parallel

import benchmarks.__main__ as benchmarks
import evaluate
import generate
from data import Request, read_records
from formats.bases import load_llama, read_base
from formats.loading import load_part_of_rank, load_with_adapters
from formats.meta import join
from generate import Responder, concat_adaption_prompts, prefill
from model import KVCache
from multimodal import ImageAdapter
from runtime.distributed import inference_ranks, init_distributed, rank
from runtime.quantization import held_bytes
from runtime.tensor_parallel import Part

CPU = torch.device("cpu")
QUESTIONS = ["Name the number 3.", "Say what is red", "", "Who is it, and since when is it that?"]


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("cut, dim", [(0, 0), (1, 1), (0, 1), (1, 0)], ids=["rows", "columns", "across", "down"])
def test_a_rank_copies_its_part_of_however_many_files(pieces, ranks, cut, dim):
    whole = torch.arange(24 * 48.0).view(24, 48)
    files = list(whole.chunk(pieces, cut))
    for i, expected in enumerate(whole.chunk(ranks, dim)):
        target = torch.empty_like(expected)
        join(files, target, Part(dim, i, ranks))
        assert torch.equal(target, expected)


def base_of(kind, folder, tiny_base):
    """Heads, biases, norms of heads as Hugging Face's models have them; or a folder of Meta's in two files."""
    if kind != "two files":
        save_hugging_face(folder, tiny_base, **KINDS[kind])
        return folder
    model, _ = load_llama(tiny_base)
    folder.mkdir(exist_ok=True)
    for name in ("params.json", "tokenizer.model"):
        (folder / name).write_bytes((tiny_base / name).read_bytes())
    for i, shard in enumerate(split_for_parallel(model.state_dict(), 2, vocabulary_first=False)):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    return folder


def save_adapters(base, folder):
    """Two of other depths, with open gates, one of them able to see."""
    model, _ = load_llama(base)
    config = model.config
    shape = dict(length=5, dim=config.dim, heads=config.n_heads)
    seeing = ImageAdapter(layers=3, features=6, bottleneck=4, generator=torch.Generator().manual_seed(3), **shape)
    torch.nn.init.normal_(seeing.gates, generator=torch.Generator().manual_seed(4))
    for name, adapter in {"plain": make_adapter(model), "seeing": seeing}.items():
        adapter.save(folder / f"{name}.safetensors", base=base, base_layers=config.n_layers)
    return [str(folder / f"{name}.safetensors") for name in ("plain", "seeing")]


def asked():
    """Of both adapters and the base, one of them about an image."""
    names = ["plain", "base", "seeing", "seeing"]
    features = [None, None, None, torch.linspace(-1, 1, 6)]
    return [Request(text, "", *about) for text, *about in zip(QUESTIONS, names, features)]


@torch.no_grad()
def answers_of(base, adapters, bits=None):
    """Logits after the questions, what is written then, and how many bytes the layers take here."""
    torch.set_num_threads(1)
    with inference_ranks():
        how = {"bits": bits, "decoding": bits is None}  # whether tiny layers are packed would depend on the moment
        model, tokenizer, loaded = load_with_adapters(adapters, str(base), CPU, torch.float32, **how)
        responder = Responder(model, tokenizer, loaded, max_new_tokens=12)
        tokens, prompts = map(list, zip(*((responder.prompt_ids(r), responder.adaption_prompts(r)) for r in asked())))
        cache = KVCache(model, batch=len(tokens), capacity=100)
        logits = prefill(model, tokens, concat_adaption_prompts(prompts), cache)
        texts = responder.respond_batch(asked())
    shapes = {name: list(weight.shape) for name, weight in model.named_parameters()}
    return logits.tolist(), texts, shapes, held_bytes(model.layers)


@pytest.mark.parametrize(
    "kind, world", [("mha", 2), ("mha", 4), ("gqa", 2), ("qwen2", 2), ("qwen3", 2), ("two files", 2)]
)
def test_the_same_logits_and_text(forks, kind, world, tiny_base, tmp_path):
    """Adapters of other depths, the base and an image in one batch; on every rank to the last bit."""
    base = base_of(kind, tmp_path / "base", tiny_base)
    adapters = save_adapters(base, tmp_path)
    logits, texts, shapes, _ = answers_of(base, adapters)
    results = Ranks(forks, world, answers_of, base, adapters).results()
    assert all(result[:2] == results[0][:2] for result in results)
    torch.testing.assert_close(torch.tensor(results[0][0]), torch.tensor(logits), rtol=1e-4, atol=1e-4)
    assert results[0][1] == texts and len(set(texts)) > 1
    for name, shape in shapes.items():
        for result in results:
            dim = 1 if ".wo." in name or ".w2." in name else 0
            cut = "layers." in name and "norm" not in name
            assert result[2][name] == [n // world if cut and d == dim else n for d, n in enumerate(shape)], name


@pytest.mark.parametrize("bits", ["8", "4"])
def test_parts_in_fewer_bits(forks, bits, tiny_base, tmp_path):
    """A part is rounded by itself, so the numbers are near those of the whole, rounded; and take half as much."""
    base = base_of("mha", tmp_path / "base", tiny_base)
    adapters = save_adapters(base, tmp_path)
    results = Ranks(forks, 2, answers_of, base, adapters, bits).results()
    logits, held = (torch.tensor(answers_of(base, adapters, bits)[0]), answers_of(base, adapters, bits)[3])
    exact = torch.tensor(answers_of(base, adapters)[0])
    ours = torch.tensor(results[0][0])
    assert results[1][0] == results[0][0] and (ours - exact).norm() < 1.5 * (logits - exact).norm() + 1e-3
    for result in results:
        assert result[3] < 0.6 * held


PROGRAMS = {"generate": generate, "evaluate": evaluate, "benchmarks": benchmarks}


def say(program, stdin, *args):
    """A command: its exit code, standard output, standard error."""
    result = CliRunner().invoke(PROGRAMS[program].main, list(map(str, args)), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def say_as_rank(program, stdin, args, spoil=None):
    """The first rank alone is typed to, and has a folder for the answers."""
    if os.environ["RANK"] != "0":
        args = [str(arg).replace("two", "nowhere/two") for arg in args]
    launch(PROGRAMS[program].main, args, spoil, stdin or "")


def together(forks, world, program, stdin, *args):
    """The same command on several ranks, of which the others must be silent; what the first said."""
    first, *others = Ranks(forks, world, say_as_rank, program, stdin, args).results()
    assert all(code == first[0] and stdout == stderr == "" for code, stdout, stderr in others), others
    return first


def test_commands(forks, tiny_base, tiny_adapter, tmp_path):
    """PROMPT, lines from a pipe that the first rank alone is given, and a file: sampled, and each in one voice."""
    options = ["--adapter", tiny_adapter, "--device", "cpu", "--max-new-tokens", 6, "--temperature", 1]
    for more, stdin in ((["What?", "--compare"], None), ([], "What?\n\nWho is it?\n")):
        alone = say("generate", stdin, *options, *more)
        assert alone[0] == 0 and together(forks, 2, "generate", stdin, *options, *more)[:2] == alone[:2]
    file = tmp_path / "asked.jsonl"
    names = ["a", None, "a"]
    file.write_text("".join(json.dumps({"instruction": q, "adapter": a}) + "\n" for q, a in zip(QUESTIONS, names)))
    say("generate", None, *options, "--prompts", file, "--out", tmp_path / "alone.jsonl")
    code, _, _ = together(forks, 2, "generate", None, *options, "--prompts", file, "--out", tmp_path / "two.jsonl")
    assert code == 0 and read_records(tmp_path / "two.jsonl") == read_records(tmp_path / "alone.jsonl")


def test_evaluation(forks, tiny_adapter, tmp_path):
    path = save_problems(tmp_path, image=None)
    args = ["scienceqa", "--data", path, "--adapter", tiny_adapter, "--device", "cpu", "--choose"]
    args += ["--max-new-tokens", 3]
    alone = say("evaluate", None, *args, "--out", tmp_path / "alone")
    assert alone[0] == 0 and together(forks, 2, "evaluate", None, *args, "--out", tmp_path / "two")[:2] == alone[:2]
    written = {file.name: file.read_text() for file in (tmp_path / "alone").iterdir()}
    assert written and written == {file.name: file.read_text() for file in (tmp_path / "two").iterdir()}
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["hi"], "3 processes cannot share the base's n_kv_heads 2 evenly"),
        (["hi", "--device", "cuda:0"], "--device cuda:0: with several processes each has its own"),
        (["--raw", "--input", "b", "hi"], "--input is a field of the template"),
        (["--prompts", "none.jsonl", "--out", "out.jsonl"], ""),
        (["hi", "--adapter", "none.safetensors"], "none.safetensors: no such adapter file"),
    ],
)
def test_what_is_wrong_is_said_once(forks, tiny_base, tmp_path, more, message):
    more = [tmp_path / word if word == "out.jsonl" else word for word in more]
    results = Ranks(forks, 3, say_as_rank, "generate", None, ["--base", tiny_base, *more]).results()
    (line,) = said_by(results)
    assert line.startswith(f"error: rank 0: {message}")
    assert results[0][0] == 2 and all(stdout == "" for _, stdout, _ in results)


def killed_at_the_fourth_token(_):
    """Of the second rank."""
    decode, calls = generate.decode_step, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 4 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(*args)

    generate.decode_step = dying


def test_a_lost_rank_ends_all(forks, tiny_base):
    start = time.monotonic()
    args = ["--base", tiny_base, "--device", "cpu", "--raw", "--max-new-tokens", 500, "hi"]
    results = Ranks(forks, 2, say_as_rank, "generate", None, args, killed_at_the_fourth_token).results()
    assert [code for code, _, _ in results] == [-signal.SIGTERM, -signal.SIGKILL]  # torchrun says that it was killed
    assert "Traceback" not in results[0][2] and time.monotonic() - start < 30


def without_its_gpu(rank):
    """There are more ranks than GPUs."""

    def fail(*_):
        raise ValueError("device 'cuda:1' is not available")

    if rank == 1:
        generate.select_device = fail


def test_what_one_rank_alone_cannot_do_is_said(forks, tiny_base):
    args = ["--base", tiny_base, "--raw", "hi"]
    results = Ranks(forks, 2, say_as_rank, "generate", None, args, without_its_gpu).results()
    (line,) = said_by(results)
    assert line.startswith("error: rank 1: device 'cuda:1' is not available") and results[1][0] == 2


def test_a_weight_of_another_model_is_a_line(tiny_base, tmp_path):
    """Whatever its name looks like."""
    base = copy_base(tiny_base, tmp_path / "base")
    weights = torch.load(base / "consolidated.00.pth", weights_only=True) | {"logit_scale": torch.ones(1)}
    torch.save(weights, base / "consolidated.00.pth")
    code, _, stderr = say("generate", None, "--base", base, "--raw", "hi")
    assert code == 2 and "has a weight logit_scale that a LLaMA does not have" in stderr


def load_and_watch(tiny_base, base):
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        init_distributed()

    def load(path):
        return load_part_of_rank(path, *read_base(path), torch.float32, CPU)

    load(tiny_base)  # so that the libraries' own memory doesn't count
    model, peak = peak_anonymous(lambda: load(base))
    return held_bytes(model), peak


def test_a_rank_needs_memory_for_its_part_alone(forks, tiny_base, large_base):
    (whole, _), ranks = load_and_watch(tiny_base, large_base), Ranks(forks, 2, load_and_watch, tiny_base, large_base)
    for size, peak in ranks.results():
        assert size < 0.55 * whole and peak < 1.15 * size


@pytest.mark.parametrize("world", [2, 4])
def test_models_that_others_trained(forks, data, world):
    """Of 4 and of 8 key/value heads: the same text, word for word."""
    for base in (data / "stories260K", data / "models" / "tinystories3.8M"):
        args = ["--base", base, "--device", "cpu", "--raw", "--greedy", "--max-new-tokens", 16, "Once upon a time"]
        alone = say("generate", None, *args)
        assert alone[0] == 0 and together(forks, world, "generate", None, *args)[:2] == alone[:2]


def test_what_a_part_takes_is_measured(forks, tiny_base, tmp_path):
    args = ["load", "--base", tiny_base, "--device", "cpu", "--new", 3]
    assert together(forks, 2, "benchmarks", None, *args, "--json", tmp_path / "two.json")[0] == 0
    (found,) = json.loads((tmp_path / "two.json").read_text()).values()
    row = found["rows"][tiny_base.name]
    assert found["ranks"] == 2 and "step_seconds" not in row and row["weights_bytes"] < row["load_bytes"]
