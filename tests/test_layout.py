"""The layout of the repository: where files are, which modules they import, and what importing a command loads."""

import ast
import json
import subprocess
import sys

import pytest
from helpers import ROOT

# A file imports only modules of lower ranks, or of its own folder.
RANKS = {
    "runtime": 1,
    "adapter": 2,
    "model": 3,
    "data": 3,
    "encoders": 3,
    "multimodal": 4,
    "formats": 5,
    "generate": 7,
    "tasks": 8,
    "toy": 9,
    "training": 10,
    "train": 11,
    "evaluate": 11,
    "convert": 11,
    "demo": 11,
    "encoder_tuning": 12,
    "benchmarks": 12,
    "experiments": 13,  # imports encoder_tuning
}
TOP = ["adapter", "convert", "data", "evaluate", "generate", "model", "multimodal", "train"]
PATTERNS = ("*.py", "*/*.py", "docs/examples/*.py")
FILES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern) if path.parent.name != "tests")


def component(path):
    """Return the folder or module at the top level to which a file belongs: a key of RANKS, or "docs"."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """Yield the top-level name of every module that a file imports, at module level or in a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def loaded_by(module):
    """Import a module in a new process. Return the names of all loaded modules, and the paths of the project's own."""
    code = f"import {module}, json, sys; modules = list(sys.modules.items()); "
    code += "print(json.dumps([[name, getattr(module, '__file__', None)] for name, module in modules]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = dict(json.loads(result.stdout))
    files = [file for file in loaded.values() if file and file.startswith(str(ROOT)) and "/.venv/" not in file]
    return set(loaded), files


def test_top_level_is_as_listed_and_every_component_has_a_rank():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == TOP
    assert {component(path) for path in FILES} - {"docs"} == set(RANKS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    if component(path) != "docs":  # docs/examples has files that a user might write
        rank = RANKS[component(path)]
        backwards = [
            name for name in imports(path) if name in RANKS and name != component(path) and RANKS[name] >= rank
        ]
        assert not backwards


@pytest.mark.parametrize("module", ["train", "generate"])
def test_importing_a_command_loads_nothing_heavy(module):
    """Neither command loads a large library, the almanac, a task with scores, or the package of another command.

    train.py also loads no code for images or generation, and generate.py no code for training, tasks or toys.
    """
    names, files = loaded_by(module)
    heavy = {"matplotlib", "sklearn", "transformers", "lm_eval", "gradio", "av"}
    heavy |= {"toy.almanac", "toy.toys", "tasks.scienceqa", "tasks.captions", "tasks.responses", "experiments"}
    heavy |= {"encoder_tuning", "benchmarks", "demo"}
    heavy |= {"multimodal", "encoders", "PIL", "generate"} if module == "train" else {"training", "tasks", "toy"}
    assert not heavy & names
    assert module != "train" or len(files) <= 30, files


def test_torch_load_always_uses_weights_only():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_reference_shares_no_code_with_the_project():
    assert not set(imports(ROOT / "tests" / "reference.py")) & set(RANKS)


def test_no_test_file_imports_another():
    for path in (ROOT / "tests").glob("*.py"):
        assert not [name for name in imports(path) if name == "conftest" or name.startswith("test_")], path
