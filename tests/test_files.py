"""Reading with a limit, atomic writes, locks, and messages that are safe to print."""

import gzip
import json
import lzma
import os
import threading
from pathlib import Path

import pytest
import torch
from helpers import make_adapter, make_model
from safetensors.torch import load_file

from formats.tensors import load_pth
from runtime.errors import error_line
from runtime.files import MAX_BYTES, atomic_write, first_line, locked, path_inside, read_text, require_writable
from runtime.files import write_tensors
from runtime.schema import brief, listed
from training.run_files import save_checkpoint


@pytest.mark.parametrize("name, opener", [("a.json", open), ("a.json.gz", gzip.open), ("a.json.xz", lzma.open)])
def test_files_above_the_limit_are_refused(tmp_path, monkeypatch, name, opener):
    monkeypatch.setattr("runtime.files.MAX_BYTES", 1000)
    with opener(tmp_path / name, "wb") as file:
        file.write(b" " * 1000)
    assert read_text(tmp_path / name) == " " * 1000
    with opener(tmp_path / name, "wb") as file:
        file.write(b" " * 1001)
    with pytest.raises(ValueError, match=f"{name}: contains more than 1,000 bytes; set .LLAMA_ADAPTER_MAX_BYTES"):
        read_text(tmp_path / name)


def test_default_limit_is_one_gibibyte():
    assert MAX_BYTES == 2**30


def test_devices_and_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", "/dev/zero"):
        for read in (read_text, load_pth):
            with pytest.raises(ValueError, match="is a device or a pipe, not a file"):
                read(path)


def test_expanded_and_compressed_tensors_are_refused(tmp_path):
    """One small file declares a tensor of 4e11 elements. In the other, the entries of the zip file are compressed."""
    from formats.adapters import load_adapter

    bomb = {"adapter_query.weight": torch.zeros(1).expand(10**8, 4096), "layers.0.attention.gate": torch.ones(4)}
    torch.save(bomb, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"\(100000000, 4096\), but its storage is smaller"):
        load_adapter(tmp_path / "a.pth", length=10**8)

    import zipfile

    torch.save({"a": torch.zeros(10**6)}, tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "b.pth") as plain, zipfile.ZipFile(tmp_path / "c.pth", "w", 8) as compressed:
        for entry in plain.infolist():
            compressed.writestr(entry.filename, plain.read(entry))
    assert load_pth(tmp_path / "b.pth")["a"].sum() == 0
    with pytest.raises(ValueError, match="c.pth: .*entries are compressed"):
        load_pth(tmp_path / "c.pth")


def test_concurrent_writers_do_not_mix(tmp_path):
    path, started = tmp_path / "a.txt", threading.Barrier(2)

    def write(letter):
        with atomic_write(path) as temporary, open(temporary, "w") as file:
            file.write(letter * 500)
            started.wait()
            file.write(letter * 500)

    threads = [threading.Thread(target=write, args=letter) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for check in (require_writable, lambda path: atomic_write(path).__enter__()):
        with pytest.raises(ValueError, match="pipe: exists and is not a file"):
            check(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a folder"):
        require_writable(tmp_path / "pipe" / "a")
    with pytest.raises(ValueError, match="absent does not exist; create it"):
        require_writable(tmp_path / "absent" / "a")
    assert require_writable(tmp_path / "absent" / "a", folder=True)
    assert not (tmp_path / "absent").exists()


def test_symbolic_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a.txt")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("a")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a.txt").read_text() == "a"


def test_equal_adapters_are_written_as_equal_bytes(tmp_path):
    contents = set()
    for _ in range(5):
        adapter = make_adapter(make_model())
        adapter.save(tmp_path / "a", **{f"field {i}": "ü" * i for i in range(8)})
        contents.add((tmp_path / "a").read_bytes())
    assert len(contents) == 1
    assert torch.equal(load_file(tmp_path / "a")["prompts"], adapter.prompts)


def test_header_is_padded_to_eight_bytes(tmp_path):
    """The safetensors library pads it in the same way."""
    for length in range(9):
        write_tensors(
            tmp_path / "a", {"x": torch.arange(3.0), "y": torch.ones(2, dtype=torch.int8)}, {"a": "x" * length}
        )
        content = (tmp_path / "a").read_bytes()
        size = int.from_bytes(content[:8], "little")
        assert size % 8 == 0 and json.loads(content[8 : 8 + size])["__metadata__"] == {"a": "x" * length}
        assert load_file(tmp_path / "a")["x"].tolist() == [0, 1, 2]


def test_messages_escape_control_characters():
    assert error_line(ValueError("\x1b[31mred\x07 é 漢 \u202e")) == "\\x1b[31mred\\x07 é 漢 \\u202e"


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "b/../../a.png"])
def test_paths_cannot_leave_their_folder(tmp_path, name):
    assert path_inside(tmp_path, "b/../a.png") == tmp_path / "b/../a.png"
    with pytest.raises(ValueError, match="is outside"):
        path_inside(tmp_path, name)
    assert path_inside("/", str(tmp_path / "a.png")) == tmp_path / "a.png"


def test_small_archive_with_large_content_is_refused(tmp_path):
    with gzip.open(tmp_path / "a.json.gz", "wb") as file:
        file.write(b" " * (2**26 + 2))
    with pytest.raises(
        ValueError, match="a.json.gz: its .* bytes decompress to more than 67,108,864; decompress it first"
    ):
        read_text(tmp_path / "a.json.gz")


@pytest.mark.parametrize(
    "error, line",
    [
        (FileNotFoundError(2, "No such file or directory", "a.json"), "a.json: No such file or directory"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),
        (OSError("4096 requested and 224 written"), "4096 requested and 224 written"),
        (MemoryError(), "out of memory"),
    ],
)
def test_errors_without_a_file_name_or_text_have_a_message(error, line):
    assert error_line(error) == line


def test_write_error_without_an_error_number_has_a_message(tmp_path):
    """NumPy raises such an OSError if the disk is full."""
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "a.npy"):
        raise OSError("4096 requested and 224 written")
    assert error_line(caught.value) == f"{tmp_path / 'a.npy'}: 4096 requested and 224 written"


def test_first_line_describes_missing_fields_and_continues_after_a_colon():
    assert first_line(KeyError("progress")) == "has no field 'progress'"
    assert (
        first_line(RuntimeError("Error(s) in loading:\n\tsize mismatch\n\tmore"))
        == "Error(s) in loading: size mismatch"
    )
    assert first_line(ValueError()) == "ValueError"


def test_values_and_lists_in_messages_are_short():
    assert [brief(value) for value in (None, True, "é", [1])] == ["null", "true", '"é"', "[1]"]
    assert len(brief("x" * 1000)) == 60
    assert listed(["a", "b"]) == "'a', 'b'" and listed({}) == "nothing"
    assert listed(range(1234), most=2) == "0, 1 and others, 1,234 in all"


def test_long_messages_are_shortened():
    line = error_line(ValueError(f"a.json: the value {'x' * 10**6} is no number"))
    assert line.startswith("a.json: the value xxx") and len(line) < 1000 and " ... " in line


def disk_full(*args, **options):
    raise OSError(28, "No space left on device")


def test_disk_full_error_names_the_file(tmp_path, monkeypatch):
    """Python's OSError names the file if opening it fails, but not if writing to it fails."""
    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="No space left on device: '.*/.lock-holder'"), locked(tmp_path):
        pass
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left on device: '.*/metrics.jsonl'"):
        save_checkpoint(tmp_path / "checkpoint.pt", None, None, None, {})


def test_lock_is_released_in_a_folder_that_became_read_only(tmp_path, monkeypatch):
    """The error inside the lock is raised, not the one from deleting the lock file. The lock is released."""

    def refuse(*args, **options):
        raise PermissionError(1, "Operation not permitted", "out/.lock-holder")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(OSError, match="No space left"), locked(tmp_path):
            disk_full()
    assert (tmp_path / ".lock-holder").exists()
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_locked_folder_without_its_holder_file_is_refused(tmp_path, monkeypatch):
    """The process that holds the lock may delete the file just before a second process reads it."""
    with locked(tmp_path):
        (tmp_path / ".lock-holder").unlink()
        with pytest.raises(ValueError, match="is in use by another process"), locked(tmp_path):
            pass
