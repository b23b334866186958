"""Sampling, batched decoding, and the command generate.py."""

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from click.testing import CliRunner
from helpers import KINDS, ROOT, chat_in_process, chat_on_terminal, make_adapter, make_model, make_tokens
from helpers import save_hugging_face

from adapter import Adapter, AdaptionPrompt
from data import Request, Turn, format_prompt
from formats.bases import base_fingerprint, load_llama, read_base
from encoders.heads import HeadAdapter
from formats.loading import load_with_adapters
from formats.requests import read_requests
from generate import Responder, Sampling, decode_step, generate, main, prefill, sample, stream, text_pieces
from model import KVCache
from runtime.compilation import compile_decoding
from runtime.decoding import prepare_to_decode


def run(*args, input=None):
    """Run generate.py in this process, and return click's Result. Standard input is an empty pipe by default."""
    return CliRunner().invoke(main, [str(arg) for arg in args], input=input)


def greedy_without_cache(model, tokens, adaption_prompts, steps):
    """Return the new tokens of greedy decoding that recomputes everything at each step."""
    tokens = list(tokens)
    for _ in range(steps):
        tokens.append(model(torch.tensor([tokens]), adaption_prompts)[0, -1].argmax().item())
    return tokens[-steps:]


def test_batched_generation_equals_one_prompt_at_a_time():
    model = make_model()
    adaption_prompts = make_adapter(model)()
    rows = [make_tokens(model, n, seed=n).tolist() for n in (9, 1, 4)]
    responses = generate(model, rows, adaption_prompts, max_new_tokens=8)
    assert responses == [greedy_without_cache(model, row, adaption_prompts, 8) for row in rows]
    assert responses != generate(model, rows, max_new_tokens=8)


def test_compiled_decoding_equals_eager_decoding():
    """After the second cache size, prompts and responses of different lengths need no recompilation."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    model = make_model()
    adaption_prompts = make_adapter(model)()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    prepared = deepcopy(model)  # prepare_to_decode replaces its linear layers
    prepare_to_decode(prepared, compiled=True)
    compiled = compile_decoding(decode_step, prepared)
    for length in (5, 9, 14):
        row = [make_tokens(model, length, seed=length).tolist()]
        expected = generate(model, row, adaption_prompts, max_new_tokens=12)
        assert generate(prepared, row, adaption_prompts, max_new_tokens=12, decode_step=compiled) == expected
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    )  # one for the first cache size, one for all others


def test_missing_compiler_is_reported(tiny_adapter, monkeypatch):
    monkeypatch.setattr("runtime.compilation.shutil.which", lambda name: None)
    result = run("--adapter", tiny_adapter, "--device", "cpu", "--compile", "Hello.")
    assert result.exit_code == 2 and "needs a C++ compiler" in result.output


def test_each_row_stops_at_its_own_eos():
    """Decoding ends when every row has stopped. (The authors' inference code does not stop at EOS.)"""
    model = make_model()
    rows = [make_tokens(model, 5, seed=n).tolist() for n in range(3)]
    full = generate(model, rows, max_new_tokens=12)
    eos = full[1][3]
    stopped = generate(model, rows, max_new_tokens=12, end_ids=[eos])
    for expected, found in zip(full, stopped):
        assert found == (expected[: expected.index(eos)] if eos in expected else expected)
    assert len(stopped[1]) < 12
    assert len(list(stream(model, rows[1:2], sampling=Sampling(12, end_ids=[eos])))) == len(stopped[1])


def test_repetition_penalty_equals_that_of_transformers(tiny_base, tmp_path):
    """The penalty covers prompt and new tokens, also in a batch with rows of different lengths, and with a cache."""
    transformers = pytest.importorskip("transformers")
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    theirs.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    model, _ = load_llama(tmp_path / "hf")
    rows = [make_tokens(model, n, seed=n).tolist() for n in (9, 1, 4)]
    plain = generate(model, rows, max_new_tokens=20)
    for penalty in (1.3, 0.8):
        options = {"max_new_tokens": 20, "repetition_penalty": penalty}
        expected = [
            theirs.generate(torch.tensor([row]), do_sample=False, **options)[0, len(row) :].tolist() for row in rows
        ]
        assert generate(model, rows, **options) == expected != plain
        cache = KVCache(model, 1, 40)
        with torch.no_grad():
            prefill(model, [rows[0][:5]], (), cache)
        steps = stream(model, [rows[0][5:]], (), Sampling(**options), cache=cache, cached=[rows[0][:5]])
        assert [ids[0] for ids in steps] == expected[0]


class ByteTokenizer:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    "stop, expected",
    [
        ((), "one two 🦙 twice"),
        (("tw",), "one "),
        (("twi",), "one two 🦙 "),
        (("two x", "🦙 tw"), "one two "),
        (("e", "one"), ""),
        (("ce!", "twice more"), "one two 🦙 twice"),
    ],
)
def test_text_pieces_end_before_a_stop_string(stop, expected):
    """No part of a stop string is emitted; text that only begins like one is emitted later."""
    content = "one two 🦙 twice".encode()
    ids = []
    pieces = list(text_pieces(iter([[byte] for byte in content]), ByteTokenizer(), ids, stop))
    assert "".join(pieces) == expected
    assert len(ids) == min(
        (len(content[: content.index(s.encode())] + s.encode()) for s in stop if s.encode() in content),
        default=len(content),
    )
    if not stop:
        assert [piece for piece in pieces if piece] == list("one two 🦙 twice")
    if stop == ("twi",):
        assert "two" in pieces and "tw" not in pieces


def test_each_row_of_a_batch_ends_before_a_stop_string(tiny_base, tiny_adapter):
    """Each row gets the same response as if it were generated alone. Decoding ends when the last row has ended."""
    _, _, adapters = loaded = load_with_adapters([str(tiny_adapter)], None, torch.device("cpu"), torch.float32)
    unlimited = Responder(*loaded, max_new_tokens=30)
    requests = [Request(text, adapter=name) for text in ("Hi", "the cat sat", "Who?") for name in ("base", *adapters)]
    texts = unlimited.respond_batch(requests)
    stop = [texts[0][4:7], texts[2][9:11], "absent"]
    steps = []

    def counting_step(*args):
        steps.append(1)
        return decode_step(*args)

    responder = Responder(*loaded, max_new_tokens=30, stop=stop)
    responder.decode_step = counting_step
    truncated = responder.respond_batch(requests)
    assert truncated == ["".join(responder.respond(request)) for request in requests] != texts
    for text, response in zip(texts, truncated):
        assert response == text[: min((text.index(each) for each in stop if each in text), default=len(text))]
    steps.clear()
    responder.respond_batch(requests[:1])
    assert len(steps) < 20
    with pytest.raises(ValueError, match="--stop: the string is empty"):
        Responder(*loaded, stop=[""])


@pytest.mark.parametrize("prompt", ["-5 + 3?", "- one", "--- title"])
def test_prompt_with_a_leading_dash_needs_a_double_dash(tiny_adapter, prompt):
    args = ("--adapter", tiny_adapter, "--greedy", "--device", "cpu", "--max-new-tokens", 3)
    result = run(*args, prompt)
    assert result.exit_code == 2 and result.stderr.endswith("; if this is the prompt, put -- before it.\n")
    assert run(*args, "--", prompt).exit_code == 0


def test_stop_and_repetition_penalty_options_change_the_text(tiny_adapter):
    args = ("--adapter", tiny_adapter, "--greedy", "--device", "cpu", "Hello")
    text = run(*args).stdout
    assert len(text) > 8
    result = run(*args, "--stop", "absent", "--stop", text[5:8])
    assert result.stdout == text[: text.index(text[5:8])] + "\n"
    assert run(*args, "--repetition-penalty", 1.5).stdout != text
    assert "--stop: the string is empty" in run(*args, "--stop", "").stderr


def test_next_generation_uses_updated_prompts():
    """lit-llama caches projected prompts in the module, where they go stale; here they belong to one generation."""
    model = make_model()
    adapter = make_adapter(model)
    row = [make_tokens(model, 5).tolist()]
    before = generate(model, row, adapter(), max_new_tokens=8)
    with torch.no_grad():
        adapter.prompts.mul_(-2)
    after = generate(model, row, adapter(), max_new_tokens=8)
    assert after[0] == greedy_without_cache(model, row[0], adapter(), 8) != before[0]
    model(torch.tensor(row), adapter()).sum().backward()  # the cache does not break autograd
    assert adapter.prompts.grad.abs().sum() > 0


def test_one_batch_can_mix_adapters():
    """Adaption prompts of several adapters are concatenated along B."""
    model = make_model()
    prompts_by_adapter = [make_adapter(model, seed=seed)() for seed in (1, 5)]
    mixed = [AdaptionPrompt(*(torch.cat(parts) for parts in zip(*layer))) for layer in zip(*prompts_by_adapter)]
    rows = [make_tokens(model, n, seed=n).tolist() for n in (6, 3)]
    responses = generate(model, rows, mixed, max_new_tokens=6)
    assert responses == [generate(model, [r], p, max_new_tokens=6)[0] for r, p in zip(rows, prompts_by_adapter)]


def test_sampling_is_nucleus_sampling():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    random = torch.Generator().manual_seed(0)

    def shares(temperature, top_p):
        drawn = sample(logits, temperature, top_p, random)
        return (drawn.bincount(minlength=4) / 4000).tolist()

    assert shares(1.0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(1.0, 0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)  # 0.5 < 0.7 <= 0.5 + 0.3
    assert shares(1.0, 0.01) == [1, 0, 0, 0]
    assert shares(0.5, 1.0) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.03)  # squared and normalized
    assert shares(0.0, 1.0) == [1, 0, 0, 0]


def test_sampling_depends_only_on_its_generator():
    model = make_model()
    row = [make_tokens(model, 5).tolist()]
    options = dict(max_new_tokens=10, temperature=1.0)
    first, again, other = (
        generate(model, row, generator=torch.Generator().manual_seed(seed), **options) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_text_streams_whole_characters(tiny_base):
    """A character of four byte tokens is emitted once, as a whole."""
    _, tokenizer = load_llama(tiny_base)
    text = "Ein 🦙 in Lima"
    ids = tokenizer.encode(text)
    pieces = list(text_pieces(iter([[i] for i in ids]), tokenizer, []))
    assert "".join(pieces) == text
    assert len(pieces) > 5 and not any("\ufffd" in piece for piece in pieces)
    assert list(text_pieces(iter([]), tokenizer, [])) == [""]


def test_stories260k_writes_the_published_text(data):
    """The author of llama2.c publishes this text for this checkpoint."""
    expected = json.loads((data / "stories260K" / "expected_greedy.json").read_text())
    result = run("--base", data / "stories260K", "--raw", "--greedy", "--max-new-tokens", 256, "")
    assert result.exit_code == 0
    assert result.stdout == expected["text_256"] + "\n"
    model, _ = load_llama(data / "stories260K")
    assert generate(model, [[1]], max_new_tokens=256)[0] == expected["ids_bos_plus_256"][1:]


def test_stdout_contains_only_the_response(tiny_adapter):
    result = run("--adapter", tiny_adapter, "--greedy", "--max-new-tokens", 8, "Name the capital of Peru.")
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.endswith("\n") and len(result.stdout) > 1
    alone = run(
        "--adapter", tiny_adapter, "--greedy", "--max-new-tokens", 8, "--strength", 0, "Name the capital of Peru."
    )
    assert alone.stdout != result.stdout
    both = run("--adapter", tiny_adapter, "--greedy", "--max-new-tokens", 8, "--compare", "Name the capital of Peru.")
    assert both.stdout == f"base: {alone.stdout}a: {result.stdout}"


def test_prompt_and_sampling_options_reach_the_model(tiny_adapter, tiny_base, monkeypatch):
    """The prompt is the template with or without an input, or the raw text, after <bos>."""
    seen = []

    def stream(model, tokens, adaption_prompts, sampling, decode_step):
        seen.append((*tokens, sampling, decode_step))
        return iter([])

    monkeypatch.setattr("generate.stream", stream)
    _, tokenizer = load_llama(tiny_base)
    for args, text in [
        (["cat"], format_prompt("cat")),
        (["--input", "Peru", "cat"], format_prompt("cat", "Peru")),
        (["--raw", "cat"], "cat"),
        (["--raw", ""], ""),
    ]:
        assert run("--adapter", tiny_adapter, *args).exit_code == 0
        tokens, sampling, used_step = seen.pop()
        assert tokens == [tokenizer.start_ids[0], *tokenizer.encode(text)]
        assert sampling.generator.initial_seed() == 0 and used_step is decode_step
        # The defaults are the paper's (OpenGVLab issue 133).
        assert sampling[:4] == (256, 0.1, 0.75, set(tokenizer.end_ids))
    more = ["--temperature", 0.5, "--top-p", 0.9, "--seed", 7, "--max-new-tokens", 3]
    run("--adapter", tiny_adapter, *more, "cat")
    _, sampling, _ = seen.pop()
    assert sampling.generator.initial_seed() == 7 and sampling[:4] == (3, 0.5, 0.9, set(tokenizer.end_ids))
    run("--adapter", tiny_adapter, "--greedy", "cat")
    assert seen.pop()[1].temperature == 0


def test_response_is_printed_while_it_is_generated(tiny_adapter, monkeypatch):
    import click

    events = []
    echo = click.echo
    monkeypatch.setattr("generate.text_pieces", lambda *_: (events.append(p) or p for p in ("The ", "cat")))
    monkeypatch.setattr(
        "click.echo", lambda text="", **options: events.append(("shown", text)) or echo(text, **options)
    )
    run("--adapter", tiny_adapter, "hello")
    shown = [event for event in events if event not in (("shown", ""), ("shown", "\n"))]
    assert shown == ["The ", ("shown", "The "), "cat", ("shown", "cat")]


def test_base_option_overrides_the_adapter_file(tiny_base, tmp_path):
    Adapter(layers=2, length=3, dim=16, heads=2).save(tmp_path / "a.safetensors", base="/gone")
    args = ("--adapter", tmp_path / "a.safetensors", "--max-new-tokens", 1)
    assert "/gone: no such base model; " in run(*args, "hello").stderr
    result = run(*args, "--base", tiny_base, "hello")
    assert result.exit_code == 0 and result.stderr == ""  # an adapter without a fingerprint causes no warning


def test_each_piped_line_gets_one_output_line(tiny_adapter, monkeypatch):
    def two_lines(ids, tokenizer, so_far, stop):
        yield "one\n"
        yield "two"

    monkeypatch.setattr("generate.text_pieces", two_lines)
    args = ("--adapter", tiny_adapter)
    result = run(*args, input="Name the capital of Peru.\r\n\nTranslate cat into French.")
    assert result.stdout == "one\\ntwo\n" * 3 and result.stderr == ""
    both = run(*args, "--compare", input="Hello\nHello\n")
    assert both.stdout == "base: one\\ntwo\ta: one\\ntwo\n" * 2
    assert run(*args, "Hello").stdout == "one\ntwo\n"


def test_piped_lines_get_the_same_responses_as_single_prompts(tiny_adapter):
    args = ("--adapter", tiny_adapter, "--greedy", "--max-new-tokens", 9)
    lines = ["Name the capital of Peru.", "Translate cat into French."]
    expected = [run(*args, line).stdout for line in lines]
    assert run(*args, input="\n".join(lines)).stdout == "".join(expected)


def test_closed_standard_input_is_an_error_only_without_a_prompt(tiny_adapter):
    """Standard input may be closed, for example under cron."""
    command = f"{sys.executable} generate.py --adapter {tiny_adapter} --max-new-tokens 2"
    for more, code in ((" hello", 0), ("", 2)):
        result = subprocess.run(
            command + more + " <&-", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "nothing to run"),
        (["--base", "absent"], "absent: no such base model"),
        (["--adapter", "absent.safetensors"], "absent.safetensors: no such adapter file"),
        (["--compare", "--base", "BASE"], "--compare needs --adapter"),
        (["--base", "BASE", "--adapter", ""], "contains neither adapter.safetensors"),
        (["--base", "BASE", "--raw", "--input", "x"], "--input is a field of the template"),
        (["--adapter", "STRANGE"], "unknown prompt template 'strange'"),
        (["--adapter", "OTHER", "--base", "BASE"], "does not fit"),
        (["--adapter", "ORPHAN"], "give --base"),
        (["--adapter", "ADAPTER", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_bad_input_is_a_one_line_error(tiny_base, tiny_adapter, tmp_path, args, message):
    Adapter(layers=2, length=3, dim=64, heads=2).save(tmp_path / "other.safetensors", base=tiny_base)
    Adapter(layers=2, length=3, dim=16, heads=2).save(tmp_path / "orphan.safetensors")
    Adapter(layers=2, length=3, dim=16, heads=2).save(
        tmp_path / "strange.safetensors", base=tiny_base, prompt_template="strange"
    )
    names = {
        "STRANGE": tmp_path / "strange.safetensors",
        "BASE": tiny_base,
        "ADAPTER": tiny_adapter,
        "OTHER": tmp_path / "other.safetensors",
        "ORPHAN": tmp_path / "orphan.safetensors",
    }
    result = run(*(names.get(arg, arg) for arg in args), "hello")
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize("option", ["--temperature", "--top-p", "--strength"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_non_finite_and_negative_options_are_refused(option, value):
    result = run("--base", "any", option, value, "hello")
    assert result.exit_code == 2 and option in result.stderr


@pytest.mark.parametrize("sampling", [dict(temperature=1e-40), dict(temperature=1.0, top_p=1e-300)])
def test_extreme_sampling_options_are_greedy(sampling):
    model = make_model()
    row = [make_tokens(model, 5).tolist()]
    assert generate(model, row, max_new_tokens=5, **sampling) == generate(model, row, max_new_tokens=5)


@pytest.fixture(scope="module")
def chef_and_poet(tiny_base, tmp_path_factory):
    """Paths of two adapters for one base, chef.safetensors with L = 3 and poet.safetensors with L = 1."""
    model, _ = load_llama(tiny_base)
    paths = []
    for name, layers, seed in (("chef", 3, 1), ("poet", 1, 5)):
        adapter = make_adapter(model, layers=layers, seed=seed)
        torch.nn.init.constant_(adapter.gates, 2.0)
        paths.append(tmp_path_factory.mktemp("adapters") / f"{name}.safetensors")
        adapter.save(paths[-1], base=tiny_base, base_layers=3, base_fingerprint=base_fingerprint(*read_base(tiny_base)))
    return paths


def test_prompts_file_can_mix_adapters_in_one_batch(chef_and_poet, tiny_base, tmp_path, monkeypatch):
    """Adapters with different L and the base share a batch. Every output equals that of a separate run."""
    import generate as module

    chef, poet = chef_and_poet
    records = [
        {"instruction": "Name the capital of Peru.", "adapter": "chef", "id": 7},
        {"instruction": "Translate this word into French.", "input": "cat", "adapter": "poet"},
        {"instruction": "Name the capital of Peru.", "adapter": None},
        {"instruction": "Name the capital of Peru."},  # uses the first adapter
        {"instruction": "Hello", "adapter": "poet"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    batches = []
    monkeypatch.setattr(
        module, "stream", lambda model, tokens, *a, **o: batches.append(len(tokens)) or stream(model, tokens, *a, **o)
    )
    adapters = ["--adapter", chef, "--adapter", poet, "--greedy", "--max-new-tokens", 9]
    result = run(*adapters, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert batches == [5] and "5/5" in result.stderr
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    for record, output, adapter in zip(records, written, (chef, poet, None, chef, poet)):
        source = ["--adapter", adapter] if adapter else ["--base", tiny_base]
        alone = run(
            *source, "--greedy", "--max-new-tokens", 9, "--input", record.get("input", ""), record["instruction"]
        )
        assert output == record | {"output": alone.stdout[:-1]}
    assert len({output["output"] for output in written}) > 2
    result = run(*adapters, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "two.jsonl", "--batch-size", 2)
    assert batches[-3:] == [2, 2, 1]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_each_row_of_a_batch_ends_at_the_context_length(data, tmp_path):
    """One prompt has about 400 tokens, and the context is 512, so its row gets fewer new tokens than the other row."""
    args = ("--base", data / "stories260K", "--raw", "--greedy", "--max-new-tokens", 130)
    records = [{"instruction": "Once upon a time " * 80}, {"instruction": "Once"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    result = run(*args, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    outputs = [json.loads(line)["output"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = [run(*args, record["instruction"]).stdout[:-1] for record in records]
    assert outputs == expected


@pytest.mark.parametrize(
    "records, message",
    [
        ('{"instruction": "a", "adapter": "cook"}', "record 0: adapter 'cook' is not one of ['base', 'chef', 'poet']"),
        ('{"instruction": "a"}\n{"input": "b"}', "record 1: has no field 'instruction'"),
        ("", "contains no records"),
        ("7", "record 0: is 7, not an object with 'instruction'"),
        ('["instruction"]', 'record 0: is "instruction", not an object'),
        ('{"instruction": "a", "adapter": []}', "record 0: adapter"),
        ('{"instruction": "a", "adapter": ["chef"]}', "record 0: adapter"),
    ],
)
def test_bad_prompts_files_are_reported(chef_and_poet, tmp_path, records, message):
    chef, poet = chef_and_poet
    (tmp_path / "in.jsonl").write_text(records)
    files = ["--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]
    result = run("--adapter", chef, "--adapter", poet, *files)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out.jsonl").exists()


def test_requests_can_contain_conversations_and_images(tmp_path):
    """The output of an earlier run and the placeholder <image> are not part of the prompt."""
    (tmp_path / "a.png").touch()
    turns = [
        {"from": "human", "value": "<image>\nHi"},
        {"from": "gpt", "value": "Ho"},
        {"from": "human", "value": "Why?"},
    ]
    records = [
        {"instruction": "Why?", "input": "1", "output": "-", "system": "Be kind.", "history": [["Hi", "Ho"]]},
        {"conversations": turns, "image": "a.png", "adapter": "chef"},
        {"instruction": "Look.\n<image>", "input": "1", "image": "a.png", "adapter": "chef"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    _, requests, images = read_requests(str(tmp_path / "in.jsonl"), ["base", "chef"], "base", None)
    history = [Turn("user", "Hi"), Turn("assistant", "Ho")]
    assert requests == [
        Request("Why?\n\n1", history=[Turn("system", "Be kind."), *history]),
        Request("Why?", adapter="chef", history=history),
        Request("Look.", "1", "chef", history=[]),
    ]
    assert images.keys() == {1, 2}
    (tmp_path / "in.jsonl").write_text(json.dumps({"conversations": turns[:2]}))
    with pytest.raises(ValueError, match="record 0: does not end with a user turn"):
        read_requests(str(tmp_path / "in.jsonl"), ["base"], "base", None)


def test_adapters_that_cannot_be_combined_are_refused(chef_and_poet, tiny_base, tmp_path):
    chef, poet = chef_and_poet
    assert "the name 'chef' is taken" in run("--adapter", chef, "--adapter", chef, "hi").stderr
    result = run("--adapter", chef, "--adapter", f"cook={chef}", "--compare", "--max-new-tokens", 1, "hi")
    assert result.exit_code == 0 and "cook: " in result.stdout
    Adapter(layers=1, length=9, dim=16, heads=2).save(tmp_path / "long.safetensors", base=tiny_base)
    (tmp_path / "in.jsonl").write_text('{"instruction": "a"}')
    files = ["--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]
    both = ["--adapter", chef, "--adapter", tmp_path / "long.safetensors"]
    assert run(*both, *files, "--max-new-tokens", 1).exit_code == 0  # only the first adapter is used
    (tmp_path / "in.jsonl").write_text('{"instruction": "a", "adapter": "long"}\n{"instruction": "a"}')
    result = run(*both, *files)
    assert result.exit_code == 2 and "different K (prompt embeddings per layer) cannot share a batch" in result.stderr
    assert "--prompts and --out must be used together" in run("--adapter", chef, *files[:2]).stderr
    for more in (["hi"], ["--compare"], ["--input", "x"]):
        assert "--prompts already contains all prompts" in run("--adapter", chef, *files, *more).stderr
    for out in (tmp_path, tmp_path / "absent" / "out.jsonl"):
        result = run("--adapter", chef, *files[:3], out)
        assert result.exit_code == 2 and str(out) in result.stderr and result.stderr.count("\n") == 1


def test_output_records_keep_their_other_fields(chef_and_poet, tmp_path):
    """Unpaired surrogates in other fields are kept, and an earlier output is replaced."""
    line = '{"instruction": "Hi", "id": "\\ud800", "name": "für", "output": null}'
    (tmp_path / "in.jsonl").write_text(line, encoding="utf-8")
    files = ["--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]
    assert run("--adapter", chef_and_poet[0], *files, "--max-new-tokens", 3).exit_code == 0
    written = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert written | {"output": None} == json.loads(line) and written["output"]


def test_compare_prints_the_base_and_every_adapter(chef_and_poet):
    chef, poet = chef_and_poet
    result = run("--adapter", chef, "--adapter", poet, "--compare", "--max-new-tokens", 3, "hi")
    assert [line.split(":")[0] for line in result.stdout.splitlines() if ": " in line] == ["base", "chef", "poet"]


def test_twenty_adapters_need_only_their_own_memory(tmp_path):
    """The adapters have LLaMA-7B's shape, 4.9 MB each in float32, and their output is also kept in bfloat16."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    Adapter(layers=30, length=10, dim=4096, heads=32).save(tmp_path / "a.safetensors")
    code = (
        "import torch\n"
        "from formats.adapters import load_adapter\n"
        "def anonymous(): return 1024 * int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])\n"
        f"def ready(): a = load_adapter({str(tmp_path / 'a.safetensors')!r}); return a, a(dtype=torch.bfloat16)\n"
        "with torch.no_grad(): first = ready(); before = anonymous(); twenty = [ready() for _ in range(20)]\n"
        "print(anonymous() - before)"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # makes glibc return freed memory at once
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    expected = 20 * 1_229_760 * (4 + 2)  # bytes in float32, and cast to bfloat16
    assert 0.95 * expected < int(result.stdout) < 1.05 * expected


def test_empty_row_is_refused():
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        generate(make_model(), [[1], []], max_new_tokens=2)


def test_base_with_different_weights_causes_a_warning(tiny_base, tmp_path):
    Adapter(layers=2, length=3, dim=16, heads=2).save(tmp_path / "a.safetensors", base=tiny_base, base_fingerprint="x")
    result = run("--adapter", tmp_path / "a.safetensors", "--max-new-tokens", 1, "hello")
    assert result.exit_code == 0
    assert "warning" in result.stderr and "other weights" in result.stderr


def test_context_length_limits_prompts_and_responses(data):
    args = ("--base", data / "stories260K", "--raw", "--greedy", "--max-new-tokens", 2)
    result = run(*args, "Once upon a time " * 200)
    assert result.exit_code == 2
    assert "tokens; expected fewer than 512, the context length" in result.stderr
    truncated = run(*args[:-1], 10**5, "Once upon a time " * 80)  # 400 tokens of 512
    assert truncated.exit_code == 0 and 50 < len(truncated.stdout) < 1000
    mixed = run(*args, input="Once upon a time " * 200 + "\nOnce\n")
    assert mixed.exit_code == 0 and "tokens; expected fewer than 512, the context length" in mixed.stderr
    assert len(mixed.stdout.splitlines()) == 2


def test_terminal_starts_a_conversation(tiny_adapter):
    stdout, stderr = chat_on_terminal(
        "Name the capital of Peru.\n\nTranslate cat into French.\n", "--adapter", tiny_adapter
    )
    assert len(stdout.splitlines()) >= 2
    assert stderr.count("> ") == 4  # the empty line in between is skipped


def test_conversation_can_switch_adapters(chef_and_poet, tiny_base):
    chef, poet = chef_and_poet
    lines = "Hello\n/adapter poet\nHello\n/none\nHello\n/adapter cook\nHello\n/adapter chef\nHello\n"
    stdout, stderr = chat_in_process(lines, "--adapter", chef, "--adapter", poet)
    args = ("--greedy", "--max-new-tokens", 5, "Hello")
    by_chef, by_poet = (run("--adapter", adapter, *args).stdout for adapter in (chef, poet))
    by_base = run("--base", tiny_base, *args).stdout
    assert stdout == by_chef + by_poet + by_base + "\n" + by_base + by_chef
    assert "there is no adapter 'cook'; choose from base, chef, poet" in stderr
    assert len({by_chef, by_poet, by_base}) == 3


def test_conversation_has_help_and_exit_commands(tiny_adapter):
    for word in ("exit", "/quit"):
        stdout, stderr = chat_in_process(f"/help\n{word}\nHello\n", "--adapter", tiny_adapter)
        assert stdout == "" and stderr.count("Every line is a separate instruction. /adapter NAME") == 2


def test_empty_pipe_is_an_error(tiny_adapter):
    result = run("--adapter", tiny_adapter, input="")
    assert result.exit_code == 2 and result.stderr == "error: there is no PROMPT, and standard input is empty\n"
    assert run("--adapter", tiny_adapter, "--max-new-tokens", 1, input="\n").exit_code == 0


def test_adapter_option_accepts_the_folder_of_a_run(tiny_adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter.safetensors").write_bytes(tiny_adapter.read_bytes())
    args = ("--greedy", "--max-new-tokens", 3, "Hello")
    assert run("--adapter", tmp_path / "out", *args).stdout == run("--adapter", tiny_adapter, *args).stdout


def test_encoder_adapter_is_refused_with_its_task(tiny_base, tmp_path):
    adapter = HeadAdapter(widths=[16, 3], layers=2, length=3, dim=16, heads=2)
    adapter.save(tmp_path / "a.safetensors", task="image-classification")
    result = run("--base", tiny_base, "--adapter", tmp_path / "a.safetensors", "Hello")
    assert (
        result.exit_code == 2 and "a.safetensors: was trained for image-classification on an encoder" in result.stderr
    )


def test_bad_out_is_reported_before_the_base_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"instruction": "Hello"}')
    monkeypatch.setattr("generate.load_with_adapters", lambda *_: 1 / 0)
    result = run("--base", "x", "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "no" / "out.jsonl")
    assert result.exit_code == 2 and "no does not exist" in result.stderr


def test_line_that_is_not_utf_8_affects_no_other_line(tiny_adapter):
    """A byte order mark at the beginning does not reach the model."""
    args = [sys.executable, "generate.py", "--adapter", tiny_adapter, "--greedy", "--max-new-tokens", "3"]
    result = subprocess.run(
        list(map(str, args)), input=b"\xef\xbb\xbfHello\n\xff\nHello\n", capture_output=True, cwd=ROOT
    )
    first, middle, last, *_ = result.stdout.decode().split("\n")
    assert first == last != "" and middle == ""
    message = "error: standard input: line 2: the text has an unpaired surrogate, or bytes that are not UTF-8"
    assert result.stderr.decode().strip() == message


def test_cache_is_bounded_if_the_base_has_no_context_length(tiny_adapter, monkeypatch):
    sizes = []

    class Cache(KVCache):
        def __init__(self, model, batch, capacity):
            sizes.append(capacity)
            super().__init__(model, batch, capacity)

    monkeypatch.setattr("generate.KVCache", Cache)
    monkeypatch.setattr("generate.UNSTATED_CONTEXT", 200)
    assert run("--adapter", tiny_adapter, "--max-new-tokens", 2_000_000, "Hello").exit_code == 0
    assert max(sizes) == 200


def test_control_characters_in_file_names_are_escaped(tiny_adapter, tmp_path):
    name = tmp_path / "a\x1b[31m.safetensors"
    shutil.copy(tiny_adapter, name)
    args = ("--adapter", name, "--compare", "--max-new-tokens", 1)
    for result in (run(*args, "Hello"), run(*args, input="Hello\n")):
        assert result.exit_code == 0 and "a\\x1b[31m: " in result.stdout and "\x1b" not in result.stdout
