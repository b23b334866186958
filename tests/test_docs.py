"""README.md, CONTRIBUTING.md and docs/: links, names, commands and examples are checked against the code."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import click
import numpy as np
import pytest
import torch
from helpers import ROOT, run, subcommands

from adapter import Adapter
from formats import bases
from formats.rope import llama3_rope_factors
from runtime.tensor_parallel import Part

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
PROGRAMS = {f"{name}.py": name for name in ("train", "generate", "evaluate", "convert")}
PACKAGES = ("experiments", "benchmarks", "encoder_tuning", "demo")  # python -m NAME
THIRD_PARTY_OPTIONS = {"--nproc_per_node", "--nnodes", "--rdzv_endpoint", "--local-dir"}  # torchrun, hf download

FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(text, language=None):
    """Return the code blocks of a page, in one language or in all."""
    return [
        re.sub(f"^{found[1]}", "", found[3], flags=re.MULTILINE)
        for found in FENCED.finditer(text)
        if language is None or found[2] == language
    ]


def code_spans(text):
    """Return the code spans of a page (text in single backticks), each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCED.sub("", text))]


def command_of(words):
    """Return (click command, its arguments) for a line of shell, or None if it does not run a command of the project.

    `words` are the words of the line. A file name counts only after `python` or `torchrun`, or before an option.
    """
    for i, word in enumerate(words):
        started = any("python" in before or before == "torchrun" for before in words[:i])
        if word in PROGRAMS and (started or words[i + 1 : i + 2] and words[i + 1].startswith("-")):
            return importlib.import_module(PROGRAMS[word]).main, words[i + 1 :]
        if word == "-m" and words[i + 1] in PACKAGES:
            return importlib.import_module(f"{words[i + 1]}.__main__").main, words[i + 2 :]
    return None


def options_of(command):
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def all_options(command):
    """Return the options of a command and of its subcommands."""
    parts = subcommands(command).values() if isinstance(command, click.Group) else ()
    return options_of(command).union(*map(all_options, parts))


def errors_in_line(line):
    """Return a message for each nonexistent option or subcommand in a line of shell."""
    try:
        found = command_of(shlex.split(line.removeprefix("$ "), comments=True))
    except ValueError:  # an unclosed quotation mark: a formula or a command's output
        return []
    if found is None:
        return []
    wrong, (command, arguments) = [], found
    if isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        if arguments[0].isupper() or "|" in arguments[0]:  # NAME, or show|import|export
            names, parts = set(arguments[0].split("|")) - {"NAME"}, []
        else:
            names, parts = {arguments[0]}, [subcommands(command).get(arguments[0])]
        wrong += [f"{line}: there is no command {name}" for name in names - set(subcommands(command))]
        command = parts[0] if parts and parts[0] is not None else command
    known = all_options(command)
    for argument in arguments:
        if argument in ("&&", "|", ";"):
            break
        if argument.startswith("--") and argument.split("=")[0] not in known:
            wrong.append(f"{line}: there is no option {argument}")
    return wrong


def every_option():
    commands = [importlib.import_module(name).main for name in PROGRAMS.values()]
    commands += [importlib.import_module(f"{name}.__main__").main for name in PACKAGES]
    return set().union(*map(all_options, commands))


def command_errors(text):
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    spans = code_spans(text)
    wrong = [problem for line in lines + spans for problem in errors_in_line(line)]
    mentioned = {option for span in spans for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    return wrong + [
        f"{option}: no command has this option" for option in mentioned - every_option() - THIRD_PARTY_OPTIONS
    ]


def anchors(text):
    """Return the anchors that GitHub generates for a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text, folder):
    """Return the relative links whose file or heading does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path
        if path and not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8") if path else text):
            broken.append(link)
    return broken


def listed_top_level(text):
    """Return the names in the README's tree: the first word of each line, and all file names in the last line."""
    block = next(block for block in blocks(text) if block.startswith("adapter.py "))
    *lines, last = block.splitlines()
    return {line.split()[0] for line in lines} | set(re.findall(r"[\w.-]+\.(?:md|txt|toml|cff)|LICENSE", last))


def actual_top_level():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout, to list the files of the project")
    paths = [line.split("/") for line in listed.splitlines() if (ROOT / line).exists()]
    names = {parts[0] + ("/" if len(parts) > 1 else "") for parts in paths}
    return {name for name in names if not name.startswith(".")}


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page):
    assert broken_links(page.read_text(encoding="utf-8"), page.parent) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    assert command_errors(page.read_text(encoding="utf-8")) == []


def test_tests_named_in_the_docs_exist():
    named = {name for page in PAGES for name in re.findall(r"\btest_\w+", page.read_text(encoding="utf-8"))}
    files = list((ROOT / "tests").glob("test_*.py"))
    existing = {path.stem for path in files}.union(*(re.findall(r"def (test_\w+)", path.read_text()) for path in files))
    assert "test_gates_move_first" in named
    assert named - {"test_boolq"} <= existing  # test_boolq is a file that docs/tasks.md tells the reader to write


def test_readme_tree_lists_the_top_level():
    assert listed_top_level(README.read_text(encoding="utf-8")) == actual_top_level()


def test_readme_names_every_page():
    text = README.read_text(encoding="utf-8")
    assert [page.name for page in DOCS if f"docs/{page.name}" not in text] == []
    assert "(CONTRIBUTING.md)" in text


def test_ci_command_sets_up_a_fresh_machine():
    """The first line of the README with `python -m pytest` is the command that .ci/run executes."""
    first = next(line for line in README.read_text(encoding="utf-8").splitlines() if "python -m pytest" in line)
    assert first.startswith("python3 -m venv .venv && ") and "requirements-dev.txt" in first


def test_readme_repeats_the_claims_of_the_experiments():
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(page) if line.startswith("| claim |"))
    rows = page[first : page.index("", first)]
    assert len(rows) > 5 and [row for row in rows if row not in README.read_text(encoding="utf-8").splitlines()] == []


def test_line_counts_are_approximately_right():
    rows = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| ([\d,]+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == ["adapter.py", "model.py", "data.py", "train.py", "generate.py"]
    for name, count in rows:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(count)) <= 0.1 * lines, f"{name} has {lines} lines"


def test_readme_quotes_adapter_py_literally():
    first = blocks(README.read_text(encoding="utf-8"), "python")[0]
    lines = {line.strip() for line in (ROOT / "adapter.py").read_text(encoding="utf-8").splitlines()}
    assert [line for line in first.splitlines() if not line.startswith("#") and line.strip() not in lines] == []


def test_python_example_of_the_readme_runs(tiny_base, instructions, tmp_path):
    """The example runs on a CPU, with a tiny base and an adapter of its shape."""
    code = blocks(README.read_text(encoding="utf-8"), "python")[1]
    for theirs, ours in {
        "LLaMA-7B": str(tiny_base),
        "alpaca.json": str(instructions),
        "a.safetensors": str(tmp_path / "a.safetensors"),
        '"cuda"': '"cpu"',
        "layers=30, length=10, dim=4096, heads=32": "layers=2, length=3, dim=16, heads=2",
    }.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    names: dict[str, object] = {}
    exec(code, names)
    assert (tmp_path / "a.safetensors").exists()
    assert torch.equal(names["logits"], names["model"](names["tokens"]))


def test_documented_base_format_can_be_added(tiny_base, tmp_path, monkeypatch):
    """docs/base_models.md shows a format for NumPy's archives."""
    page = (ROOT / "docs" / "base_models.md").read_text(encoding="utf-8")
    (tmp_path / "numpy_folder.py").write_text(blocks(page, "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numpy_folder", raising=False)
    model, _ = bases.load_llama(tiny_base)
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.model").write_bytes((tiny_base / "tokenizer.model").read_bytes())
    np.savez(base / "weights.npz", **{name: weight.numpy() for name, weight in model.state_dict().items()})
    model.config = replace(
        model.config,
        rope_theta=5e5,
        rope_factors=llama3_rope_factors(model.config.head_dim, 5e5, 8.0, context=32),
        max_seq_len=64,
    )
    (base / "shape.json").write_text(json.dumps(vars(model.config)))
    with pytest.raises(ValueError, match="contains neither"):
        bases.load_llama(base)
    monkeypatch.setattr(bases, "FORMATS", {"numpy_folder": ("weights.npz",)} | bases.FORMATS)
    tokens, loaded = torch.tensor([[1, 5, 7]]), bases.load_llama(base)[0]
    assert loaded.config == model.config and torch.equal(loaded(tokens), model(tokens))
    half = torch.empty(8, 16)  # for tensor parallelism
    bases.read_base(base)[1]["layers.0.attention.wq.weight"](half, part=Part(dim=0, index=1, number=2))
    assert torch.equal(half, model.layers[0].attention.wq.weight[8:])
    (base / "shape.json").write_text("{}")
    with pytest.raises(ValueError, match="shape.json: has no field 'rope_factors'"):
        bases.load_llama(base)


def test_metadata_of_adapter_files_are_documented(args, tmp_path):
    """docs/adapters.md lists every key that a run writes, and no key that the code does not contain."""
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    tables = page[page.index("The metadata are strings") : page.index("**Checks.**")]
    listed = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?`) \|", tables, re.MULTILINE))))
    assert run(*args).exit_code == 0
    assert run(*args, "--init", tmp_path / "run", "--bits", 8, "--out", tmp_path / "second").exit_code == 0
    written = set(Adapter.load(tmp_path / "second" / "adapter.safetensors").metadata)
    assert {"base_fingerprint", "bits", "init", "val_loss_after"} <= written <= listed
    writers = ("adapter.py", "train.py", "training/*.py", "formats/*.py", "encoders/heads.py", "encoder_tuning/*.py")
    code = "".join(path.read_text(encoding="utf-8") for pattern in writers for path in ROOT.glob(pattern))
    assert {key for key in listed if not re.search(rf"[\"']{key}[\"']|\b{key}=", code)} == set()


@pytest.mark.parametrize(
    "text, problem",
    [
        ("```sh\npython train.py --data x --no-such y\n```\n", "no option --no-such"),
        ("```sh\npython train.py --data x \\\n    --no-such y\n```\n", "no option --no-such"),
        ("```\n$ torchrun --nproc_per_node 8 train.py --gread\n```\n", "no option --gread"),
        ("```sh\npython convert.py exchange a b\n```\n", "no command exchange"),
        ("`python convert.py show|burn`", "no command burn"),
        ("`python generate.py --gready`", "no option --gready"),
        ("`--streng` blends", "--streng: no command has this option"),
    ],
)
def test_wrong_commands_are_found(text, problem):
    assert any(problem in found for found in command_errors(text))


def test_broken_links_are_found(tmp_path):
    (tmp_path / "page.md").write_text("# A page\n\n## Its `part`, two\n")
    text = "[a](page.md) [b](page.md#its-part-two) [c](no.md) [d](page.md#no) [e](https://x.org/no.md) [f](#no)"
    assert broken_links(text, tmp_path) == ["no.md", "page.md#no", "#no"]
