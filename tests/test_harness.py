"""evaluate.py harness, compared with lm_eval's model `hf`, which uses transformers and PEFT."""

import json
import os
import re
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT, make_adapter, save_harness_task

import evaluate
from data import Example
from formats.adapters import write_peft
from formats.bases import load_llama
from generate import Responder

WORDS = "Name the capital of Peru. What is the young of the owl called? The capital is Lima."
QUESTIONS = [
    ("Name the capital of Peru.", [" Lima", " The capital of Peru is Lima.", " owl"]),
    ("What", [" is the young of"]),
]


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval")
    from tasks import harness

    return harness


@pytest.fixture(scope="module")
def loaded(tiny_base):
    """The tiny base and its tokenizer, with a context of 48 tokens, so that some texts are longer."""
    model, tokenizer = load_llama(tiny_base)
    model.config = replace(model.config, max_seq_len=48)
    with torch.no_grad():
        model.output.weight *= 8
        model.output.weight[3:259] = 0  # suppresses byte tokens, because tokenizers differ in incomplete characters
    return model.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def adapter(loaded):
    """An adapter whose gates are nonzero and equal within a layer, because PEFT has one gate for all heads."""
    adapter = make_adapter(loaded[0], length=4)
    torch.nn.init.normal_(adapter.gates[:, :1], generator=torch.Generator().manual_seed(5))
    adapter.gates.data[:, 1:] = adapter.gates.data[:, :1]
    adapter.metadata["base_layers"] = "3"
    return adapter


def hf_model(model, folder, theirs=None):
    """Return lm_eval's `hf` with `theirs`, by default a transformers copy of `model`, and the tokenizer in `folder`."""
    transformers, peers = pytest.importorskip("transformers"), pytest.importorskip("benchmarks.peers")
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    theirs = peers.as_transformers(model) if theirs is None else theirs
    return HFLM(theirs, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=model.config.max_seq_len)


def our_model(harness, loaded, adapter=None, **options):
    responder = Responder(*loaded, {} if adapter is None else {"ours": adapter}, **options)
    return harness.HarnessModel(responder, "base" if adapter is None else "ours", batch_size=4)


def requests(kind, rows):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, row, i) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def tokenizer_folder(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes((tiny_base / "tokenizer.model").read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["base", "adapter"])
def both(request, harness, loaded, adapter, tokenizer_folder, tmp_path_factory):
    """The project's model for the harness, and `hf`: both with the base alone, or both with the adapter (in PEFT)."""
    if request.param == "base":
        return our_model(harness, loaded), hf_model(loaded[0], tokenizer_folder)
    peft, peers = pytest.importorskip("peft"), pytest.importorskip("benchmarks.peers")
    folder = tmp_path_factory.mktemp("peft") / "exported"
    write_peft(adapter, folder)
    theirs = peft.PeftModel.from_pretrained(peers.as_transformers(loaded[0]), folder)
    return our_model(harness, loaded, adapter), hf_model(loaded[0], tokenizer_folder, theirs)


@pytest.mark.filterwarnings("ignore")
def test_log_likelihoods_equal_those_of_hf(both):
    """Contexts are empty, shared, or too long for the base. Continuations have one token or several."""
    rows = [(context, continuation) for context, continuations in QUESTIONS for continuation in continuations]
    rows += [("", "Lima is a capital"), (WORDS * 4, " Lima, the capital"), (WORDS * 4, " owl"), ("What ", "is")]
    found, expected = (model.loglikelihood(requests("loglikelihood", rows), disable_tqdm=True) for model in both)
    assert len({round(log_p, 3) for log_p, _ in expected}) == len(rows)
    torch.testing.assert_close(
        *(torch.tensor([log_p for log_p, _ in results]) for results in (found, expected)), rtol=1e-5, atol=1e-5
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.filterwarnings("ignore")
def test_greedy_continuations_are_recognized(both):
    """The first continuation is the greedy one of three tokens; the second differs from it in the last token."""
    model, _ = both
    context = model.tok_encode(WORDS[:30])
    ids = []
    for _ in range(3):
        ids.append(int(model.model(torch.tensor([context + ids]), model.adaption_prompts)[0, -1].argmax()))
    rows = [(None, context, ids), (None, context, [*ids[:2], (ids[2] + 1) % 300])]
    (found, expected) = (each._loglikelihood_tokens(rows, disable_tqdm=True) for each in both)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] == [True, False]


@pytest.mark.filterwarnings("ignore")
def test_rolling_log_likelihoods_of_long_texts_equal_hf(both):
    rows = [(WORDS * n,) for n in (1, 3, 7)]
    found, expected = (model.loglikelihood_rolling(requests("rolling", rows), disable_tqdm=True) for model in both)
    assert len(both[0].tok_encode(WORDS * 7)) > 3 * 48
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_generated_texts_equal_those_of_hf(both):
    """Texts are generated without a stop string, with one, and with a repetition penalty, up to 12 tokens."""
    plain = [(WORDS[:n], {"until": [], "max_gen_toks": 12}) for n in (5, 20, 40)] + [(WORDS * 4, {"max_gen_toks": 12})]
    theirs = both[1].generate_until(requests("generate_until", plain), disable_tqdm=True)
    assert (
        len(set(theirs)) > 1 and both[0].generate_until(requests("generate_until", plain), disable_tqdm=True) == theirs
    )
    stop = theirs[0][len(theirs[0]) // 2 :][:3]
    rows = [(WORDS[:n], {"until": [stop], "max_gen_toks": 12}) for n in (5, 20, 40)]
    found, expected = (model.generate_until(requests("generate_until", rows), disable_tqdm=True) for model in both)
    assert found == expected and found[0] != theirs[0] and stop not in found[0]
    rows = [(WORDS[:n], {"until": [], "max_gen_toks": 12, "repetition_penalty": 1.5}) for n in (5, 20, 40)]
    found, expected = (model.generate_until(requests("generate_until", rows), disable_tqdm=True) for model in both)
    assert found == expected != theirs[:3]


@pytest.mark.filterwarnings("ignore")
def test_third_party_model_scores_as_with_hf(harness, data, tmp_path):
    """tinystories3.8M scores whole stories and the second sentences of stories, and continues their beginnings."""
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    folder = data / "models" / "tinystories3.8M"
    responder = Responder(*load_llama(folder), {})
    tokenizer = transformers.LlamaTokenizer.from_pretrained(folder, add_bos_token=True, eos_token="</s>")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    both = harness.HarnessModel(responder, "base", 8), HFLM(theirs, tokenizer=tokenizer, batch_size=8, device="cpu")
    text = (data / "text" / "tinystories_sample_2MiB.txt").read_text(encoding="utf-8")
    stories = [" ".join(story.split()) for story in text.split("<|endoftext|>")[1:7]]
    sentences = [story.split(". ") for story in stories]
    rows = [(f"{first[0]}.", f" {second[1]}.") for first in sentences for second in sentences]
    for kind, prompts in {"loglikelihood": rows, "loglikelihood_rolling": [(story,) for story in stories]}.items():
        found, expected = (getattr(each, kind)(requests(kind, prompts), disable_tqdm=True) for each in both)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-4)
    scores = torch.tensor(both[0].loglikelihood(requests("loglikelihood", rows), disable_tqdm=True))[:, 0].view(6, 6)
    assert (scores.argmax(dim=1) == torch.arange(6)).sum() > 3  # for most stories, their own sentence is most likely
    prompts = [(story[:60], {"until": ["."], "max_gen_toks": 30}) for story in stories]
    found, expected = (each.generate_until(requests("generate_until", prompts), disable_tqdm=True) for each in both)
    assert found == expected and len(set(found)) > 3


def test_shared_context_is_processed_once(harness, loaded, monkeypatch):
    """Three continuations share one context. The last token of a continuation is predicted, but not processed."""
    model, positions = our_model(harness, loaded), []
    forward = type(model.model).hidden_states
    monkeypatch.setattr(
        type(model.model), "hidden_states",
        lambda self, tokens, *args: positions.append(tokens.numel()) or forward(self, tokens, *args),
    )  # fmt: skip
    rows = [(None, list(range(5, 25)), [7, 8]), (None, list(range(5, 25)), [9, 8]), (None, list(range(5, 25)), [3])]
    model._loglikelihood_tokens(rows, disable_tqdm=True)
    assert positions == [20, 3]  # the context, and one token per continuation (padding, if it has only one)


def test_alpaca_token_ids_equal_those_of_training(harness, loaded, adapter):
    model = our_model(harness, loaded, adapter)
    text = model.apply_chat_template([{"role": "user", "content": "Name it."}])
    assert model.tok_encode(text) == model.template.encode_prompt("Name it.")
    for continuation in ("Lima", " Lima", "The capital"):
        example = Example("Name it.", output=continuation.lstrip())
        ((prompt, response),) = next(model.template.encode_exchanges([example]))
        assert model._encode_pair(text, continuation) == (prompt, response[:-1])  # the harness does not score <eos>
    with_system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Name it."}]
    assert model.tok_encode(model.apply_chat_template(with_system)) == model.template.encode_prompt(
        "Be kind.\n\nName it."
    )
    with pytest.raises(ValueError, match="alpaca takes one prompt, not messages with the roles user, assistant, user"):
        model.apply_chat_template([{"role": role, "content": "?"} for role in ("user", "assistant", "user")])


def test_chat_template_writes_one_bos_and_leaves_prefixes_open(harness, loaded, adapter):
    model = our_model(harness, loaded, adapter, template="llama-2")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Name it."}]
    ids = model.tok_encode(model.apply_chat_template(messages))
    assert ids[0] == loaded[1].start_ids[0] and ids[1] != ids[0]
    with_prefix = [*messages, {"role": "assistant", "content": " The capital is"}]
    text = model.apply_chat_template(with_prefix, add_generation_prompt=False)
    assert text.endswith("[/INST] The capital is") and loaded[1].eos_id not in model.tok_encode(text)
    for content in ("The capital is", "The capital is "):  # the template writes a space before a response
        with_prefix[-1] = {"role": "assistant", "content": content}
        text = model.apply_chat_template(with_prefix, add_generation_prompt=False)
        assert text.endswith(f"[/INST] {content}")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: model.generation({"max_gen_toks": 48}), "max_gen_toks is 48, .* context has 48 tokens"),
        (lambda model: model.generation({"temperature": 1, "top_k": 5, "max_gen_toks": 9}), "unsupported 'top_k'"),
        (lambda model: model.generation({"do_sample": True, "max_gen_toks": 9}), "do_sample needs a temperature"),
        (lambda model: model._loglikelihood_tokens([(None, [1], [2] * 49)]), "49 tokens; the base takes 1 to 48"),
        (lambda model: model._loglikelihood_tokens([(None, [1], [])]), "has 0 tokens"),
    ],
)  # fmt: skip
def test_unsupported_requests_are_refused(harness, loaded, call, message):
    with pytest.raises(ValueError, match=message):
        call(our_model(harness, loaded))


def test_sampling_is_seeded_by_the_harness(harness, loaded):
    """The seed is that of torch.manual_seed, which the harness calls. The batches of a run draw different numbers."""
    model = our_model(harness, loaded)
    rows = [("Name", {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "max_gen_toks": 10})] * 12
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate_until(requests("generate_until", rows), disable_tqdm=True))
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 12 > model.batch_size


@pytest.mark.parametrize("names, strengths", [(["../x"], [1]), ([".."], [1]), (["a", "a x 0.5"], [1, 0.5])])
def test_column_names_must_be_unique_folder_names(harness, loaded, adapter, names, strengths):
    with_adapters = *loaded, dict.fromkeys(names, adapter)
    with pytest.raises(ValueError, match="is taken, or cannot name a folder"):
        harness.make_columns(with_adapters, strengths, False, None, 4, {})


def test_equal_strengths_are_one_column(harness, loaded, adapter):
    columns = harness.make_columns((*loaded, {"a": adapter}), [0.5, 0.5, 2], True, None, 4, {"bits": "8"})
    assert list(columns) == ["base", "a x 0.5", "a x 2"]
    assert columns["a x 2"].get_model_info() == {"bits": "8", "adapter": "a", "strength": 2}


@pytest.fixture
def task(tmp_path):
    """Path of a task with Python code that imports Hugging Face's `evaluate`."""
    path = save_harness_task(tmp_path)
    (tmp_path / "code.py").write_text(
        "import evaluate\n\ndef question(doc):\n    return evaluate.load.__name__ and doc['question']\n"
    )
    path.write_text(path.read_text().replace("doc_to_text: question", "doc_to_text: !function code.question"))
    return path


@pytest.mark.filterwarnings("ignore")
def test_command_compares_strengths(harness, tiny_base, adapter, task, tmp_path, monkeypatch, capsys):
    """A task's code imports Hugging Face's `evaluate`, although the folder of our evaluate.py is first in sys.path."""
    pytest.importorskip("evaluate")
    monkeypatch.setattr(sys, "path", [str(ROOT), *(folder for folder in sys.path if folder != str(ROOT))])
    monkeypatch.delitem(sys.modules, "evaluate")
    adapter.save(tmp_path / "ours.safetensors")
    args = ["harness", "--base", tiny_base, "--adapter", tmp_path / "ours.safetensors", "--out", tmp_path / "out"]
    args += ["--compare", "--strength", "0", "--strength", "1", "--tasks", task, "--log-samples", "--compile"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    header, line = capsys.readouterr().out.splitlines()[-2:]
    assert re.split("  +", header.strip()) == ["base", "ours x 0", "ours"]
    assert line.startswith("capitals, acc")
    found = {
        name: json.loads((tmp_path / "out" / name / "results.json").read_text())
        for name in ("base", "ours x 0", "ours")
    }
    assert found["base"]["results"] == found["ours x 0"]["results"]
    assert {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config"} <= set(found["ours"])
    assert found["ours"]["config"]["strength"] == 1 and found["base"]["config"]["base"] == str(tiny_base)
    responses = {}
    for name in found:
        lines = (tmp_path / "out" / name / "samples_capitals.jsonl").read_text().splitlines()
        responses[name] = [json.loads(line)["filtered_resps"] for line in lines]
    assert responses["base"] == responses["ours x 0"] != responses["ours"] and len(responses["ours"]) == 3


@pytest.mark.filterwarnings("ignore")
def test_only_the_first_rank_writes(harness, tiny_base, tmp_path, monkeypatch):
    """Rank 1 writes nothing, even if it is the first rank of a second machine."""
    monkeypatch.setattr(harness, "rank", lambda: 1)
    args = ["harness", "--base", tiny_base, "--tasks", save_harness_task(tmp_path), "--out", tmp_path / "out"]
    result = CliRunner().invoke(evaluate.main, [*map(str, args)])
    assert result.exit_code == 0 and result.stdout == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--tasks", "no_such_task.yaml"], "error: no_such_task.yaml: no such task"),
        (["--tasks", "{empty}"], "error: --tasks: "),
    ],
)
def test_missing_and_empty_tasks_are_named(harness, tiny_base, tmp_path, monkeypatch, args, message):
    (tmp_path / "empty.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    args = [arg.format(empty=tmp_path / "empty.yaml") for arg in args]
    result = CliRunner().invoke(evaluate.main, ["harness", "--base", str(tiny_base), *args])
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith(message), result.stderr


def test_missing_harness_is_a_one_line_error(tiny_base, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "tasks.harness", raising=False)
    monkeypatch.delattr("tasks.harness", raising=False)
    result = CliRunner().invoke(
        evaluate.main, ["harness", "--base", str(tiny_base), "--tasks", "x", "--out", str(tmp_path)]
    )
    assert result.exit_code == 2 and "pip install lm_eval" in result.stderr and result.stderr.count("\n") == 1


def test_invalid_task_is_a_one_line_error(tiny_base, tmp_path):
    path = save_harness_task(tmp_path)
    path.write_text(path.read_text().replace("output_type: multiple_choice\n", ""))
    args = ["harness", "--base", tiny_base, "--tasks", path, "--out", tmp_path / "out", "--device", "cpu"]
    result = CliRunner().invoke(evaluate.main, list(map(str, args)))
    message = result.stderr.replace("\r", "\n").splitlines()[-1]
    assert result.exit_code == 2 and message.startswith(
        f"error: --tasks {path}: the harness cannot evaluate the tasks: "
    )


def test_pipe_among_the_tasks_is_refused(tiny_base, tmp_path):
    os.mkfifo(tmp_path / "capitals.yaml")
    args = ["harness", "--base", tiny_base, "--tasks", "capitals", "--include-path", tmp_path, "--device", "cpu"]
    result = CliRunner().invoke(evaluate.main, list(map(str, [*args, "--out", tmp_path / "out"])))
    assert result.exit_code == 2 and "capitals.yaml: is a device or a pipe, not a file" in result.stderr
