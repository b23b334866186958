"""Encoders with heads: data, losses, training runs and scores."""

import json

import numpy as np
import pytest
import torch
from helpers import Ranks, evaluate, make_head_adapter, make_roberta, make_tokens, train, train_encoder_rank
from PIL import Image
from safetensors.torch import load_file

from encoder_tuning.data import read_labeled_images, read_labeled_texts
from encoder_tuning.labeled import Labeled, class_names
from encoder_tuning.objective import accuracy, class_loss, classify, span_loss, tag_loss
from train import TrainConfig, make_optimizer, mean_loss, train_step
from training.run_files import read_metrics


# ---------------------------------------------------------------------------------------------------
# Data


def test_labeled_images_are_read_from_folders_and_arrays(tmp_path):
    for label, number in (("cat", 2), ("dog", 1)):
        (tmp_path / "by-class" / label).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (9, 7), (i, 0, 0)).save(tmp_path / "by-class" / label / f"{i}.png")
    assert [(label, name) for _, label, name in read_labeled_images(tmp_path / "by-class")] == [
        ("cat", "cat/0.png"), ("cat", "cat/1.png"), ("dog", "dog/0.png"),
    ]  # fmt: skip
    images = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([7, 10, 7]))
    picture, label, name = read_labeled_images(tmp_path / "x.npz")[1]
    assert (label, name) == ("10", "image 1") and np.array_equal(np.asarray(picture), images[1])
    assert class_names(["10", "7", "9", "b", "a"]) == ["7", "9", "10", "a", "b"]
    for content in (b"", b"PK\x03\x04 torn"):
        (tmp_path / "torn.npz").write_bytes(content)
        with pytest.raises(ValueError, match="torn.npz: cannot be read as a .npz"):
            read_labeled_images(tmp_path / "torn.npz")
    np.save(tmp_path / "one.npy", images)
    with pytest.raises(ValueError, match="one.npy: cannot be read as a .npz"):
        read_labeled_images(tmp_path / "one.npy")
    for arrays, message in (
        (dict(images=images), "cannot be read as a .npz file with the arrays 'images' and 'labels'"),
        (dict(images=images / 2, labels=np.arange(3)), "'images' is float64"),
        (
            dict(images=images, labels=np.arange(4)),
            r"'labels' is int64 with shape \(4,\); expected one integer for each of the 3 images",
        ),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=f"bad.npz: {message}"):
            read_labeled_images(tmp_path / "bad.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no subfolders with images"):
        read_labeled_images(tmp_path / "empty")


def test_labeled_sentences_are_read(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\nit \'s "good"\t1\nbad\t0\n')
    assert read_labeled_texts(tmp_path / "a.tsv") == [('it \'s "good"', "1", "record 0"), ("bad", "0", "record 1")]
    (tmp_path / "a.csv").write_text('text,label\n"one, two",x\n')
    assert read_labeled_texts(tmp_path / "a.csv") == [("one, two", "x", "record 0")]
    (tmp_path / "a.json").write_text('[{"text": "hi", "label": 3}]')
    assert read_labeled_texts(tmp_path / "a.json") == [("hi", "3", "record 0")]
    for text, message in (
        ('[{"text": "hi"}]', "record 0: must have the fields 'text'"),
        ('[{"text": 3, "label": "x"}]', "record 0: field 'text' is 3"),
        ('[{"text": "a", "label": 0.5}]', "record 0: field 'label' is 0.5"),
        ('["hi"]', """record 0: must have .* .found: "hi"."""),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labeled_texts(tmp_path / "a.json")


# ---------------------------------------------------------------------------------------------------
# Losses and predictions


def make_examples(model, loss_fn=class_loss, sizes=(9, 5, 7, 12)):
    examples = []
    for i, size in enumerate(sizes):
        ids = make_tokens(model, size, seed=i).clamp(min=3)
        labels = (i % 3, 4) if loss_fn is span_loss else (i % 3,)
        if loss_fn is tag_loss:  # labels for every other token
            labels = tuple(-100 if t % 2 == 0 else (i + t) % 3 for t in range(size))
        examples.append(Labeled(ids, labels, f"example {i}", size))
    return examples


@pytest.mark.parametrize("loss_fn", [class_loss, span_loss, tag_loss], ids=["class", "span", "tags"])
def test_batched_loss_equals_single_examples(loss_fn):
    """Compare the loss of padded micro-batches with float64 losses of single examples. Labels of -100 do not count."""
    model = make_roberta()
    adapter = make_head_adapter(model, 2 if loss_fn is span_loss else 3)
    examples, expected = make_examples(model, loss_fn), []
    for example in examples:
        with torch.no_grad():
            states = model.encode(example.inputs[None], adapter())[0].double()
        scores = states @ adapter.head[0].weight.double().T + adapter.head[0].bias.double()  # (T, classes)
        label_scores = scores.T if loss_fn is span_loss else scores
        labels = [(i, label) for i, label in enumerate(example.labels) if label != -100]
        expected += [-label_scores[i].log_softmax(0)[label].item() for i, label in labels]
    for max_tokens in (12, 1000):
        config = TrainConfig(micro_batch_tokens=max_tokens)
        loss = mean_loss(model, adapter, examples, config, loss_fn)
        assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        loss_before_step = train_step(model, adapter, make_optimizer(adapter, 0.0), examples, 0.0, config, loss_fn)
        assert loss_before_step == pytest.approx(loss)
        assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("loss_fn", [class_loss, span_loss, tag_loss])
def test_rank_without_data_has_a_zero_gradient(loss_fn):
    model = make_roberta()
    adapter = make_head_adapter(model, 2)
    loss = loss_fn(model, adapter, [])
    loss.backward()
    assert loss.item() == 0 and all(parameter.grad.abs().max() == 0 for parameter in adapter.parameters())


def test_gates_of_encoders_move_first():
    """The gradient of the prompts is zero at zero gates; the gradients of the gates and the head are not."""
    model = make_roberta()
    adapter = make_head_adapter(model, 3, gates=False)
    optimizer = make_optimizer(adapter, 0.0)
    train_step(model, adapter, optimizer, make_examples(model), 0.0, TrainConfig(), class_loss)
    assert adapter.prompts.grad.abs().max() == 0
    assert adapter.gates.grad.abs().min() > 0 and adapter.head[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("max_tokens", [10, 1000])
def test_predicted_classes_keep_the_order_of_the_examples(max_tokens):
    """Batches of any size give the same classes as single examples."""
    model = make_roberta()
    adapter, examples = make_head_adapter(model, 3), make_examples(model, sizes=(9, 5, 12, 7, 5, 3, 11, 9))
    with torch.no_grad():
        scores = torch.stack([adapter.head(model.encode(e.inputs[None], adapter())[0, 0]) for e in examples])
        adapter.head[0].bias -= scores.mean(dim=0)  # so that no class is the most likely for all examples
        alone = (scores - scores.mean(dim=0)).argmax(dim=1).tolist()
    assert len(set(alone)) == 3 and classify(model, adapter, examples, max_tokens) == alone
    assert accuracy(alone, [*alone[:6], -1, -1]) == 0.75


# ---------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def image_data(tmp_path):
    """Folder with data/, images of the classes dark and light, and vit/, a headless ViT in Hugging Face's layout."""
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


def image_args(image_data):
    return [
        "--task", "image-classification", "--base", image_data / "vit", "--data", image_data / "data",
        "--out", image_data / "run", "--epochs", 8, "--warmup-epochs", 1, "--batch-size", 8, "--val-size", 4,
        "--lr", 0.1, "--device", "cpu",
    ]  # fmt: skip


def test_image_classes_are_learned_and_scored(image_data):
    args = image_args(image_data)
    result = train(*args)
    assert result.exit_code == 0, result.output
    losses = [line["val_loss"] for line in read_metrics(image_data / "run" / "metrics.jsonl") if "val_loss" in line]
    assert losses[-1] < losses[0] / 2
    assert {"curves.png", "summary.json", "adapter.safetensors"} <= {f.name for f in (image_data / "run").iterdir()}
    file = image_data / "run" / "adapter.safetensors"
    evaluate_args = ["--adapter", file, "--data", image_data / "data", "--device", "cpu"]
    scores = evaluate(*evaluate_args)
    assert scores.exit_code == 0 and "24 examples: accuracy 100.00%" in scores.stdout, scores.output
    limited = evaluate(*evaluate_args, "--limit", 12)
    assert (
        limited.exit_code == 0
        and "12 examples: accuracy 100.00%" in limited.stdout
        and "majority class 'dark': 100" not in limited.stdout
    )
    other_task = evaluate(*evaluate_args, "--task", "question-answering")
    assert (
        other_task.exit_code == 2
        and "was trained for image-classification, not for question-answering" in other_task.stderr
    )
    assert "No such option '--int8'" in train(*args, "--int8").stderr
    wrong_encoder = train(*args, "--task", "text-classification", "--out", image_data / "other")
    assert wrong_encoder.exit_code == 2 and "the task text-classification needs a RoBERTa" in wrong_encoder.stderr
    too_many_layers = train(*args, "--layers", 4, "--out", image_data / "deep")
    assert (
        too_many_layers.exit_code == 2
        and "--layers 4: " in too_many_layers.stderr
        and "has only 3" in too_many_layers.stderr
    )


def test_resuming_equals_an_uninterrupted_run(image_data):
    args = image_args(image_data)
    assert train(*args).exit_code == 0
    stopped = train(*args, "--out", image_data / "parts", "--max-minutes", 1e-9)
    assert stopped.exit_code == 0 and "stopped by --max-minutes after step 1" in stopped.stderr, stopped.output
    assert train(*args, "--out", image_data / "parts", "--resume").exit_code == 0
    one, other = (load_file(image_data / name / "adapter.safetensors") for name in ("run", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_ranks_train_like_a_single_process(forks, image_data):
    args = [*image_args(image_data), "--batch-size", 3, "--epochs", 2]
    results = Ranks(forks, 2, train_encoder_rank, args).results()
    assert [code for code, _, _ in results] == [0, 0], results
    assert train(*args, "--out", image_data / "alone").exit_code == 0
    one, other = (load_file(image_data / name / "adapter.safetensors") for name in ("run", "alone"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-3)


def test_sentence_classes_are_learned_and_scored(roberta, tmp_path):
    lines = [f"{'good' if i % 2 else 'bad'} film number {i}\t{i % 2}" for i in range(32)]
    (tmp_path / "a.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    result = train(
        "--task", "text-classification", "--base", roberta, "--data", tmp_path / "a.tsv", "--out", tmp_path / "run",
        "--epochs", 30, "--warmup-epochs", 1, "--batch-size", 8, "--val-size", 0, "--lr", 0.03, "--max-seq-len", 64,
        "--layers", 2, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    file = tmp_path / "run" / "adapter.safetensors"
    scores = evaluate("--adapter", file, "--data", tmp_path / "a.tsv", "--device", "cpu", "--out", tmp_path / "x.json")
    assert scores.exit_code == 0 and "32 examples: accuracy " in scores.stdout, scores.output
    answers = json.loads((tmp_path / "x.json").read_text())
    right = sum(answers[f"record {i}"] == str(i % 2) for i in range(32))
    assert right >= 28 and f"({right} correct)" in scores.stdout
    (tmp_path / "one.tsv").write_text("sentence\tlabel\na\tx\nb\tx\n")
    one_class = train(
        "--task", "text-classification", "--base", roberta, "--data", tmp_path / "one.tsv", "--out", tmp_path / "one",
        "--max-seq-len", 64, "--layers", 1, "--device", "cpu",
    )  # fmt: skip
    assert one_class.exit_code == 2 and "has only one class, 'x'" in one_class.stderr
    (tmp_path / "b.tsv").write_text("sentence\tlabel\nfilm\tnew\n")
    unknown_class = evaluate("--adapter", file, "--data", tmp_path / "b.tsv", "--device", "cpu")
    assert (
        unknown_class.exit_code == 2
        and "record 0: unknown class 'new'; expected one of '0', '1'" in unknown_class.stderr
    )
