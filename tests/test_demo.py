"""The demo: prompt shares compared with the reference, responses as in generate.py, uploads, and a browser test."""

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
from helpers import (
    ROOT,
    FOUR_LAYER_VIT,
    make_adapter,
    make_model,
    make_tokens,
    make_vit,
    openai_state_dict,
    make_picture,
)

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
def image_adapter(tiny_base, tmp_path_factory):
    """Path of an image adapter with gates of 2.0 and a random projection. Its vision encoder is in the same folder."""
    folder = tmp_path_factory.mktemp("seeing")
    torch.save(openai_state_dict(make_vit(FOUR_LAYER_VIT)), folder / "ViT.pt")
    generator = torch.Generator().manual_seed(3)
    adapter = ImageAdapter(features=512, layers=3, length=2, dim=16, heads=2, generator=generator)
    torch.nn.init.constant_(adapter.gates, 2.0)
    torch.nn.init.normal_(adapter.projection[2].weight, generator=generator)
    adapter.save(folder / "seeing.safetensors", base=tiny_base, base_layers=3, vision_encoder=folder / "ViT.pt")
    return folder / "seeing.safetensors"


@pytest.fixture(scope="module")
def demonstration(tiny_adapter, image_adapter):
    paths = [f"words={tiny_adapter}", f"seeing={image_adapter}"]
    return Demonstration(*load_with_adapters(paths, None, torch.device("cpu"), torch.float32))


def save_upload(folder, name="cat.png", seed=0):
    make_picture(seed=seed).save(folder / name)
    return folder / name


def greedy_response(*args):
    """Return generate.py's greedy response to QUESTION, of at most 8 tokens."""
    command = [*map(str, args), "--greedy", "--max-new-tokens", "8", "--device", "cpu", QUESTION]
    result = CliRunner().invoke(generate.main, command)
    assert result.exit_code == 0, result.output
    return result.stdout.removesuffix("\n")


def last_responses(demonstration, request, **sampling):
    return list(demonstration.respond(request, Sampling(max_new_tokens=8)._replace(**sampling)))[-1]


# ---------------------------------------------------------------------------------------------------
# Prompt shares


@pytest.mark.parametrize("config", ["mha", "gqa", "wide", "qwen3"])
def test_shares_equal_the_reference(config):
    """Compare the share of every sample, adapted layer and token. Norms are over all heads, before Wo."""
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
                token_norm, prompt_norm = (torch.sqrt((term**2).sum()) for term in terms[layer + 1, t])
                expected = (prompt_norm / (prompt_norm + token_norm)).item()
                assert 0.02 < expected < 0.98 and abs(shares[layer, b, t].item() - expected) < 1e-5


def test_shares_are_zero_at_strength_0():
    model = make_model()
    adapter, tokens = make_adapter(model), make_tokens(model, 1, 6)
    with torch.no_grad():
        assert torch.equal(prompt_shares(model, tokens, adapter(gate_scale=0.0)), torch.zeros(2, 1, 6))
        assert (prompt_shares(model, tokens, adapter(gate_scale=0.5)) > 0).all()


@pytest.mark.parametrize("bits", ["8", "4"])
def test_shares_of_a_quantized_base_use_its_quantized_weights(bits):
    """The shares are close to those of the unquantized base, but not equal."""
    model = make_model(replace(make_model().config, dim=64, head_dim=16, hidden_dim=64))
    adapter, tokens = make_adapter(model), make_tokens(model, 1, 6)
    with torch.no_grad():
        before = prompt_shares(model, tokens, adapter())
        quantizer(bits)(model.layers)
        after = prompt_shares(model, tokens, adapter())
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=0, atol=0.03)


# ---------------------------------------------------------------------------------------------------
# Responses


def test_responses_equal_those_of_generate_py(demonstration, tiny_adapter, tiny_base):
    responses = list(demonstration.respond(Request(QUESTION, adapter="words"), Sampling(max_new_tokens=8)))
    assert responses[-1].adapter == greedy_response("--adapter", tiny_adapter)
    assert responses[-1].base == greedy_response("--base", tiny_base) != responses[-1].adapter
    texts = [(each.adapter, each.base) for each in responses]
    assert len(set(texts)) > 10 and texts == sorted(texts, key=lambda pair: tuple(map(len, pair)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_responses_equal_the_base_at_strength_0(demonstration, temperature):
    responses = last_responses(demonstration, Request(QUESTION, adapter="words"), strength=0.0, temperature=temperature)
    assert responses.adapter == responses.base != "" and not responses.shares.any()


def test_each_column_has_the_shares_that_predict_its_token(demonstration):
    """The column of a token has the shares at the position before it, from which the token is predicted."""
    responses = last_responses(demonstration, Request(QUESTION, "of animals", "words"))
    model, tokenizer, adapter = demonstration.model, demonstration.tokenizer, demonstration.adapters["words"]
    responder = generate.Responder(model, tokenizer, {"words": adapter}, max_new_tokens=8)
    tokens = responder.prompt_ids(Request(QUESTION, "of animals", "words"))
    (ids,) = generate.generate(model, [tokens], responder.loaded["words"].adaption_prompts, max_new_tokens=8)
    assert "".join(responses.labels) == responses.adapter and responses.shares.shape == (len(adapter.gates), len(ids))
    for i in range(len(ids)):
        shares = prompt_shares(model, torch.tensor([tokens + ids[:i]]), responder.loaded["words"].adaption_prompts)
        torch.testing.assert_close(responses.shares[:, i], shares[:, 0, -1], rtol=0, atol=1e-5)


def test_heat_map_escapes_its_labels():
    table = shares_table(torch.tensor([[0.1, 0.25], [0.0, 0.5]]), ["<b>", "\n"], first_layer=2)
    assert "&lt;b&gt;" in table and "<b>" not in table and "\\n" in table
    assert table.index("<th>3</th>") < table.index("<th>2</th>")  # the topmost layer is the first row
    assert 'title="25.0%">25<' in table and "--share: 0.25" in table


def test_upload_is_used_and_deleted(demonstration, image_adapter, tmp_path):
    path = save_upload(tmp_path)
    request = Request(QUESTION, adapter="seeing")
    responder = generate.Responder(demonstration.model, demonstration.tokenizer, demonstration.adapters)
    (expected,) = attach_images([request], {0: path}, responder, None, None)
    response = greedy_response("--adapter", image_adapter, "--image", path)
    encoded = demonstration.encode_upload(path)
    assert not path.exists() and "data:image/png;base64," in encoded.preview
    assert torch.equal(encoded.features["seeing"], expected.features) and list(encoded.features) == ["seeing"]
    responses = last_responses(demonstration, request._replace(features=encoded.features["seeing"]))
    assert responses.adapter == response != last_responses(demonstration, request).adapter  # the image has an effect


def test_broken_upload_is_reported_and_deleted(demonstration, tmp_path):
    image_bytes = save_upload(tmp_path).read_bytes()
    for content, message in (
        (image_bytes[:100], "x.png: cannot be read as an image"),
        (b"%!PS-Adobe-3.0 EPSF", "x.png: is not an"),
    ):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(ValueError, match=f"^{message}"):
            demonstration.encode_upload(tmp_path / "x.png")
        assert not (tmp_path / "x.png").exists()


def test_empty_and_too_long_prompts_are_refused(demonstration, monkeypatch):
    with pytest.raises(ValueError, match="type an instruction"):
        last_responses(demonstration, Request(" \n", adapter="words"))
    with pytest.raises(ValueError, match="20,000 characters at most"):
        last_responses(demonstration, Request("cat", "a" * 20_001, adapter="words"))
    monkeypatch.setattr(demonstration.model, "config", replace(demonstration.model.config, max_seq_len=64))
    with pytest.raises(ValueError, match="the prompt has .* tokens; expected fewer than 64, the context length"):
        last_responses(demonstration, Request("cat " * 100, adapter="words"))


def test_token_limit_and_seed_are_integers():
    pytest.importorskip("gradio")
    from demo.page import sampling_controls

    *_, tokens, seed, _, _ = sampling_controls()
    assert isinstance(tokens.preprocess(8.5), int) and isinstance(seed.preprocess(5.5), int)


# ---------------------------------------------------------------------------------------------------
# The command


def one_line_error(*args):
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_startup_errors_are_one_line(tiny_adapter, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # restored after the test, because the command sets it
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    assert "use --adapter FILE" in one_line_error()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gradio", None)
        patch.delitem(sys.modules, "demo.page", raising=False)
        assert one_line_error("--adapter", tiny_adapter).endswith("pip install gradio\n")
    pytest.importorskip("gradio")
    assert "no such adapter file" in one_line_error("--adapter", "nowhere.safetensors", "--base", "nowhere")
    assert "need an adapter that was trained on images" in one_line_error("--adapter", tiny_adapter, "--clip", "ViT.pt")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: cannot listen on this address" in one_line_error(
            "--adapter", tiny_adapter, "--port", port
        )


def test_every_option_has_an_effect(image_adapter, tiny_base, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    (tmp_path / "eye.py").write_text("import torch\ndef rows(path): return torch.arange(512.0).view(4, 128)\n")
    demonstrations, served = [], []
    monkeypatch.setattr("demo.page.make_page", lambda demonstration: demonstrations.append(demonstration))
    monkeypatch.setattr("demo.page.serve", lambda page, host, port: served.append((host, port)))
    every = f"--adapter {image_adapter} --base {tiny_base} --device cpu --dtype bfloat16 --template llama-2"
    for more in (
        f"--clip {image_adapter.parent}/ViT.pt --int8 --host 0.0.0.0",
        f"--encoder {tmp_path}/eye.py:rows --bits 8",
    ):
        result = CliRunner().invoke(main, [*every.split(), *more.split(), "--port", "7777"])
        assert result.exit_code == 0, result.output
    assert served == [("0.0.0.0", 7777), ("127.0.0.1", 7777)]
    assert [each.encoders["seeing"].metadata.get("encoder") for each in demonstrations] == [
        None,
        f"{tmp_path}/eye.py:rows",
    ]
    for demonstration in demonstrations:
        layer = demonstration.model.layers[0].attention.wq
        assert demonstration.model.dtype == torch.bfloat16 and layer.bits == 8
        assert demonstration.template == "llama-2"
        assert last_responses(demonstration, Request(QUESTION, adapter="seeing")).shares.isfinite().all()


# ---------------------------------------------------------------------------------------------------
# In a browser


def start_demo(folder, *adapters):
    """Start the command on a free port; return the process and the address of its page.

    The process writes its temporary files, and its standard error as the file stderr, to `folder`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [argument for adapter in adapters for argument in ("--adapter", adapter)]
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


def test_other_hosts_and_the_api_are_refused(tiny_adapter, tmp_path):
    """SIGTERM ends the demo without leaving temporary files."""
    pytest.importorskip("gradio")
    process, address = start_demo(tmp_path, tiny_adapter)
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
    """Headless Chromium with the demo's page open."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.wait_until(lambda: self.find_all("#ask"))

    def find_all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait_until(self, condition, timeout=20):
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, self.find_all("body")[0].text
            time.sleep(0.05)

    def type_into(self, selector, text):
        field = self.find_all(selector)[0]
        self.driver.execute_script("arguments[0].select()", field)
        field.send_keys(text)

    def responses(self):
        return tuple(self.find_all(f"{name} textarea")[0].get_attribute("value") for name in ("#adapted", "#base"))

    def submit(self, text, expected):
        self.type_into("#instruction textarea", text)
        self.find_all("#ask")[0].click()
        self.wait_until(lambda: self.responses() == expected)

    def wait_for_notice(self, text):
        self.wait_until(lambda: text in self.find_all("#notice")[0].text)

    def requests_to_other_hosts(self):
        """Return the URLs that the page requested from other hosts."""
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


def test_page_works_in_a_browser(driver, tiny_adapter, image_adapter, tiny_base, tmp_path):
    """Responses equal those of generate.py: with an adapter, at strength 0, and with an uploaded image.

    An empty prompt and a broken image cause a notice. The page requests nothing from other hosts, and the demo leaves
    no files behind.
    """
    image, server_folder = save_upload(tmp_path), tmp_path / "server"
    server_folder.mkdir()
    process, address = start_demo(server_folder, f"words={tiny_adapter}", f"seeing={image_adapter}")
    try:
        base_response, text_response = greedy_response("--base", tiny_base), greedy_response("--adapter", tiny_adapter)
        image_response = greedy_response("--adapter", image_adapter, "--image", image)
        assert process.stdout.readline() == f"{address}, press Ctrl-C to stop\n", (server_folder / "stderr").read_text()
        page = Browser(driver, address)
        page.find_all("#sampling button")[0].click()
        page.wait_until(lambda: page.find_all("#tokens input[type=number]"))
        page.type_into("#tokens input[type=number]", "8\t")
        page.submit(QUESTION, (text_response, base_response))
        page.wait_until(lambda: page.find_all("#shares td"))
        assert len(page.find_all("#shares tr")) == 1 + 2 and page.find_all("#gates img")

        page.type_into("#strength input[type=number]", "0\t")
        page.submit(QUESTION, (base_response, base_response))
        page.wait_until(lambda: {cell.text for cell in page.find_all("#shares td")} == {"0"})
        page.type_into("#strength input[type=number]", "1\t")

        page.type_into("#instruction textarea", " ")
        page.find_all("#ask")[0].click()
        page.wait_for_notice("type an instruction")

        page.find_all("#adapter input")[1].click()
        page.wait_until(lambda: page.find_all("#file input[type=file]"))
        page.find_all("#file input[type=file]")[0].send_keys(str(image))
        page.wait_until(lambda: page.find_all("#preview img"))
        page.submit(QUESTION, (image_response, base_response))

        (tmp_path / "half.png").write_bytes(image.read_bytes()[:100])
        page.find_all("#file input[type=file]")[0].send_keys(str(tmp_path / "half.png"))
        page.wait_for_notice("half.png: cannot be read as an image")
        assert page.requests_to_other_hosts() == []
        assert [path for path in server_folder.rglob("*.png")] == []  # uploads are deleted
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and "Traceback" not in (server_folder / "stderr").read_text()
        assert list(server_folder.glob("llama-adapter-demo-*")) == []
    finally:
        process.kill()
