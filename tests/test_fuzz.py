"""Broken files: a few of every kind here; tests/fuzz.py makes thousands of them."""

import fuzz
import pytest


@pytest.mark.parametrize("kind", list(fuzz.KINDS))
@pytest.mark.filterwarnings("ignore")
def test_changed_files_are_refused_in_a_line_or_read(tmp_path, kind):
    """And whole ones are read, or nothing would be tested."""
    needed = {"mp4": "av", "gguf": "gguf"}
    if kind in needed:
        pytest.importorskip(needed[kind])
    make, _, read = fuzz.KINDS[kind]
    (tmp_path / "whole").mkdir()
    read(make(tmp_path / "whole"))
    found = []
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        found.append(fuzz.run_case(0, number, tmp_path / str(number), kind))
    assert set(found) <= {"read", "refused"}
    harmless = ("features", "dict.txt", "generation_config.json")  # are made again, hold what they like
    assert "refused" in found or kind in harmless


def test_a_fault_is_found(tmp_path, monkeypatch):
    """A traceback, and a message that says nothing."""

    def silent(path):
        raise ValueError("")

    for read, said in ((lambda path: [][1], "alpaca: IndexError: "), (silent, "alpaca: says ")):
        monkeypatch.setitem(fuzz.KINDS, "alpaca", (fuzz.alpaca, fuzz.text_json, read))
        folder = tmp_path / said[8:13]
        folder.mkdir()
        assert fuzz.run_case(0, 0, folder, "alpaca").startswith(said)
