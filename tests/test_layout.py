"""Each file imports only from those above it, so that a reader can go from top to bottom."""

import ast

import pytest
from helpers import ROOT

# What whoever runs a base with an adapter, on words and images, needs of ours.
ANSWERS = {"adapter", "data", "cli", "model", "checkpoints", "encoder_files", "multimodal", "parallel"}
# What each file may import of ours.
ABOVE = {
    "adapter": set(),
    "data": set(),
    "model": {"adapter"},
    "parallel": {"model"},
    "cli": {"parallel"},
    "checkpoints": {"adapter", "data", "model"},
    "encoders": {"adapter"},
    "encoder_files": {"adapter", "checkpoints", "encoders"},
    "multimodal": {"adapter", "encoders", "model"},
    "tasks": {"data", "multimodal"},
    "toy": {"adapter", "data", "model", "checkpoints"},
    "digits": {"data", "encoders", "encoder_files", "multimodal", "toy"},
    "runs": {"adapter", "checkpoints", "parallel"},
    "heads": {"adapter", "data", "encoders", "model", "multimodal"},
    "exchange": {"heads", "adapter", "cli", "checkpoints", "multimodal", "runs"},
    "generate": ANSWERS | {"exchange"},
    "evaluate": {
        "heads",
        "encoder_files",
        "adapter",
        "data",
        "cli",
        "model",
        "multimodal",
        "tasks",
        "toy",
        "digits",
        "generate",
    },
    "step": {"adapter", "data", "model", "parallel"},
    "prepare": ANSWERS | {"heads", "tasks", "toy", "digits", "step"},
    "train": ANSWERS | {"heads", "tasks", "toy", "digits", "evaluate", "runs", "step", "prepare"},
    "comparison": {"adapter", "data", "model", "checkpoints", "evaluate", "step"},
    "experiments": ANSWERS | {"heads", "tasks", "toy", "generate", "evaluate", "runs", "step", "prepare", "comparison"},
    "encoder_experiments": {
        "adapter",
        "cli",
        "data",
        "encoders",
        "encoder_files",
        "heads",
        "step",
        "comparison",
        "experiments",
    },
    "peers": {"adapter", "data", "model", "generate", "step"},
    "bench": {"adapter", "data", "cli", "model", "toy", "parallel", "generate", "step", "peers"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_every_file_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ABOVE)


@pytest.mark.parametrize("name", ABOVE)
def test_no_arrow_points_up(name):
    assert set(imports(ROOT / f"{name}.py")) & set(ABOVE) <= ABOVE[name]


def test_nothing_is_unpickled_unchecked():
    for path in ROOT.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_the_reference_shares_no_code_with_the_project():
    assert not set(imports(ROOT / "tests" / "reference.py")) & set(ABOVE)
