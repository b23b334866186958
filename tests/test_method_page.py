"""The program in docs/method.md, run with an untrained base. Most checks are the assertions on the page."""

import re
import traceback

import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT

from adapter import Adapter
from formats.bases import read_base
from formats.hugging_face import to_hugging_face
from model import LLaMA
from runtime.files import write_tensors
from toy import almanac
from toy.language_model import BASE

PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
SHOWN = re.compile(r"^```python\n.*?^```\n(?:\n```\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)  # a block and its output


@pytest.fixture
def runner(monkeypatch):
    """The module of docs/examples/run_page.py."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    import run_page

    return run_page


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Folder of a copy of the toy's base with random weights."""
    folder = tmp_path_factory.mktemp("untrained")
    for name in ("tokenizer.model", "config.json"):
        (folder / name).write_bytes((BASE / name).read_bytes())
    torch.manual_seed(0)
    model = LLaMA(read_base(BASE)[0])
    write_tensors(folder / "model.safetensors", to_hugging_face(model.state_dict(), model.config))
    return folder


@pytest.fixture
def page(untrained, tmp_path, monkeypatch):
    """The text of the page, changed to use the untrained base, fewer epochs and fewer tokens.

    Also limits `almanac.instructions` to a few examples, and makes tmp_path, where the page saves its pictures, the
    working directory.
    """
    questions = almanac.instructions()
    few = {"training": questions["training"][:32], "wordings": questions["wordings"][:2]}
    monkeypatch.setattr(almanac, "instructions", lambda: few)
    monkeypatch.chdir(tmp_path)
    text = PAGE
    faster = {"BASE  #": f"{str(untrained)!r}  #", "epochs=12": "epochs=2", "max_new_tokens=40": "max_new_tokens=4"}
    for original, replacement in faster.items():
        assert text.count(original) == 1
        text = text.replace(original, replacement)
    return text


def test_page_runs_and_shows_its_output(page, runner, tmp_path):
    """Exactly the blocks that show an output print one, and the page's pictures are saved.

    The printed shapes equal those on the page; other numbers depend on the trained base.
    """
    shown = [found[1] or "" for found in SHOWN.finditer(PAGE)]
    printed = list(runner.run_blocks(page, "method.md"))
    assert [bool(text) for text in printed] == [bool(text) for text in shown]
    shapes = [i for i, text in enumerate(shown) if text.startswith(("T ", "q, k, v ", "P "))]
    assert len(shapes) == 3 and [printed[i] for i in shapes] == [shown[i] for i in shapes]
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == sorted(re.findall(r"\(pictures/(.+?)\)", page))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("W @ v + torch.tanh(g)", "W @ v + g"),
        ("kp = heads(Wk(P))", "kp = rope(heads(Wk(P.repeat(1, 5, 1)[:, :T])))[:, :, :K]"),
        ("vp = heads(Wv(P))", "vp = heads(Wk(P))"),
        ("A = prompt_scores.softmax(dim=3)", "A = scores.softmax(dim=3)[..., :K]"),
        ("W = token_scores.masked_fill(~causal, -math.inf)", "W = token_scores"),
        ("transpose(2, 3) / math.sqrt(D)  # (1, H, T, K + T)", "transpose(2, 3)"),
        ("rope(heads(Wk(x)))", "heads(Wk(x))"),
        ("adapted(torch.zeros(H))", "adapted(torch.ones(H))"),
    ],
)  # fmt: skip
def test_page_detects_a_wrong_line(page, runner, right, wrong):
    assert page.count(right) == 1
    with pytest.raises(AssertionError):
        list(runner.run_blocks(page.replace(right, wrong), "method.md"))


def test_page_detects_a_wrong_adapter(page, runner, monkeypatch):
    monkeypatch.setitem(Adapter.ACTIVATIONS, "tanh", lambda g: g)
    with pytest.raises(AssertionError):
        list(runner.run_blocks(page, "method.md"))


def test_pictures_are_small_files():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs" / "pictures").iterdir()}
    assert sizes and max(sizes.values()) < 100_000, sizes


def test_blocks_share_names_and_errors_show_page_lines(runner, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\n```\nno program\n```\n\n```python\nprint(x)\n```\n")
    result = CliRunner().invoke(runner.main, [str(page)])
    assert result.exit_code == 0 and result.stdout == "--- block 1\n--- block 2\n1\n"
    with pytest.raises(ZeroDivisionError) as error:
        list(runner.run_blocks("text\n\n```python\n\n1 / 0\n```\n", "page.md"))
    last = traceback.extract_tb(error.tb)[-1]
    assert (last.filename, last.lineno) == ("page.md", 5)
    assert CliRunner().invoke(runner.main, [str(tmp_path / "none.md")]).exit_code == 2
