"""Tensor parallelism: several ranks, each with a part of every layer, give the output of a single process."""

import json
import os
import signal
import time

import pytest
import torch
from click.testing import CliRunner
from helpers import KINDS, Ranks, copy_base, launch, make_adapter, peak_anonymous, error_lines, save_hugging_face
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
def test_rank_copies_its_part_from_any_number_of_files(pieces, ranks, cut, dim):
    whole = torch.arange(24 * 48.0).view(24, 48)
    files = list(whole.chunk(pieces, cut))
    for i, expected in enumerate(whole.chunk(ranks, dim)):
        target = torch.empty_like(expected)
        join(files, target, Part(dim, i, ranks))
        assert torch.equal(target, expected)


def save_base(kind, folder, tiny_base):
    """Save a base, and return its folder.

    `kind` is a key of KINDS, for a random model in Hugging Face's layout, or "two files", for `tiny_base` in two files
    of Meta's layout.
    """
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
    """Save a text-only adapter with L = 2 and an image adapter with L = 3, with nonzero gates; return their paths."""
    model, _ = load_llama(base)
    config = model.config
    shape = dict(length=5, dim=config.dim, heads=config.n_heads)
    image_adapter = ImageAdapter(
        layers=3, features=6, bottleneck=4, generator=torch.Generator().manual_seed(3), **shape
    )
    torch.nn.init.normal_(image_adapter.gates, generator=torch.Generator().manual_seed(4))
    for name, adapter in {"plain": make_adapter(model), "seeing": image_adapter}.items():
        adapter.save(folder / f"{name}.safetensors", base=base, base_layers=config.n_layers)
    return [str(folder / f"{name}.safetensors") for name in ("plain", "seeing")]


def make_requests():
    """Return requests for both adapters and the base, one of them with an image."""
    names = ["plain", "base", "seeing", "seeing"]
    features = [None, None, None, torch.linspace(-1, 1, 6)]
    return [Request(text, "", *about) for text, *about in zip(QUESTIONS, names, features)]


@torch.no_grad()
def respond(base, adapters, bits=None):
    """Return next-token logits, responses, the shapes of this rank's weights, and the size of its layers in bytes."""
    torch.set_num_threads(1)
    with inference_ranks():
        # With `bits`, decoding=True would pack layers if a speed measurement, unreliable for tiny layers, favors it.
        options = {"bits": bits, "decoding": bits is None}
        model, tokenizer, loaded = load_with_adapters(adapters, str(base), CPU, torch.float32, **options)
        responder = Responder(model, tokenizer, loaded, max_new_tokens=12)
        tokens, adaption_prompts = map(
            list, zip(*((responder.prompt_ids(r), responder.adaption_prompts(r)) for r in make_requests()))
        )
        cache = KVCache(model, batch=len(tokens), capacity=100)
        logits = prefill(model, tokens, concat_adaption_prompts(adaption_prompts), cache)
        texts = responder.respond_batch(make_requests())
    shapes = {name: list(weight.shape) for name, weight in model.named_parameters()}
    return logits.tolist(), texts, shapes, held_bytes(model.layers)


@pytest.mark.parametrize(
    "kind, world", [("mha", 2), ("mha", 4), ("gqa", 2), ("qwen2", 2), ("qwen3", 2), ("two files", 2)]
)
def test_ranks_give_the_same_logits_and_text(forks, kind, world, tiny_base, tmp_path):
    """Adapters with different L, the base and a request with an image share a batch. All ranks agree bit for bit."""
    base = save_base(kind, tmp_path / "base", tiny_base)
    adapters = save_adapters(base, tmp_path)
    logits, texts, shapes, _ = respond(base, adapters)
    results = Ranks(forks, world, respond, base, adapters).results()
    assert all(result[:2] == results[0][:2] for result in results)
    torch.testing.assert_close(torch.tensor(results[0][0]), torch.tensor(logits), rtol=1e-4, atol=1e-4)
    assert results[0][1] == texts and len(set(texts)) > 1
    for name, shape in shapes.items():
        for result in results:
            dim = 1 if ".wo." in name or ".w2." in name else 0
            cut = "layers." in name and "norm" not in name
            assert result[2][name] == [n // world if cut and d == dim else n for d, n in enumerate(shape)], name


@pytest.mark.parametrize("bits", ["8", "4"])
def test_quantized_parts_are_close_and_small(forks, bits, tiny_base, tmp_path):
    """Each rank quantizes its own part, and needs about half the memory.

    The error of the logits is at most about 1.5 times that of a single process.
    """
    base = save_base("mha", tmp_path / "base", tiny_base)
    adapters = save_adapters(base, tmp_path)
    results = Ranks(forks, 2, respond, base, adapters, bits).results()
    logits, held = (torch.tensor(respond(base, adapters, bits)[0]), respond(base, adapters, bits)[3])
    exact = torch.tensor(respond(base, adapters)[0])
    found = torch.tensor(results[0][0])
    assert results[1][0] == results[0][0] and (found - exact).norm() < 1.5 * (logits - exact).norm() + 1e-3
    for result in results:
        assert result[3] < 0.6 * held


PROGRAMS = {"generate": generate, "evaluate": evaluate, "benchmarks": benchmarks}


def run_alone(program, stdin, *args):
    """Run a command in this process; return its exit code, standard output and standard error."""
    result = CliRunner().invoke(PROGRAMS[program].main, list(map(str, args)), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def run_as_rank(program, stdin, args, spoil=None):
    """Run a command as one of several ranks.

    Only rank 0 reads `stdin`. On the other ranks, "two" in an argument becomes "nowhere/two". An output path that
    contains "two" is then in a missing folder, so that these ranks fail if they write.
    """
    if os.environ["RANK"] != "0":
        args = [str(arg).replace("two", "nowhere/two") for arg in args]
    launch(PROGRAMS[program].main, args, spoil, stdin or "")


def run_together(forks, world, program, stdin, *args):
    """Run a command on `world` ranks; return the first rank's exit code, standard output and standard error.

    All ranks must have the same exit code, and only the first may print.
    """
    first, *others = Ranks(forks, world, run_as_rank, program, stdin, args).results()
    assert all(code == first[0] and stdout == stderr == "" for code, stdout, stderr in others), others
    return first


def test_generate_on_ranks_equals_a_single_process(forks, tiny_base, tiny_adapter, tmp_path):
    """Responses to a prompt, to piped lines and to a file are sampled. Only the first rank reads standard input."""
    options = ["--adapter", tiny_adapter, "--device", "cpu", "--max-new-tokens", 6, "--temperature", 1]
    for more, stdin in ((["What?", "--compare"], None), ([], "What?\n\nWho is it?\n")):
        alone = run_alone("generate", stdin, *options, *more)
        assert alone[0] == 0 and run_together(forks, 2, "generate", stdin, *options, *more)[:2] == alone[:2]
    file = tmp_path / "asked.jsonl"
    names = ["a", None, "a"]
    file.write_text("".join(json.dumps({"instruction": q, "adapter": a}) + "\n" for q, a in zip(QUESTIONS, names)))
    run_alone("generate", None, *options, "--prompts", file, "--out", tmp_path / "alone.jsonl")
    code, _, _ = run_together(forks, 2, "generate", None, *options, "--prompts", file, "--out", tmp_path / "two.jsonl")
    assert code == 0 and read_records(tmp_path / "two.jsonl") == read_records(tmp_path / "alone.jsonl")


def test_evaluate_on_ranks_equals_a_single_process(forks, tiny_adapter, tmp_path):
    path = save_problems(tmp_path, image=None)
    args = ["scienceqa", "--data", path, "--adapter", tiny_adapter, "--device", "cpu", "--choose"]
    args += ["--max-new-tokens", 3]
    alone = run_alone("evaluate", None, *args, "--out", tmp_path / "alone")
    assert alone[0] == 0 and run_together(forks, 2, "evaluate", None, *args, "--out", tmp_path / "two")[:2] == alone[:2]
    written = {file.name: file.read_text() for file in (tmp_path / "alone").iterdir()}
    assert written and written == {file.name: file.read_text() for file in (tmp_path / "two").iterdir()}
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["hi"], "the base's n_kv_heads, 2, cannot be split evenly over 3 processes"),
        (["hi", "--device", "cuda:0"], "--device cuda:0: with several processes, each has its own device"),
        (["--raw", "--input", "b", "hi"], "--input is a field of the template"),
        (["--prompts", "none.jsonl", "--out", "out.jsonl"], ""),
        (["hi", "--adapter", "none.safetensors"], "none.safetensors: no such adapter file"),
    ],
)
def test_bad_input_is_reported_once(forks, tiny_base, tmp_path, more, message):
    more = [tmp_path / word if word == "out.jsonl" else word for word in more]
    results = Ranks(forks, 3, run_as_rank, "generate", None, ["--base", tiny_base, *more]).results()
    (line,) = error_lines(results)
    assert line.startswith(f"error: rank 0: {message}")
    assert results[0][0] == 2 and all(stdout == "" for _, stdout, _ in results)


def kill_at_fourth_token(_):
    """Make rank 1 kill itself at its fourth decoding step."""
    decode_step, calls = generate.decode_step, []

    def killing_step(*args):
        calls.append(1)
        if len(calls) == 4 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode_step(*args)

    generate.decode_step = killing_step


def test_lost_rank_ends_all_ranks(forks, tiny_base):
    start = time.monotonic()
    args = ["--base", tiny_base, "--device", "cpu", "--raw", "--max-new-tokens", 500, "hi"]
    results = Ranks(forks, 2, run_as_rank, "generate", None, args, kill_at_fourth_token).results()
    assert [code for code, _, _ in results] == [-signal.SIGTERM, -signal.SIGKILL]  # torchrun reports the kill
    assert "Traceback" not in results[0][2] and time.monotonic() - start < 30


def hide_gpu_of_rank_1(rank):
    """Make the GPU of rank 1 unavailable, as if there were more ranks than GPUs."""

    def fail(*_):
        raise ValueError("device 'cuda:1' is not available")

    if rank == 1:
        generate.select_device = fail


def test_error_of_one_rank_is_reported(forks, tiny_base):
    args = ["--base", tiny_base, "--raw", "hi"]
    results = Ranks(forks, 2, run_as_rank, "generate", None, args, hide_gpu_of_rank_1).results()
    (line,) = error_lines(results)
    assert line.startswith("error: rank 1: device 'cuda:1' is not available") and results[1][0] == 2


def test_unexpected_weight_is_a_one_line_error(tiny_base, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    weights = torch.load(base / "consolidated.00.pth", weights_only=True) | {"logit_scale": torch.ones(1)}
    torch.save(weights, base / "consolidated.00.pth")
    code, _, stderr = run_alone("generate", None, "--base", base, "--raw", "hi")
    assert code == 2 and "has the weight logit_scale, but its configuration" in stderr


def measure_loading(tiny_base, base):
    """Load a base, or this rank's part. Return the size of the weights and the peak growth of memory, in bytes."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        init_distributed()

    def load(path):
        return load_part_of_rank(path, *read_base(path), torch.float32, CPU)

    load(tiny_base)  # allocates the libraries' own memory, which must not be counted
    model, peak = peak_anonymous(lambda: load(base))
    return held_bytes(model), peak


def test_rank_needs_memory_only_for_its_part(forks, tiny_base, large_base):
    (whole, _), ranks = measure_loading(tiny_base, large_base), Ranks(forks, 2, measure_loading, tiny_base, large_base)
    for size, peak in ranks.results():
        assert size < 0.55 * whole and peak < 1.15 * size


@pytest.mark.parametrize("world", [2, 4])
def test_third_party_models_write_the_same_text(forks, data, world):
    """The models have 4 and 8 key/value heads."""
    for base in (data / "stories260K", data / "models" / "tinystories3.8M"):
        args = ["--base", base, "--device", "cpu", "--raw", "--greedy", "--max-new-tokens", 16, "Once upon a time"]
        alone = run_alone("generate", None, *args)
        assert alone[0] == 0 and run_together(forks, world, "generate", None, *args)[:2] == alone[:2]


def test_load_benchmark_measures_the_part_of_a_rank(forks, tiny_base, tmp_path):
    args = ["load", "--base", tiny_base, "--device", "cpu", "--new", 3]
    assert run_together(forks, 2, "benchmarks", None, *args, "--json", tmp_path / "two.json")[0] == 0
    (found,) = json.loads((tmp_path / "two.json").read_text()).values()
    row = found["rows"][tiny_base.name]
    assert found["ranks"] == 2 and "step_seconds" not in row and row["weights_bytes"] < row["load_bytes"]
