"""Twelve mutated files of every kind. tests/fuzz.py is the fuzzer, which can make any number of them."""

import fuzz
import pytest


@pytest.mark.parametrize("kind", list(fuzz.KINDS))
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, kind):
    """The file without a mutation must be read, because otherwise every mutated file would be refused as well."""
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
    # Invalid cached features are recomputed, and mutations of the other two files may be harmless.
    harmless = ("features", "dict.txt", "generation_config.json")
    assert "refused" in found or kind in harmless


def test_failures_are_reported(tmp_path, monkeypatch):
    """An unexpected exception, and an error without a message, are failures."""

    def silent(path):
        raise ValueError("")

    for read, failure in ((lambda path: [][1], "alpaca: IndexError: "), (silent, "alpaca: empty or unprintable error")):
        monkeypatch.setitem(fuzz.KINDS, "alpaca", (fuzz.alpaca, fuzz.mutate_json, read))
        folder = tmp_path / failure[8:13]
        folder.mkdir()
        assert fuzz.run_case(0, 0, folder, "alpaca").startswith(failure)
