"""Encoders with heads: their data, what they learn, and how answers are marked."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import Ranks, make_roberta, make_tokens, tune_rank, vary
from PIL import Image
from safetensors.torch import load_file

from encoder_tuning import objective
from encoder_tuning.__main__ import main
from encoder_tuning.data import (
    Labelled,
    SquadQuestion,
    class_names,
    read_labelled_images,
    read_labelled_texts,
    read_squad,
    span_of,
)
from encoder_tuning.objective import CLASSIFICATION, SPANS, accuracy, answer_squad, classify, squad_scores
from encoders.heads import HeadAdapter
from formats.roberta_tokenizer import RobertaTokenizer
from train import TrainConfig, make_optimizer, mean_loss, train_step
from training.run_files import read_metrics


def make_head_adapter(model, classes, gates=True, **more):
    config = model.config
    adapter = HeadAdapter(
        layers=2, length=4, dim=config.dim, heads=config.n_heads, widths=[config.dim, classes],
        generator=torch.Generator().manual_seed(1), **more,
    )  # fmt: skip
    if gates:
        torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(2))
    return adapter


# ---------------------------------------------------------------------------------------------------
# Data


def test_pictures_by_folder_and_by_array(tmp_path):
    for label, number in (("cat", 2), ("dog", 1)):
        (tmp_path / "by-class" / label).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (9, 7), (i, 0, 0)).save(tmp_path / "by-class" / label / f"{i}.png")
    assert [(label, name) for _, label, name in read_labelled_images(tmp_path / "by-class")] == [
        ("cat", "cat/0.png"), ("cat", "cat/1.png"), ("dog", "dog/0.png"),
    ]  # fmt: skip
    images = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([7, 10, 7]))
    picture, label, name = read_labelled_images(tmp_path / "x.npz")[1]
    assert (label, name) == ("10", "image 1") and np.array_equal(np.asarray(picture), images[1])
    assert class_names(["10", "7", "9", "b", "a"]) == ["7", "9", "10", "a", "b"]
    for content in (b"", b"PK\x03\x04 torn"):
        (tmp_path / "torn.npz").write_bytes(content)
        with pytest.raises(ValueError, match="torn.npz: is no .npz"):
            read_labelled_images(tmp_path / "torn.npz")
    np.save(tmp_path / "one.npy", images)
    with pytest.raises(ValueError, match="one.npy: is no .npz"):
        read_labelled_images(tmp_path / "one.npy")
    for arrays, message in (
        (dict(images=images), "is no .npz with arrays 'images' and 'labels'"),
        (dict(images=images / 2, labels=np.arange(3)), "images are float64"),
        (dict(images=images, labels=np.arange(4)), r"labels are int64 \(4,\) for 3 images"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=f"bad.npz: {message}"):
            read_labelled_images(tmp_path / "bad.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no folders of images"):
        read_labelled_images(tmp_path / "empty")


def test_sentences(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\nit \'s "good"\t1\nbad\t0\n')
    assert read_labelled_texts(tmp_path / "a.tsv") == [('it \'s "good"', "1", "record 0"), ("bad", "0", "record 1")]
    (tmp_path / "a.csv").write_text('text,label\n"one, two",x\n')
    assert read_labelled_texts(tmp_path / "a.csv") == [("one, two", "x", "record 0")]
    (tmp_path / "a.json").write_text('[{"text": "hi", "label": 3}]')
    assert read_labelled_texts(tmp_path / "a.json") == [("hi", "3", "record 0")]
    for text, message in (
        ('[{"text": "hi"}]', "record 0: has no fields 'text'"),
        ('[{"text": 3, "label": "x"}]', "record 0: field 'text' is a int"),
        ('[{"text": "a", "label": 0.5}]', "record 0: field 'label' is a float"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labelled_texts(tmp_path / "a.json")


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "The river Añil runs to the sea. It is 12 km long.",
                    "qas": [
                        {"id": "a", "question": "How long?", "answers": [{"text": "12 km", "answer_start": 38}]},
                        {"id": "b", "question": "Where to?", "answers": [{"text": "the sea", "answer_start": 23}]},
                    ],
                }
            ]
        }
    ]
}


def squad(tmp_path, **answer):
    values = json.loads(json.dumps(SQUAD))
    values["data"][0]["paragraphs"][0]["qas"][0]["answers"][0] |= answer
    (tmp_path / "squad.json").write_text(json.dumps(values))
    return tmp_path / "squad.json"


def test_squad_s_format(tmp_path):
    first, second = read_squad(squad(tmp_path))
    assert (first.id, first.answers, first.starts) == ("a", ["12 km"], [38]) and second.question == "Where to?"
    with pytest.raises(ValueError, match="question a: the answer '12 km' does not stand at character 37"):
        read_squad(squad(tmp_path, answer_start=37))
    with pytest.raises(ValueError, match="does not stand at character -11"):
        read_squad(squad(tmp_path, answer_start=-11))
    (tmp_path / "x.json").write_text('{"data": [{"paragraphs": [{"qas": [{}]}]}]}')
    with pytest.raises(ValueError, match="x.json: is not in SQuAD's format: KeyError: 'id'"):
        read_squad(tmp_path / "x.json")


def test_spans(bpe, tmp_path):
    """Tokens of every answer, and its text again; a context that is cut has those only that are whole in it."""
    tokenizer = RobertaTokenizer(bpe)
    for question in read_squad(squad(tmp_path)):
        span = span_of(question, tokenizer, 200)
        start, answer = question.starts[0], question.answers[0]
        first, last = span.positions(start, start + len(answer))
        assert span.text(question.context, first, last) == answer
        assert span.ids[0] == 0 and span.ids[-1] == 2 and span.ids[span.first - 2 : span.first] == [2, 2]
    long, _ = read_squad(squad(tmp_path))
    whole = len(span_of(long, tokenizer, 200).ids)
    cut = span_of(long, tokenizer, whole - 12)
    assert len(cut.ids) == whole - 12 and cut.positions(38, 43) is None and cut.positions(4, 9) is not None


def test_squad_s_scores(monkeypatch):
    """By hand, after the definitions: case, articles and punctuation are of no account; F1 is of words, at its best."""
    pytest.importorskip("torchmetrics")
    for text, answers, exact, f1 in (
        ("The  Panthers!", ["panthers"], 1, 1),
        ("Panther", ["panthers"], 0, 0),
        ("a, b", ["x", "b"], 1, 1),
        ("", ["x"], 0, 0),
        ("the big red dog", ["red dog", "cat"], 0, 2 * 2 / (3 + 2)),
        ("dog dog", ["dog"], 0, 2 * 1 / (2 + 1)),
        ("red red dog", ["cat", "the red"], 0, 2 * 1 / (3 + 1)),
        ("in 1976, twice", ["twice in 1976"], 0, 1),
    ):
        questions = [SquadQuestion("id", "?", "", answers, [0])]
        assert squad_scores([text], questions) == pytest.approx({"exact_match": exact, "f1": f1}), text
    both = [SquadQuestion("same id", "?", "", [answer], [0]) for answer in ("yes", "no way")]
    assert squad_scores(["Yes.", "no"], both) == pytest.approx({"exact_match": 1 / 2, "f1": (1 + 2 / 3) / 2})
    assert accuracy([0, 2, 1, 1], [0, 1, 1, 0]) == 0.5
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional.text", None)
    with pytest.raises(ValueError, match="not installed: pip install torchmetrics"):
        squad_scores(["Yes.", "no"], both)


# ---------------------------------------------------------------------------------------------------
# What is learnt


def examples_of(model, spans, sizes=(9, 5, 7, 12)):
    examples = []
    for i, size in enumerate(sizes):
        ids = make_tokens(model, size, seed=i).clamp(min=3)
        examples.append(Labelled(ids, (i % 3, 4) if spans else (i % 3,), f"example {i}", size))
    return examples


@pytest.mark.parametrize("spans", [False, True])
def test_the_loss_is_that_of_every_example_alone(spans):
    """With padding and in parts of any size; in float64 by hand."""
    model = make_roberta()
    adapter = make_head_adapter(model, 2 if spans else 3)
    examples, expected = examples_of(model, spans), []
    for example in examples:
        with torch.no_grad():
            states = model.encode(example.inputs[None], adapter())[0].double()
        scores = states @ adapter.head[0].weight.double().T + adapter.head[0].bias.double()  # (T, classes)
        of_labels = scores.T if spans else scores[:1]
        expected += [-of_labels[i].log_softmax(0)[label].item() for i, label in enumerate(example.labels)]
    for max_tokens in (12, 1000):
        config, of = TrainConfig(micro_batch_tokens=max_tokens), SPANS if spans else CLASSIFICATION
        loss = mean_loss(model, adapter, examples, config, of)
        assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        before_step = train_step(model, adapter, make_optimizer(adapter, 0.0), examples, 0.0, config, of)
        assert before_step == pytest.approx(loss)
        assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("of", [CLASSIFICATION, SPANS])
def test_a_rank_out_of_work_has_a_gradient_of_zero(of):
    model = make_roberta()
    adapter = make_head_adapter(model, 2)
    loss = of.loss_sum(model, adapter, None)
    loss.backward()
    assert loss.item() == 0 and all(parameter.grad.abs().max() == 0 for parameter in adapter.parameters())


def test_the_gates_of_encoders_open_first():
    """At gate zero the prompts have no gradient, the gates and the head have one."""
    model = make_roberta()
    adapter = make_head_adapter(model, 3, gates=False)
    optimizer = make_optimizer(adapter, 0.0)
    train_step(model, adapter, optimizer, examples_of(model, False), 0.0, TrainConfig(), CLASSIFICATION)
    assert adapter.prompts.grad.abs().max() == 0
    assert adapter.gates.grad.abs().min() > 0 and adapter.head[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("max_tokens", [10, 1000])
def test_classes_are_in_the_order_of_the_examples(max_tokens):
    """Each as alone, however they are put together."""
    model = make_roberta()
    adapter, examples = make_head_adapter(model, 3), examples_of(model, False, sizes=(9, 5, 12, 7, 5, 3, 11, 9))
    with torch.no_grad():
        scores = torch.stack([adapter.head(model.encode(e.inputs[None], adapter())[0, 0]) for e in examples])
        adapter.head[0].bias -= scores.mean(dim=0)  # so that not one class is the likeliest of all
        alone = (scores - scores.mean(dim=0)).argmax(dim=1).tolist()
    assert len(set(alone)) == 3 and classify(model, adapter, examples, max_tokens) == alone


def test_likeliest_answers(bpe, tmp_path, monkeypatch):
    """The best of all spans of the context, by trying each: not of the question, back to front, or too long."""
    tokenizer, random = RobertaTokenizer(bpe), torch.Generator().manual_seed(0)
    first, _ = read_squad(squad(tmp_path))
    span = span_of(first, tokenizer, 200)
    for _ in range(20):
        found = torch.randn(len(span.ids), 2, generator=random)
        found[1] = 50  # in the question
        monkeypatch.setattr(objective, "span_scores", lambda *_: found[None])
        pairs = [(a, b) for a in range(len(span.offsets)) for b in range(a, min(a + 6, len(span.offsets)))]
        a, b = max(pairs, key=lambda pair: found[span.first + pair[0], 0] + found[span.first + pair[1], 1])
        text = answer_squad(None, None, tokenizer, first, 200, longest=6)
        assert text == first.context[span.offsets[a][0] : span.offsets[b][1]].strip()


# ---------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def pictures(tmp_path):
    """Bright and dark ones, in two folders, and a vision transformer in Hugging Face's layout without a head."""
    for i in range(24):
        label = ("dark", "light")[i % 2]
        (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 100, (16, 16, 3), dtype=np.uint8) + 120 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / label / f"{i}.png")
    transformers = pytest.importorskip("transformers")
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **shape)).save_pretrained(
        tmp_path / "vit"
    )
    return tmp_path


def tune(*args):
    """python -m encoder_tuning train, in this process."""
    return CliRunner().invoke(main, ["train", *map(str, args)])


def ask(*args):
    """python -m encoder_tuning evaluate, in this process."""
    return CliRunner().invoke(main, ["evaluate", *map(str, args)])


def pictures_args(pictures):
    return [
        "--task", "image-classification", "--base", pictures / "vit", "--data", pictures / "data",
        "--out", pictures / "run", "--epochs", 8, "--warmup-epochs", 1, "--batch-size", 8, "--val-size", 4, "--lr", 0.1,
        "--device", "cpu",
    ]  # fmt: skip


def test_a_run_on_pictures(pictures):
    args = pictures_args(pictures)
    result = tune(*args)
    assert result.exit_code == 0, result.output
    losses = [line["val_loss"] for line in read_metrics(pictures / "run" / "metrics.jsonl") if "val_loss" in line]
    assert losses[-1] < losses[0] / 2
    assert {"curves.png", "summary.json", "adapter.safetensors"} <= {f.name for f in (pictures / "run").iterdir()}
    file = pictures / "run" / "adapter.safetensors"
    asked = ["--adapter", file, "--data", pictures / "data", "--device", "cpu"]
    scores = ask(*asked)
    assert scores.exit_code == 0 and "24 examples: accuracy 100.00%" in scores.stdout, scores.output
    few = ask(*asked, "--limit", 12)
    assert (
        few.exit_code == 0 and "12 examples: accuracy 100.00%" in few.stdout and "always 'dark': 100" not in few.stdout
    )
    other = ask(*asked, "--task", "question-answering")
    assert other.exit_code == 2 and "is for image-classification, not for question-answering" in other.stderr
    assert "No such option '--int8'" in tune(*args, "--int8").stderr
    wrong = tune(*args, "--task", "text-classification", "--out", pictures / "other")
    assert wrong.exit_code == 2 and "--task text-classification needs a RoBERTa" in wrong.stderr
    deep = tune(*args, "--layers", 4, "--out", pictures / "deep")
    assert deep.exit_code == 2 and "--layers 4: " in deep.stderr and "has only 3" in deep.stderr


def test_a_resumed_run_is_the_same(pictures):
    args = pictures_args(pictures)
    assert tune(*args).exit_code == 0
    stopped = tune(*args, "--out", pictures / "parts", "--max-minutes", 1e-9)
    assert stopped.exit_code == 0 and "stopped by --max-minutes after step 1" in stopped.stderr, stopped.output
    assert tune(*args, "--out", pictures / "parts", "--resume").exit_code == 0
    one, other = (load_file(pictures / name / "adapter.safetensors") for name in ("run", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ranks(forks, pictures):
    args = [*pictures_args(pictures), "--batch-size", 3, "--epochs", 2]
    results = Ranks(forks, 2, tune_rank, args).results()
    assert [code for code, _, _ in results] == [0, 0], results
    assert tune(*args, "--out", pictures / "alone").exit_code == 0
    one, other = (load_file(pictures / name / "adapter.safetensors") for name in ("run", "alone"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-3)


@pytest.fixture
def reader(tmp_path, bpe):
    """A RoBERTa in Hugging Face's layout, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=266, max_position_embeddings=130, type_vocab_size=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48,
    )  # fmt: skip
    vary(transformers.RobertaModel(config)).save_pretrained(tmp_path / "roberta")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "roberta" / name).write_text((bpe / name).read_text())
    return tmp_path / "roberta"


def test_a_run_on_sentences(reader, tmp_path):
    lines = [f"{'good' if i % 2 else 'bad'} film number {i}\t{i % 2}" for i in range(32)]
    (tmp_path / "a.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    result = tune(
        "--task", "text-classification", "--base", reader, "--data", tmp_path / "a.tsv", "--out", tmp_path / "run",
        "--epochs", 30, "--warmup-epochs", 1, "--batch-size", 8, "--val-size", 0, "--lr", 0.03, "--max-seq-len", 64,
        "--layers", 2, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    file = tmp_path / "run" / "adapter.safetensors"
    scores = ask("--adapter", file, "--data", tmp_path / "a.tsv", "--device", "cpu", "--out", tmp_path / "x.json")
    assert scores.exit_code == 0 and "32 examples: accuracy " in scores.stdout, scores.output
    answers = json.loads((tmp_path / "x.json").read_text())
    right = sum(answers[f"record {i}"] == str(i % 2) for i in range(32))
    assert right >= 28 and f"({right} right)" in scores.stdout
    (tmp_path / "one.tsv").write_text("sentence\tlabel\na\tx\nb\tx\n")
    alike = tune(
        "--task", "text-classification", "--base", reader, "--data", tmp_path / "one.tsv", "--out", tmp_path / "one",
        "--max-seq-len", 64, "--layers", 1, "--device", "cpu",
    )  # fmt: skip
    assert alike.exit_code == 2 and "has only one class, 'x'" in alike.stderr
    (tmp_path / "b.tsv").write_text("sentence\tlabel\nfilm\tnew\n")
    new = ask("--adapter", file, "--data", tmp_path / "b.tsv", "--device", "cpu")
    assert new.exit_code == 2 and "record 0: its class 'new' is none of 0, 1" in new.stderr


def test_a_run_on_questions(reader, tmp_path):
    args = ["--data", squad(tmp_path), "--device", "cpu"]
    result = tune(
        "--task", "question-answering", "--base", reader, "--out", tmp_path / "run", "--epochs", 60,
        "--warmup-epochs", 1, "--val-size", 0, "--lr", 0.1, "--max-seq-len", 100, "--layers", 2, *args,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    scores = ask("--adapter", tmp_path / "run" / "adapter.safetensors", *args)
    assert scores.exit_code == 0 and "2 questions: exact match 100.00%, F1 100.00%" in scores.stdout, scores.output
    short = tune(
        "--task", "question-answering", "--base", reader, "--out", tmp_path / "cut", "--max-seq-len", 40, *args,
        "--epochs", 3,
    )  # fmt: skip
    assert short.exit_code == 0 and "1 dropped (the answer is beyond 40 tokens)" in short.stderr, short.output
