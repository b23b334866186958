"""Sampling, batches, and the command."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, make_adapter, make_model, make_tokens

from adapter import Adapter
from generate import generate, main, sample, stream, text_pieces
from model import fingerprint, load_llama


def run(*args, input=None):
    """The command, with an empty pipe for standard input unless told otherwise."""
    return CliRunner().invoke(main, [str(arg) for arg in args], input=input)


@pytest.fixture(scope="module")
def tiny_adapter(tiny_base, tmp_path_factory):
    model, _ = load_llama(tiny_base)
    adapter = make_adapter(model)
    torch.nn.init.constant_(adapter.gates, 2.0)
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    adapter.save(path, base=tiny_base, base_layers=3, base_fingerprint=fingerprint(model), prompt_template="alpaca")
    return path


def rescored(model, tokens, prompts, steps):
    """Greedy decoding without a cache."""
    tokens = list(tokens)
    for _ in range(steps):
        tokens.append(model(torch.tensor([tokens]), prompts)[0, -1].argmax().item())
    return tokens[-steps:]


def test_a_batch_of_unequal_prompts_is_answered_as_each_alone():
    model = make_model()
    prompts = make_adapter(model)()
    rows = [make_tokens(model, n, seed=n).tolist() for n in (9, 1, 4)]
    answers = generate(model, rows, prompts, max_new_tokens=8)
    assert answers == [rescored(model, row, prompts, 8) for row in rows]
    assert answers != generate(model, rows, max_new_tokens=8)


def test_each_row_stops_at_its_own_end():
    """The authors' inference code doesn't stop at EOS."""
    model = make_model()
    rows = [make_tokens(model, 5, seed=n).tolist() for n in range(3)]
    whole = generate(model, rows, max_new_tokens=12)
    eos = whole[1][3]
    stopped = generate(model, rows, max_new_tokens=12, eos_id=eos)
    for long, short in zip(whole, stopped):
        assert short == (long[: long.index(eos)] if eos in long else long)
    assert len(stopped[1]) < 12
    assert len(list(stream(model, rows[1:2], max_new_tokens=12, eos_id=eos))) == len(stopped[1])


def test_an_update_is_seen_by_the_next_generation():
    """lit-llama's prompt cache on the module goes stale; ours goes with the generation."""
    model = make_model()
    adapter = make_adapter(model)
    row = [make_tokens(model, 5).tolist()]
    before = generate(model, row, adapter(), max_new_tokens=8)
    with torch.no_grad():
        adapter.prompts.mul_(-2)
    after = generate(model, row, adapter(), max_new_tokens=8)
    assert after[0] == rescored(model, row[0], adapter(), 8) != before[0]
    model(torch.tensor(row), adapter()).sum().backward()  # and gradients still flow
    assert adapter.prompts.grad.abs().sum() > 0


def test_several_adapters_in_one_batch():
    """A batch may mix adapters: their prompts are concatenated along B."""
    from adapter import Prompt

    model = make_model()
    sets = [make_adapter(model, seed=seed)() for seed in (1, 5)]
    mixed = [Prompt(*(torch.cat(parts) for parts in zip(*layer))) for layer in zip(*sets)]
    rows = [make_tokens(model, n, seed=n).tolist() for n in (6, 3)]
    answers = generate(model, rows, mixed, max_new_tokens=6)
    assert answers == [generate(model, [r], p, max_new_tokens=6)[0] for r, p in zip(rows, sets)]


def test_sampling_is_nucleus_sampling():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    random = torch.Generator().manual_seed(0)

    def shares(temperature, top_p):
        drawn = sample(logits, temperature, top_p, random)
        return (drawn.bincount(minlength=4) / 4000).tolist()

    assert shares(1.0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(1.0, 0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)  # 0.5 < 0.7 <= 0.5 + 0.3
    assert shares(1.0, 0.01) == [1, 0, 0, 0]
    assert shares(0.5, 1.0) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.03)  # squares, normalised
    assert shares(0.0, 1.0) == [1, 0, 0, 0]


def test_sampling_depends_on_its_generator_alone():
    model = make_model()
    row = [make_tokens(model, 5).tolist()]
    options = dict(max_new_tokens=10, temperature=1.0)
    first, again, other = (
        generate(model, row, generator=torch.Generator().manual_seed(seed), **options) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_text_streams_whole_characters(tiny_base):
    """A character of four byte tokens comes out once, whole; the pieces add up to the text."""
    _, tokenizer = load_llama(tiny_base)
    text = "Ein 🦙 in Lima"
    ids = tokenizer.encode(text)
    pieces = list(text_pieces(iter([[i] for i in ids]), tokenizer))
    assert "".join(pieces) == text
    assert len(pieces) > 5 and not any("\ufffd" in piece for piece in pieces)
    assert list(text_pieces(iter([]), tokenizer)) == [""]


def test_stories260k_greedy_text_byte_for_byte(data):
    """The text that llama2.c's author publishes for this checkpoint."""
    expected = json.loads((data / "stories260K" / "expected_greedy.json").read_text())
    result = run("--base", data / "stories260K", "--raw", "--greedy", "--max-new-tokens", 256, "")
    assert result.exit_code == 0
    assert result.stdout == expected["text_256"] + "\n"
    model, _ = load_llama(data / "stories260K")
    assert generate(model, [[1]], max_new_tokens=256)[0] == expected["ids_bos_plus_256"][1:]


def test_answer_alone_on_stdout(tiny_adapter):
    result = run("--adapter", tiny_adapter, "--greedy", "--max-new-tokens", 8, "Name the capital of Peru.")
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.endswith("\n") and len(result.stdout) > 1
    alone = run(
        "--adapter", tiny_adapter, "--greedy", "--max-new-tokens", 8, "--strength", 0, "Name the capital of Peru."
    )
    assert alone.stdout != result.stdout
    both = run("--adapter", tiny_adapter, "--greedy", "--max-new-tokens", 8, "--compare", "Name the capital of Peru.")
    assert both.stdout == f"base: {alone.stdout}adapter: {result.stdout}"


def test_what_the_model_is_given(tiny_adapter, tiny_base, monkeypatch):
    """The template with and without the input field, or the bare text; always <bos> first."""
    import generate as module
    from data import format_prompt

    seen = []
    monkeypatch.setattr(module, "stream", lambda model, tokens, *_, **__: seen.extend(tokens) or iter([]))
    for more in (["cat"], ["--input", "Peru", "cat"], ["--raw", "cat"], ["--raw", ""]):
        assert run("--adapter", tiny_adapter, *more).exit_code == 0
    _, tokenizer = load_llama(tiny_base)
    texts = [format_prompt("cat"), format_prompt("cat", "Peru"), "cat", ""]
    assert seen == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]


def test_piped_lines_are_answered_line_by_line(tiny_adapter):
    args = ("--adapter", tiny_adapter, "--greedy", "--max-new-tokens", 30)
    lines = ["Name the capital of Peru.", "", "Translate cat into French."]
    result = run(*args, input="\n".join(lines))
    singles = [run(*args, line).stdout[:-1].replace("\n", "\\n") for line in lines]
    assert result.stdout.split("\n") == [*singles, ""]
    assert result.stderr == ""


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "nothing to run"),
        (["--base", "absent"], "absent: no such base model"),
        (["--adapter", "absent.safetensors"], "absent.safetensors: no such adapter file"),
        (["--compare", "--base", "BASE"], "--compare needs --adapter"),
        (["--adapter", "OTHER", "--base", "BASE"], "does not fit"),
        (["--adapter", "ORPHAN"], "give --base"),
        (["--adapter", "ADAPTER", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny_base, tiny_adapter, tmp_path, args, message):
    Adapter(layers=2, length=3, dim=64, heads=2).save(tmp_path / "other.safetensors", base=tiny_base)
    Adapter(layers=2, length=3, dim=16, heads=2).save(tmp_path / "orphan.safetensors")
    names = {
        "BASE": tiny_base,
        "ADAPTER": tiny_adapter,
        "OTHER": tmp_path / "other.safetensors",
        "ORPHAN": tmp_path / "orphan.safetensors",
    }
    result = run(*(names.get(arg, arg) for arg in args), "hello")
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


def test_other_weights_are_warned_of(tiny_base, tmp_path):
    Adapter(layers=2, length=3, dim=16, heads=2).save(tmp_path / "a.safetensors", base=tiny_base, base_fingerprint="x")
    result = run("--adapter", tmp_path / "a.safetensors", "--max-new-tokens", 1, "hello")
    assert result.exit_code == 0
    assert "warning" in result.stderr and "other weights" in result.stderr


def test_a_prompt_beyond_the_context_is_refused_and_answers_end_with_it(data):
    args = ("--base", data / "stories260K", "--raw", "--greedy", "--max-new-tokens", 2)
    result = run(*args, "Once upon a time " * 200)
    assert result.exit_code == 2
    assert "the base sees only 512" in result.stderr
    mixed = run(*args, input="Once upon a time " * 200 + "\nOnce\n")
    assert mixed.exit_code == 0 and "sees only 512" in mixed.stderr
    assert len(mixed.stdout.splitlines()) == 2


def test_a_terminal_becomes_a_conversation(tiny_adapter):
    """A real pseudo-terminal: prompts on stderr, answers on stdout, ended by Ctrl-D."""
    pty = pytest.importorskip("pty")
    import os

    master, slave = pty.openpty()
    args = [sys.executable, "generate.py", "--adapter", tiny_adapter, "--greedy", "--max-new-tokens", "5"]
    process = subprocess.Popen(args, cwd=ROOT, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.close(slave)
    os.write(master, b"Name the capital of Peru.\n\nTranslate cat into French.\n\x04")
    stdout, stderr = process.communicate(timeout=60)
    os.close(master)
    assert process.returncode == 0
    assert len(stdout.splitlines()) >= 2
    assert stderr.count("> ") == 4  # the empty line in between is not an instruction
