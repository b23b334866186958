"""Where the toys keep what they make: one folder, whole or not there."""

import threading
import time
from pathlib import Path

import pytest

from toy.cache import cache_root, cached_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_ADAPTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_environment_variables_name_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("LLAMA_ADAPTER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_root() == tmp_path / ".cache" / "llama-adapter"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/llama-adapter")
    monkeypatch.setenv("LLAMA_ADAPTER_CACHE", "/mine")
    assert cache_root() == Path("/mine")
    for name in ("LLAMA_ADAPTER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert cache_root() == tmp_path / ".cache" / "llama-adapter"


def test_a_recipe_is_made_once_and_another_apart(cache):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "file").write_text(str(len(made)))

    recipe = {"steps": 3, "betas": (0.9, 0.99), "text": ["one", "two"]}
    first = cached_folder("thing", recipe, make)
    assert first.parent == cache and first.name.startswith("thing-") and (first / "file").read_text() == "1"
    assert cached_folder("thing", dict(reversed(recipe.items())), make) == first and len(made) == 1
    others = [cached_folder("thing", recipe | change, make) for change in ({"steps": 4}, {"text": ["one", "three"]})]
    others.append(cached_folder("another", recipe, make))
    assert len({first, *others}) == 4 == len(made)
    assert sorted(cache.iterdir()) == sorted([first, *others])


def test_what_failed_half_way_is_never_taken_for_whole(cache):
    def fail(folder):
        (folder / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("thing", 1, fail)
    assert [folder.name[:7] for folder in cache.iterdir()] == [".thing-"]
    found = []
    whole = cached_folder("thing", 1, lambda folder: found.append((folder / "file").read_text()))
    assert found == ["half"] and list(cache.iterdir()) == [whole]  # it goes on from there


def test_what_a_killed_process_left_is_never_taken_for_whole(cache):
    """A folder gets its name last: whatever lies there before has another."""
    seen = []
    folder = cached_folder("thing", 1, lambda unfinished: seen.extend(cache.rglob("*")))
    assert seen and folder not in seen


def test_of_two_that_want_the_same_one_makes_it_and_the_other_waits(cache, capsys):
    at_work, folders = threading.Event(), []

    def slow(folder):
        at_work.set()
        time.sleep(0.3)
        (folder / "file").write_text("first")

    thread = threading.Thread(target=lambda: folders.append(cached_folder("thing", 1, slow)))
    thread.start()
    assert at_work.wait(10)
    folders.append(cached_folder("thing", 1, lambda folder: (folder / "file").write_text("second")))
    thread.join()
    assert folders[0] == folders[1] and (folders[0] / "file").read_text() == "first"
    assert list(cache.iterdir()) == folders[:1]
    assert "waiting for another process that makes thing-" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_named_and_so_is_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_ADAPTER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"file/cache.*; \$LLAMA_ADAPTER_CACHE can name another folder"):
        cached_folder("thing", 1, lambda folder: None)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("LLAMA_ADAPTER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OSError, match=r"home directory.; \$LLAMA_ADAPTER_CACHE"):
        cached_folder("thing", 1, lambda folder: None)
