"""Token classification: CoNLL columns, one label per word, and entity scores."""

import json
import sys

import pytest
import torch
from helpers import evaluate, make_head_adapter, make_roberta, make_tokens, train, randomize
from safetensors import safe_open
from safetensors.torch import load_file

from encoder_tuning.conll import TaggedSentence, entity_scores, labeled_sentences, read_conll, tag_classes, to_bio
from encoder_tuning.labeled import Labeled
from data import group_by_length
from encoder_tuning.objective import collate_labeled, predict_tags, tag_loss, tag_scores
from encoder_tuning.trained import head_fits_task
from encoders.heads import head_adapter
from formats.encoders import head_labels, load_encoder
from formats.roberta_tokenizer import RobertaTokenizer

TAG_NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]  # not in alphabetical order
TEXT = """-DOCSTART- -X- -X- O

the DT B-NP O
river NN I-NP B-LOC
Km NN I-NP I-LOC

Anna\tNNP\tB-PER
 went VBD O
"""


def write_conll(folder, text=TEXT):
    (folder / "a.conll").write_text(text)
    return folder / "a.conll"


def test_columns_are_read_as_sentences(tmp_path):
    expected = [
        TaggedSentence(["the", "river", "Km"], ["O", "B-LOC", "I-LOC"], "sentence 0"),
        TaggedSentence(["Anna", "went"], ["B-PER", "O"], "sentence 1"),
    ]
    assert read_conll(write_conll(tmp_path)) == expected
    assert read_conll(write_conll(tmp_path, TEXT.replace("\n", "\r\n"))) == expected
    assert read_conll(write_conll(tmp_path, TEXT.rstrip())) == expected
    # A no-break space belongs to its word, and so does U+2028, at which str.splitlines would split.
    odd = read_conll(write_conll(tmp_path, "10\u00a0km B-LOC\na\u2028b O\n"))
    assert odd[0].words == ["10\u00a0km", "a\u2028b"]
    for text, message in (
        ("Anna B-PER\nwent\n", "a.conll: line 2: has 1 column"),
        ("Anna S-PER\n", "a.conll: line 1: the tag is 'S-PER'; expected O, B-TYPE or I-TYPE"),
        ("Anna B-\n", "line 1: the tag is 'B-'; expected O"),
        ("-DOCSTART- O\n\n", "a.conll: contains no sentences"),
    ):
        with pytest.raises(ValueError, match=message):
            read_conll(write_conll(tmp_path, text))


def test_iob1_is_converted_to_bio():
    """Expected tags are written by hand. Adjacent entities stay separate."""
    for tags, bio in (
        ("I-A I-A O I-A", "B-A I-A O B-A"),
        ("I-A B-A I-A", "B-A B-A I-A"),
        ("I-A I-B I-B", "B-A B-B I-B"),
        ("B-A I-A O O B-B", "B-A I-A O O B-B"),
        ("B-A I-B", "B-A B-B"),
    ):
        assert to_bio(tags.split()) == bio.split()
        assert to_bio(bio.split()) == bio.split()


@pytest.mark.parametrize("max_length", [100, 9, 8, 7, 3, 2])
def test_label_of_a_word_is_at_its_first_token(bpe, max_length):
    """Compare token ids and labeled positions with transformers. With room for two tokens, the example is dropped."""
    transformers = pytest.importorskip("transformers")
    files = [str(bpe / name) for name in ("vocab.json", "merges.txt")]
    theirs = transformers.RobertaTokenizer(*files, add_prefix_space=True)
    words, tags = ["the", "Añil", "don't", "12", "km"], ["O", "B-LOC", "I-LOC", "B-PER", "O"]
    data = labeled_sentences([TaggedSentence(words, tags, "sentence 0")], RobertaTokenizer(bpe), max_length, TAG_NAMES)
    if max_length == 2:
        assert (data.examples, data.dropped, data.num_truncated) == ([], 1, 0)
        return
    encoded = theirs(words, is_split_into_words=True, truncation=True, max_length=max_length)
    expected, previous = [], None
    for word in encoded.word_ids():
        expected.append(-100 if word is None or word == previous else TAG_NAMES.index(tags[word]))
        previous = word
    (example,) = data.examples
    assert example.inputs.tolist() == encoded.input_ids and list(example.labels) == expected
    assert (data.num_truncated, data.dropped) == (int(max_length < 100), 0)
    assert example.num_targets == sum(label != -100 for label in expected) > 0


def test_classes_keep_the_order_of_the_head():
    """If the base's head does not have all classes of the data, the data's classes are used, in alphabetical order."""
    sentences = [TaggedSentence(["a", "b"], ["B-LOC", "O"], "sentence 0")]
    assert tag_classes(sentences, TAG_NAMES) == TAG_NAMES
    assert tag_classes(sentences, ["LABEL_0", "LABEL_1"]) == tag_classes(sentences, []) == ["B-LOC", "O"]
    with pytest.raises(ValueError, match="sentence 0: unknown tag 'B-LOC'; expected one of 'O', 'B-PER'"):
        labeled_sentences(sentences, RobertaTokenizer, 9, ["O", "B-PER"])


def test_predicted_tags_keep_the_order_of_the_examples():
    """Batches of any size give the same tags as single examples, with nonzero gates."""
    model = make_roberta()
    adapter, examples = make_head_adapter(model, 3), []
    for i, size in enumerate((9, 5, 12, 7, 5)):
        labels = tuple(-100 if t % 3 else 0 for t in range(size))
        examples.append(Labeled(make_tokens(model, size, seed=i).clamp(min=3), labels, str(i), size))
    with torch.no_grad():
        scores = [adapter.head(model.encode(example.inputs[None], adapter())[0]) for example in examples]
        center = torch.cat(scores).mean(dim=0)
        adapter.head[0].bias -= center  # so that no tag is the most likely everywhere
    alone = [(score - center)[::3].argmax(dim=1).tolist() for score in scores]
    assert len(set(sum(alone, []))) == 3
    for max_tokens in (10, 1000):
        assert predict_tags(model, adapter, examples, max_tokens) == alone


def test_entities_match_by_type_and_both_ends():
    """The expected scores are computed by hand."""
    pytest.importorskip("seqeval")
    expected = ["B-A I-A O B-B O".split(), "B-A B-A O".split(), "O O".split()]
    predicted = ["B-A I-A O B-A O".split(), "B-A I-A O".split(), "O B-B".split()]
    # Expected: A 0-1, B 3, A 0, A 1. Predicted: A 0-1 (right), A 3 (wrong type), A 0-1 (wrong end), B 1 (no entity).
    scores = entity_scores(predicted, expected)
    assert scores == pytest.approx({"precision": 1 / 4, "recall": 1 / 4, "f1": 1 / 4, "entities": 4})
    scores = entity_scores([["O"] * len(tags) for tags in expected[:1]] + predicted[1:], expected)
    assert scores == {"precision": 0, "recall": 0, "f1": 0, "entities": 4}
    assert entity_scores([["B-A", "B-B"]], [["B-A", "O"]])["f1"] == pytest.approx(2 / 3)
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0, "entities": 0}


def save_tagger(folder, bpe):
    """Save a random RobertaForTokenClassification with the labels TAG_NAMES, and the tokenizer in the folder `bpe`.

    Returns the model.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=266, max_position_embeddings=130, type_vocab_size=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48, id2label=dict(enumerate(TAG_NAMES)), layer_norm_eps=1e-5,
    )  # fmt: skip
    model = randomize(transformers.RobertaForTokenClassification(config))
    with torch.no_grad():  # so that no tag is the most likely for all words
        ids = torch.randint(3, 266, (20, 12), generator=torch.Generator().manual_seed(0))
        model.classifier.bias -= model(ids).logits.mean(dim=(0, 1))
    model.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text((bpe / name).read_text())
    return model


SENTENCES = [  # each word always has the same tag, so that a small model can learn the tags
    "the DT B-LOC\nkm NN I-LOC\nand CC O\nto TO B-PER\n"
    if i % 2
    else "Anna NN O\nto TO B-PER\nthe DT B-LOC\nkm NN I-LOC\n"
    for i in range(16)
]


def test_logits_and_loss_equal_transformers(bpe, tmp_path):
    """Compare a padded batch, with the head of the checkpoint. Only the first token of each word has a loss."""
    theirs = save_tagger(tmp_path / "tagger", bpe)
    model, head = load_encoder(tmp_path / "tagger")
    assert head_fits_task(head, "token-classification") and not head_fits_task(head, "question-answering")
    assert not head_fits_task(head, "text-classification") and head_labels(tmp_path / "tagger") == TAG_NAMES
    adapter = head_adapter(model, head, len(TAG_NAMES), layers=1, length=2)
    sentences = read_conll(write_conll(tmp_path, TEXT + "\n" + "\n".join(SENTENCES[:3])))
    examples = labeled_sentences(sentences, RobertaTokenizer(bpe), 100, TAG_NAMES).examples
    ids, labels = collate_labeled(group_by_length(examples, 1000)[0])
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != 1).long(), labels=labels)
        scores = tag_scores(model, adapter, ids).transpose(1, 2)
    torch.testing.assert_close(scores[ids != 1], expected.logits[ids != 1], rtol=1e-4, atol=1e-4)
    groups = group_by_length(examples, 40)
    loss = sum(tag_loss(model, adapter, group) for group in groups)
    assert len(groups) > 1 and (ids == 1).any()
    assert (loss / sum(example.num_targets for example in examples)).item() == pytest.approx(
        expected.loss.item(), rel=1e-4
    )


def test_pretrained_head_of_a_base_is_used(bpe, tmp_path):
    """The tags equal those of transformers, and training starts from the head. A head for other tasks is refused."""
    pytest.importorskip("seqeval")
    theirs = save_tagger(tmp_path / "tagger", bpe)
    args = ["--task", "token-classification", "--base", tmp_path / "tagger", "--device", "cpu"]
    file = write_conll(tmp_path, "\n".join(SENTENCES))
    result = evaluate(*args, "--data", file, "--out", tmp_path / "tags.json")
    assert result.exit_code == 0, result.output
    answers = json.loads((tmp_path / "tags.json").read_text())
    tokenizer, seen = RobertaTokenizer(bpe), set()
    for sentence in read_conll(file):
        pieces = [tokenizer.encode(f" {word}") for word in sentence.words]
        with torch.no_grad():
            best = theirs(torch.tensor([[0, *sum(pieces, []), 2]])).logits[0].argmax(dim=1).tolist()
        starts = [1 + sum(map(len, pieces[:i])) for i in range(len(pieces))]
        assert answers[sentence.name] == [TAG_NAMES[best[start]] for start in starts]
        seen |= set(answers[sentence.name])
    assert len(seen) > 1  # with a single tag for all words, the comparison would show nothing

    trained = train(*args, "--data", file, "--out", tmp_path / "run", "--lr", 0, "--epochs", 3, "--max-seq-len", 40)
    assert trained.exit_code == 0, trained.output
    tensors = load_file(tmp_path / "run" / "adapter.safetensors")
    assert torch.equal(tensors["head.0.weight"], theirs.classifier.weight)
    wrong_task = evaluate("--base", tmp_path / "tagger", "--task", "question-answering", "--data", file)
    assert wrong_task.exit_code == 2 and "has no head of its own for question-answering" in wrong_task.stderr
    config = json.loads((tmp_path / "tagger" / "config.json").read_text())
    for labels, message in (
        (None, "names 0 classes, but its head has 5 outputs"),
        ({str(i): f"LABEL_{i}" for i in range(5)}, "its classes: the tag is 'LABEL_0'; expected O, B-TYPE"),
    ):
        (tmp_path / "tagger" / "config.json").write_text(json.dumps(config | {"id2label": labels}))
        unnamed = evaluate(*args, "--data", file)
        assert unnamed.exit_code == 2 and message in unnamed.stderr, unnamed.output


def test_tags_are_learned_and_their_entities_are_scored(roberta, tmp_path, monkeypatch):
    """Train on a CoNLL file and score the entities. Words beyond --max-seq-len are tagged O."""
    pytest.importorskip("seqeval")
    file = write_conll(tmp_path, "\n".join(SENTENCES))
    args = ["--data", file, "--device", "cpu"]
    options = ["--epochs", 30, "--warmup-epochs", 1, "--batch-size", 4, "--val-size", 0, "--lr", 0.03, "--layers", 2]
    options += ["--task", "token-classification", "--base", roberta]
    result = train(*args, *options, "--max-seq-len", 64, "--out", tmp_path / "run")
    assert result.exit_code == 0 and "0 dropped" in result.stderr and ", 0 truncated" in result.stderr, result.output
    with safe_open(tmp_path / "run" / "adapter.safetensors", "pt") as saved:
        assert "val_loss_after" not in saved.metadata()  # there are no validation examples
    trained = ["--adapter", tmp_path / "run" / "adapter.safetensors"]
    scores = evaluate(*trained, *args, "--out", tmp_path / "tags.json")
    answers = json.loads((tmp_path / "tags.json").read_text())
    assert answers == {sentence.name: sentence.tags for sentence in read_conll(file)}
    entities = sum(tag[0] == "B" for tags in answers.values() for tag in tags)
    expected = f"16 sentences (0 truncated), {entities} entities: F1 100.00%, precision 100.00%, recall 100.00%"
    assert scores.exit_code == 0 and expected in scores.stdout, scores.output

    truncated = train(*args, *options, "--max-seq-len", 8, "--out", tmp_path / "cut", "--epochs", 2)
    assert truncated.exit_code == 0 and ", 16 truncated" in truncated.stderr, truncated.output
    truncated_scores = evaluate(
        "--adapter", tmp_path / "cut" / "adapter.safetensors", *args, "--out", tmp_path / "tags.json"
    )
    answers = json.loads((tmp_path / "tags.json").read_text())
    assert truncated_scores.exit_code == 0 and "(16 truncated)" in truncated_scores.stdout, truncated_scores.output
    assert all(len(tags) == 4 and tags[3] == "O" for tags in answers.values())
    empty = train(*args, *options, "--max-seq-len", 2, "--out", tmp_path / "none")
    assert (
        empty.exit_code == 2
        and "every example was dropped (no word fits into 2 tokens); increase --max-seq-len" in empty.stderr
    ), empty.output

    unknown_tag = evaluate(*trained, "--data", write_conll(tmp_path, "Anna B-NEW\n"), "--device", "cpu")
    assert (
        unknown_tag.exit_code == 2
        and "a.conll: sentence 0: unknown tag 'B-NEW'; expected one of 'B-LOC', 'B-PER', 'I-LOC', 'O'"
        in unknown_tag.stderr
    )
    one_class = train("--data", write_conll(tmp_path, "Anna O\n"), *options, "--out", tmp_path / "alike")
    assert one_class.exit_code == 2 and "a.conll: has only one class, 'O'" in one_class.stderr, one_class.output
    monkeypatch.setitem(sys.modules, "seqeval.metrics.sequence_labeling", None)
    missing = evaluate(*trained, *args)
    assert missing.exit_code == 2 and "not installed: pip install seqeval" in missing.stderr
    assert len(missing.stderr.strip().splitlines()) == 1
