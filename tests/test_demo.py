"""The demo: the prompts' share against the oracle, answers as generate.py's, uploads that don't stay, a browser."""

import urllib.error
import urllib.request
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import reference
import torch
from click.testing import CliRunner
from helpers import ROOT, SEEING, make_adapter, make_model, make_tokens, make_vit, openai_names, picture

import generate
from demo.__main__ import main
from demo.responses import Demonstration, Sampling, shares_table
from demo.prompt_share import prompt_shares
from formats.loading import load_with_adapters
from formats.requests import Request, attach_images
from multimodal import ImageAdapter
from runtime.quantization import quantizer

QUESTION = "Name the number 7."


@pytest.fixture(scope="module")
def seeing(tiny_base, tmp_path_factory):
    """The file of an adapter that sees, gates nonzero and images loud, and its vision encoder."""
    folder = tmp_path_factory.mktemp("seeing")
    torch.save(openai_names(make_vit(SEEING)), folder / "ViT.pt")
    generator = torch.Generator().manual_seed(3)
    adapter = ImageAdapter(features=512, layers=3, length=2, dim=16, heads=2, generator=generator)
    torch.nn.init.constant_(adapter.gates, 2.0)
    torch.nn.init.normal_(adapter.projection[2].weight, generator=generator)
    adapter.save(folder / "seeing.safetensors", base=tiny_base, base_layers=3, vision_encoder=folder / "ViT.pt")
    return folder / "seeing.safetensors"


@pytest.fixture(scope="module")
def demonstration(tiny_adapter, seeing):
    paths = [f"words={tiny_adapter}", f"seeing={seeing}"]
    return Demonstration(*load_with_adapters(paths, None, torch.device("cpu"), torch.float32))


def upload(folder, name="cat.png", seed=0):
    picture(seed=seed).save(folder / name)
    return folder / name


def generated(*args):
    """What generate.py answers, greedily."""
    command = [*map(str, args), "--greedy", "--max-new-tokens", "8", "--device", "cpu", QUESTION]
    result = CliRunner().invoke(generate.main, command)
    assert result.exit_code == 0, result.output
    return result.stdout.removesuffix("\n")


def last_answers(demonstration, request, **sampling):
    return list(demonstration.respond(request, Sampling(max_new_tokens=8)._replace(**sampling)))[-1]


# ---------------------------------------------------------------------------------------------------
# The share of the prompts


@pytest.mark.parametrize("config", ["mha", "gqa", "wide", "qwen3"])
def test_shares_are_the_oracle_s(config):
    """Each sample, adapted layer and token; before Wo, over all heads together."""
    model = make_model(config)
    adapter, tokens = make_adapter(model), make_tokens(model, 2, 6)
    with torch.no_grad():
        shares = prompt_shares(model, tokens, adapter())  # (L, B, T)
    assert shares.shape == (2, 2, 6) and shares.dtype == torch.float32
    for b in range(2):
        terms = {}
        reference.logits(model.state_dict(), model.config, tokens[b], adapter.prompts, adapter.gates, terms)
        for layer in range(2):
            for t in range(6):
                words, prompts = (torch.sqrt((term**2).sum()) for term in terms[layer + 1, t])
                expected = (prompts / (prompts + words)).item()
                assert 0.02 < expected < 0.98 and abs(shares[layer, b, t].item() - expected) < 1e-5


def test_at_strength_0_there_is_no_share():
    model = make_model()
    adapter, tokens = make_adapter(model), make_tokens(model, 1, 6)
    with torch.no_grad():
        assert torch.equal(prompt_shares(model, tokens, adapter(gate_scale=0.0)), torch.zeros(2, 1, 6))
        assert (prompt_shares(model, tokens, adapter(gate_scale=0.5)) > 0).all()


@pytest.mark.parametrize("bits", ["8", "4"])
def test_shares_of_a_quantised_base(bits):
    """Close to those of the base as it was, and not the same: it is the quantised weights that are read."""
    model = make_model(replace(make_model().config, dim=64, head_dim=16, hidden_dim=64))
    adapter, tokens = make_adapter(model), make_tokens(model, 1, 6)
    with torch.no_grad():
        before = prompt_shares(model, tokens, adapter())
        quantizer(bits)(model.layers)
        after = prompt_shares(model, tokens, adapter())
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=0, atol=0.03)


# ---------------------------------------------------------------------------------------------------
# Answers


def test_answers_are_those_of_generate(demonstration, tiny_adapter, tiny_base):
    answers = list(demonstration.respond(Request(QUESTION, adapter="words"), Sampling(max_new_tokens=8)))
    assert answers[-1].adapter == generated("--adapter", tiny_adapter)
    assert answers[-1].base == generated("--base", tiny_base) != answers[-1].adapter
    growing = [(each.adapter, each.base) for each in answers]
    assert len(set(growing)) > 10 and growing == sorted(growing, key=lambda pair: tuple(map(len, pair)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_at_strength_0_both_answers_are_the_base_s(demonstration, temperature):
    answers = last_answers(demonstration, Request(QUESTION, adapter="words"), strength=0.0, temperature=temperature)
    assert answers.adapter == answers.base != "" and not answers.shares.any()


def test_a_column_is_what_chose_its_token(demonstration):
    """The shares at the last token before it, as if the answer ended there."""
    answers = last_answers(demonstration, Request(QUESTION, "of animals", "words"))
    model, tokenizer, adapter = demonstration.model, demonstration.tokenizer, demonstration.adapters["words"]
    responder = generate.Responder(model, tokenizer, {"words": adapter}, max_new_tokens=8)
    tokens = responder.prompt_ids(Request(QUESTION, "of animals", "words"))
    (ids,) = generate.generate(model, [tokens], responder.loaded["words"].adaption_prompts, max_new_tokens=8)
    assert "".join(answers.labels) == answers.adapter and answers.shares.shape == (len(adapter.gates), len(ids))
    for i in range(len(ids)):
        shares = prompt_shares(model, torch.tensor([tokens + ids[:i]]), responder.loaded["words"].adaption_prompts)
        torch.testing.assert_close(answers.shares[:, i], shares[:, 0, -1], rtol=0, atol=1e-5)


def test_the_heat_map_shows_labels_as_text():
    table = shares_table(torch.tensor([[0.1, 0.25], [0.0, 0.5]]), ["<b>", "\n"], first_layer=2)
    assert "&lt;b&gt;" in table and "<b>" not in table and "\\n" in table
    assert table.index("<th>3</th>") < table.index("<th>2</th>"), "the topmost layer is on top"
    assert 'title="25.0%">25<' in table and "--share: 0.25" in table


def test_an_upload_is_seen_and_gone(demonstration, seeing, tmp_path):
    path = upload(tmp_path)
    request = Request(QUESTION, adapter="seeing")
    responder = generate.Responder(demonstration.model, demonstration.tokenizer, demonstration.adapters)
    (expected,) = attach_images([request], {0: path}, responder, None, None)
    answer = generated("--adapter", seeing, "--image", path)
    encoded = demonstration.encode_upload(path)
    assert not path.exists() and "data:image/png;base64," in encoded.preview
    assert torch.equal(encoded.features["seeing"], expected.features) and list(encoded.features) == ["seeing"]
    answers = last_answers(demonstration, request._replace(features=encoded.features["seeing"]))
    assert answers.adapter == answer != last_answers(demonstration, request).adapter, "the image matters"


def test_a_broken_upload_is_a_sentence_and_gone(demonstration, tmp_path):
    whole = upload(tmp_path).read_bytes()
    for content, message in ((whole[:100], "x.png: is a broken image"), (b"%!PS-Adobe-3.0 EPSF", "x.png: is not an")):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(ValueError, match=f"^{message}"):
            demonstration.encode_upload(tmp_path / "x.png")
        assert not (tmp_path / "x.png").exists()


def test_nothing_asked_or_too_much(demonstration, monkeypatch):
    with pytest.raises(ValueError, match="type an instruction"):
        last_answers(demonstration, Request(" \n", adapter="words"))
    with pytest.raises(ValueError, match="20,000 characters at most"):
        last_answers(demonstration, Request("cat", "a" * 20_001, adapter="words"))
    monkeypatch.setattr(demonstration.model, "config", replace(demonstration.model.config, max_seq_len=64))
    with pytest.raises(ValueError, match="the prompt has .* tokens, the base sees only 64"):
        last_answers(demonstration, Request("cat " * 100, adapter="words"))


def test_numbers_of_tokens_and_seeds_are_whole():
    pytest.importorskip("gradio")
    from demo.page import sampling_controls

    *_, tokens, seed, _, _ = sampling_controls()
    assert isinstance(tokens.preprocess(8.5), int) and isinstance(seed.preprocess(5.5), int)


# ---------------------------------------------------------------------------------------------------
# The command


def refused(*args):
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_bad_starts_are_one_line(tiny_adapter, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which the command sets
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    assert "give --adapter FILE" in refused()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gradio", None)
        patch.delitem(sys.modules, "demo.page", raising=False)
        assert refused("--adapter", tiny_adapter).endswith("pip install gradio\n")
    pytest.importorskip("gradio")
    assert "no such adapter file" in refused("--adapter", "nowhere.safetensors", "--base", "nowhere")
    assert "need an adapter that was trained on images" in refused("--adapter", tiny_adapter, "--clip", "ViT.pt")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: cannot listen there" in refused("--adapter", tiny_adapter, "--port", port)


def test_every_option_is_heeded(seeing, tiny_base, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    (tmp_path / "eye.py").write_text("import torch\ndef rows(path): return torch.arange(512.0).view(4, 128)\n")
    made, served = [], []
    monkeypatch.setattr("demo.page.make_page", lambda demonstration: made.append(demonstration))
    monkeypatch.setattr("demo.page.serve", lambda page, host, port: served.append((host, port)))
    every = f"--adapter {seeing} --base {tiny_base} --device cpu --dtype bfloat16 --template llama-2"
    for more in (f"--clip {seeing.parent}/ViT.pt --int8 --host 0.0.0.0", f"--encoder {tmp_path}/eye.py:rows --bits 8"):
        result = CliRunner().invoke(main, [*every.split(), *more.split(), "--port", "7777"])
        assert result.exit_code == 0, result.output
    assert served == [("0.0.0.0", 7777), ("127.0.0.1", 7777)]
    assert [each.encoders["seeing"].metadata.get("encoder") for each in made] == [None, f"{tmp_path}/eye.py:rows"]
    for demonstration in made:
        layer = demonstration.model.layers[0].attention.wq
        assert demonstration.model.dtype == torch.bfloat16 and layer.bits == 8
        assert demonstration.template == "llama-2"
        assert last_answers(demonstration, Request(QUESTION, adapter="seeing")).shares.isfinite().all()


# ---------------------------------------------------------------------------------------------------
# In a browser


def start(folder, *adapters):
    """The command on a free port: the process, and its address. All that it writes lies in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [word for adapter in adapters for word in ("--adapter", adapter)]
    process = subprocess.Popen(
        [sys.executable, "-m", "demo", *args, "--device", "cpu", "--port", str(port)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
    )
    return process, f"http://127.0.0.1:{port}"


def status_of(address, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_other_hosts_and_the_api_are_refused_and_sigterm_leaves_nothing(tiny_adapter, tmp_path):
    pytest.importorskip("gradio")
    process, address = start(tmp_path, tiny_adapter)
    try:
        assert process.stdout.readline().startswith(address)
        assert status_of(address) == status_of(address, Host="localhost") == 200
        assert status_of(address, Host="evil.example") == 400
        assert [status_of(f"{address}/gradio_api/{path}") for path in ("call/predict", "run/predict")] == [404, 404]
        assert list(tmp_path.glob("llama-adapter-demo-*"))
    finally:
        process.terminate()
        process.wait(60)
    assert not list(tmp_path.glob("llama-adapter-demo-*"))
    assert "Traceback" not in (tmp_path / "stderr").read_text()


class Browser:
    """Headless Chromium on a page."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.until(lambda: self.all("#ask"))

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def until(self, true, timeout=20):
        end = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < end, self.all("body")[0].text
            time.sleep(0.05)

    def type(self, selector, text):
        field = self.all(selector)[0]
        self.driver.execute_script("arguments[0].select()", field)
        field.send_keys(text)

    def answers(self):
        return tuple(self.all(f"{name} textarea")[0].get_attribute("value") for name in ("#adapted", "#base"))

    def ask(self, text, expected):
        self.type("#instruction textarea", text)
        self.all("#ask")[0].click()
        self.until(lambda: self.answers() == expected)

    def notice(self, text):
        self.until(lambda: text in self.all("#notice")[0].text)

    def foreign_requests(self):
        """What was asked of anybody but the server."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        assert urls
        return [url for url in urls if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]


@pytest.fixture
def driver():
    webdriver = pytest.importorskip("selenium.webdriver")
    pytest.importorskip("gradio")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1400"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


def test_the_page(driver, tiny_adapter, seeing, tiny_base, tmp_path):
    """Asked, turned down to the base, shown an image and a broken one; nothing from elsewhere, nothing left behind."""
    image, server_folder = upload(tmp_path), tmp_path / "server"
    server_folder.mkdir()
    process, address = start(server_folder, f"words={tiny_adapter}", f"seeing={seeing}")
    try:
        base, of_words = generated("--base", tiny_base), generated("--adapter", tiny_adapter)
        of_image = generated("--adapter", seeing, "--image", image)
        assert process.stdout.readline() == f"{address}, press Ctrl-C to stop\n", (server_folder / "stderr").read_text()
        page = Browser(driver, address)
        page.all("#sampling button")[0].click()
        page.until(lambda: page.all("#tokens input[type=number]"))
        page.type("#tokens input[type=number]", "8\t")
        page.ask(QUESTION, (of_words, base))
        page.until(lambda: page.all("#shares td"))
        assert len(page.all("#shares tr")) == 1 + 2 and page.all("#gates img")

        page.type("#strength input[type=number]", "0\t")
        page.ask(QUESTION, (base, base))
        page.until(lambda: {cell.text for cell in page.all("#shares td")} == {"0"})
        page.type("#strength input[type=number]", "1\t")

        page.type("#instruction textarea", " ")
        page.all("#ask")[0].click()
        page.notice("type an instruction")

        page.all("#adapter input")[1].click()
        page.until(lambda: page.all("#file input[type=file]"))
        page.all("#file input[type=file]")[0].send_keys(str(image))
        page.until(lambda: page.all("#preview img"))
        page.ask(QUESTION, (of_image, base))

        (tmp_path / "half.png").write_bytes(image.read_bytes()[:100])
        page.all("#file input[type=file]")[0].send_keys(str(tmp_path / "half.png"))
        page.notice("half.png: is a broken image")
        assert page.foreign_requests() == []
        assert [path for path in server_folder.rglob("*.png")] == [], "uploads are not kept"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and "Traceback" not in (server_folder / "stderr").read_text()
        assert list(server_folder.glob("llama-adapter-demo-*")) == []
    finally:
        process.kill()
