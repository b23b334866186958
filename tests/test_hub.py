"""Bases given by their name on the Hugging Face Hub. A local server takes the place of the Hub."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT, Ranks, train_command, make_adapter, run

import generate
from adapter import Adapter
from formats.bases import load_llama
from formats.hub import find_base

hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants  # noqa: E402

COMMIT = "c0ffee" + "0" * 34
OTHER_COMMIT = "c0ffee" + "1" * 34


class Server:
    """A Hub with one model, owner/model, whose files are those of a folder.

    `requests` has (method, path, authorization header) of each request. If `status` is not 200, it is the response to
    every request for the model. Of the file named `broken`, only the first half is sent.
    """

    def __init__(self, folder):
        self.folder, self.requests, self.status, self.broken = folder, [], 200, None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                outer.reply(self)

            def do_GET(self):
                outer.reply(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def reply(self, request):
        path, files = request.path.split("?")[0], sorted(self.folder.iterdir())
        commit = OTHER_COMMIT if OTHER_COMMIT in path else COMMIT
        self.requests.append((request.command, path, request.headers.get("authorization")))
        name, headers, content = path.rpartition("/")[2], {}, b""
        if not path.removeprefix("/api/models").startswith("/owner/model"):
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        elif self.status != 200:
            status, headers = self.status, {"X-Error-Code": "GatedRepo"} if self.status == 403 else {}
        elif "/tree/" in path:
            entry = {"type": "file", "oid": "0" * 40}
            status, content = 200, [entry | {"path": f.name, "size": f.stat().st_size} for f in files]
        elif path.startswith("/api/"):
            listed = [{"rfilename": f.name, "size": f.stat().st_size} for f in files]
            status, content = 200, {"id": "owner/model", "sha": commit, "siblings": listed}
        elif (self.folder / name).is_file():
            status, content = 200, (self.folder / name).read_bytes()
            headers = {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": OTHER_COMMIT if OTHER_COMMIT in path else COMMIT,
            }
        else:
            status, headers = 404, {"X-Error-Code": "EntryNotFound"}
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content[: len(content) // 2] if name == self.broken else content)

    def fetched(self):
        return sorted(
            path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/res" in path
        )


def set_hub(url, cache, patch=setattr):
    """Use the Hub at `url` and the folder `cache` in this process, and turn off offline mode.

    `patch` is setattr, or monkeypatch.setattr to undo this after a test. Environment variables would have no effect,
    because huggingface_hub has read them at import.
    """
    patch(constants, "ENDPOINT", url)
    patch(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch(constants, "HF_HUB_CACHE", str(cache))
    patch(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def server(chat_base, tmp_path, monkeypatch):
    folder = tmp_path / "served"
    folder.mkdir()
    for file in chat_base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "model.onnx"):
        (folder / name).write_bytes(b"not needed")
    server = Server(folder)
    set_hub(server.url, tmp_path / "cache", monkeypatch.setattr)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.http.shutdown()


NEEDED = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_needed_files_are_downloaded_once(server, chat_base, tmp_path, capsys):
    folder = find_base("owner/model")
    assert sorted(file.name for file in folder.iterdir()) == server.fetched() == NEEDED
    message = f"owner/model: downloading from {server.url} to {tmp_path / 'cache'}"
    assert folder.name == COMMIT and message in capsys.readouterr().err
    assert {token for *_, token in server.requests} <= {"Bearer hf_secret", None}
    assert ("GET", "/api/models/owner/model/revision/main", "Bearer hf_secret") in server.requests
    ours, theirs = (load_llama(path)[0].state_dict() for path in (folder, chat_base))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    server.requests.clear()
    server.http.shutdown()
    assert find_base("owner/model") == folder and server.requests == [] and capsys.readouterr().err == ""


def test_existing_path_overrides_a_hub_name(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert str(find_base("owner/model")) == "owner/model"
    for name in ("model", "/owner/other", "./owner/other", "a/b/c", "~/model", "../model", ""):
        assert find_base(name) == Path(name)
    assert server.requests == []


def test_missing_shards_are_downloaded(server, tmp_path):
    """After an interrupted download, existing shards are kept and only the missing one is downloaded."""
    weights = (server.folder / "model.safetensors").read_bytes()
    (server.folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for i, name in enumerate(names):
        (server.folder / name).write_bytes(weights[i:])
    index = {"weight_map": dict(zip("ab", names))}
    (server.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = find_base("owner/model")
    assert {*names, "model.safetensors.index.json"} <= {file.name for file in folder.iterdir()}
    (folder / names[1]).resolve().unlink()
    server.requests.clear()
    assert find_base("owner/model") == folder and (folder / names[1]).is_file()
    assert server.fetched() == [names[1]]


def test_incomplete_cache_is_completed(server):
    """Missing files are downloaded; a different program may have cached only the weights.

    If the Hub cannot be reached, an error names the missing file.
    """
    folder = find_base("owner/model")
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).resolve().unlink()
        (folder / name).unlink()
    server.requests.clear()
    assert find_base("owner/model") == folder and server.fetched() == ["generation_config.json", "tokenizer.json"]
    (folder / "generation_config.json").unlink()
    server.http.server_close()
    server.http.shutdown()
    with pytest.raises(ValueError, match="not complete in the cache, .*generation_config.json"):
        find_base("owner/model")


def test_only_weights_that_are_loaded_are_downloaded(server):
    for name in ("model.fp16.safetensors", "model_old.safetensors"):
        (server.folder / name).write_bytes(b"not needed")
    find_base("owner/model")
    assert server.fetched() == NEEDED


def test_missing_files_are_reported_before_any_download(server, tmp_path):
    result = run("--base", "owner/model", "--data", tmp_path / "absent.json", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "absent.json: no such file" in result.stderr and server.requests == []
    result = run_generate("--base", "owner/model", "--adapter", tmp_path / "absent.safetensors")
    assert result.exit_code == 2 and "absent.safetensors: no such adapter file" in result.stderr
    assert server.requests == []


def test_environment_variables_set_hub_and_cache(server, tmp_path):
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    code = "from formats.hub import find_base; print(find_base('owner/model'))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout.startswith(str(tmp_path / "home" / "hub")), result.stderr
    assert server.fetched() == NEEDED


def run_generate(*args):
    return CliRunner().invoke(generate.main, [*map(str, args), "--greedy", "--max-new-tokens", "5", "Hello"])


def broken_weights(server):
    server.broken = "model.safetensors"


def no_weights(server):
    (server.folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        (
            "owner/other",
            lambda _: None,
            "owner/other: no such file or folder, and no model of this name at http://127.0.0.1",
        ),
        ("owner/model", lambda server: setattr(server, "status", 403), "accept its terms at http://127.0.0.1:"),
        ("owner/model", lambda server: setattr(server, "status", 500), "cannot be downloaded from http://127.0.0.1:"),
        ("owner/model", lambda server: server.http.server_close(), "cannot be downloaded from http://127.0.0.1:"),
        (
            "owner/model",
            no_weights,
            "the repository has no model*.safetensors; for other formats, download it yourself",
        ),
        ("owner/model", broken_weights, "cannot be downloaded from http://127.0.0.1:"),
    ],
)
def test_failed_download_is_a_one_line_error(server, monkeypatch, name, spoil, message):
    monkeypatch.setattr("time.sleep", lambda _: None)  # skips the library's pauses between attempts
    spoil(server)
    result = run_generate("--base", name)
    lines = [line for line in re.split("[\r\n]+", result.stderr) if "error" in line.lower()]
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith(f"error: {name}: ") and message in lines[0]
    server.broken = None
    if spoil is broken_weights:  # a partial download is not used
        assert run_generate("--base", name).exit_code == 0


def test_offline_mode_uses_only_the_cache(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run_generate("--base", "owner/model")
    assert result.exit_code == 2 and "owner/model: no such file or folder, not complete in the cache" in result.stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert run_generate("--base", "owner/model").exit_code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run_generate("--base", "owner/model").exit_code == 0


def test_missing_library_error_shows_the_download_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    result = run_generate("--base", "owner/model")
    message = (
        "owner/model: no such base model; if it is on Hugging Face, run `hf download owner/model --local-dir model`"
    )
    assert result.exit_code == 2 and message in result.stderr


def test_adapter_remembers_the_name_of_its_base(server, args, tmp_path, chat_base):
    """The adapter file contains the name and the commit. Generation then needs only the adapter and the cache."""
    args = [*args, "--base", "owner/model"]
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    adapter = Adapter.load(tmp_path / "run" / "adapter.safetensors")
    assert (adapter.metadata["base"], adapter.metadata["base_commit"]) == ("owner/model", COMMIT)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["options"]["base"] == "owner/model"
    assert "nothing is left to do" in run(*args, "--resume", "auto").stderr
    generated = run_generate("--adapter", tmp_path / "run" / "adapter.safetensors")
    assert generated.exit_code == 0 and server.fetched() == NEEDED
    make_adapter(load_llama(chat_base)[0]).save(tmp_path / "b.safetensors", base="owner/model")
    assert run_generate("--adapter", tmp_path / "b.safetensors").exit_code == 0


def test_adapter_uses_the_commit_it_was_trained_on(server, tmp_path, chat_base):
    """The newest commit may have different weights. `--base NAME` uses the cached main branch, or downloads it."""
    adapter = make_adapter(load_llama(chat_base)[0])
    adapter.save(tmp_path / "a.safetensors", base="owner/model", base_commit=OTHER_COMMIT)
    assert find_base("owner/model").name == COMMIT
    assert run_generate("--adapter", tmp_path / "a.safetensors").exit_code == 0
    assert any(OTHER_COMMIT in path for _, path, _ in server.requests)
    server.requests.clear()
    assert run_generate("--adapter", tmp_path / "a.safetensors").exit_code == 0 and not server.requests
    assert run_generate("--base", "owner/model").exit_code == 0 and not server.requests


def set_hub_of_rank(rank, url, cache):
    set_hub(url, cache)


def test_one_rank_of_a_machine_downloads_for_all(server, args, tmp_path, forks):
    args = [*args, "--base", "owner/model"]
    spoil = partial(set_hub_of_rank, url=server.url, cache=tmp_path / "cache")
    for code, _, stderr in Ranks(forks, 2, train_command, args, spoil).results():
        assert code == 0, stderr
    assert server.fetched() == NEEDED
