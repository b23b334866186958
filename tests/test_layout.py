"""The house: what lies where, imports in one direction, and a book that can be read in one sitting."""

import ast
import subprocess
import sys
from collections import Counter

import pytest
from helpers import ROOT

# A file imports only from lower ranks, or from its own folder.
RANKS = {
    "runtime": 1,
    "adapter": 2,
    "model": 3,
    "data": 3,
    "encoders": 3,
    "multimodal": 4,
    "formats": 5,
    "training": 6,
    "generate": 7,
    "tasks": 8,
    "toy": 8,
    "demo": 8,
    "train": 9,
    "evaluate": 9,
    "convert": 9,
    "encoder_tuning": 10,
    "experiments": 11,  # compares encoders as well
    "benchmarks": 10,
}
TOP = ["adapter", "convert", "data", "evaluate", "generate", "model", "multimodal", "train"]
BOOK = ["adapter", "model", "data", "train", "generate"]
PATTERNS = ("*.py", "*/*.py", "docs/examples/*.py")
FILES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern) if path.parent.name != "tests")
# What files of one kind have in common, so that one line in a table is all that another needs: a program its command,
# a task and a format their ways to read.
SHARED = {"main", "command", "read", "matches", "score", "read_answers", "write_results", "read_for_scoring"}


def room(path):
    """A file's place in RANKS."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """The first part of every module that is imported, at the top or within a function."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_eight_files_on_top_and_every_folder_has_its_rank():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == TOP
    assert {room(path) for path in FILES} - {"docs"} == set(RANKS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    if room(path) != "docs":  # an example of a user's own file
        rank = RANKS[room(path)]
        backwards = [name for name in imports(path) if name in RANKS and name != room(path) and RANKS[name] >= rank]
        assert not backwards


def test_the_book_can_be_read_in_one_sitting():
    lengths = {name: lines(ROOT / f"{name}.py") for name in BOOK}
    assert max(lengths.values()) <= 450 and sum(lengths.values()) <= 1600, lengths
    assert lines(ROOT / "README.md") <= 250


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_over_50_lines(path):
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert all(length <= 50 for length in lengths.values()), lengths


def test_no_two_things_share_a_name():
    names = Counter()
    for path in FILES:
        found = [node for node in tree(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        names.update(node.name for node in found if node.name not in SHARED)
    assert [name for name, number in names.items() if number > 1] == []


def test_answering_text_needs_neither_pictures_nor_the_toy():
    code = "import generate, sys; print([name for name in sys.modules if name.split('.')[0] in {!r}])"
    unneeded = ["matplotlib", "toy", "training", "tasks", "encoder_tuning", "experiments", "sklearn", "transformers"]
    result = subprocess.run([sys.executable, "-c", code.format(unneeded)], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_nothing_is_unpickled_unchecked():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_the_reference_shares_no_code_with_the_project():
    assert not set(imports(ROOT / "tests" / "reference.py")) & set(RANKS)


def test_no_test_imports_another():
    for path in (ROOT / "tests").glob("*.py"):
        assert not [name for name in imports(path) if name == "conftest" or name.startswith("test_")], path
