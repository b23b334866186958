"""RoBERTa's tokenizer: ids and character offsets of tokens, from the files of Hugging Face or of fairseq."""

import json

import pytest

from formats.roberta_tokenizer import RobertaTokenizer


def test_tokens_are_merged_and_have_character_offsets(bpe):
    tokenizer = RobertaTokenizer(bpe)
    assert tokenizer.encode(" the km")[:1] == [6] and tokenizer.encode(" km") == [8]
    ids, offsets = tokenizer.encode_with_offsets("Añil the km")
    assert len(ids) == len(offsets) and offsets[-2:] == [(4, 8), (8, 11)]
    assert offsets[:4] == [(0, 1), (1, 2), (1, 2), (2, 3)]  # ñ is two bytes, each of which is a token
    with pytest.raises(FileNotFoundError, match="has neither merges.txt nor vocab.bpe"):
        RobertaTokenizer(bpe.parent)


def test_ids_equal_those_of_transformers(bpe):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.RobertaTokenizer(str(bpe / "vocab.json"), str(bpe / "merges.txt"))
    for text in ("the the km", " a the\n\n  thé 12kms 🙂", "don't he'll THE"):
        assert RobertaTokenizer(bpe).encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_real_tokenizer_gives_known_ids(data):
    """The expected ids are those of the published RoBERTa."""
    tokenizer = RobertaTokenizer(data / "roberta" / "bpe")
    assert tokenizer.encode("Hello world") == [31414, 232]
    assert tokenizer.encode(".") == [4] and tokenizer.encode(" the,") == [5, 6]


def fairseq_layout(bpe, folder, order):
    """Save the merges in `bpe` in fairseq's layout: GPT-2's ids in encoder.json, fairseq's order of them in dict.txt.

    `order` selects and orders the ids for dict.txt. Returns GPT-2's ids by token.
    """
    folder.mkdir()
    tokens = [token for token in json.loads((bpe / "vocab.json").read_text()) if not token.startswith("<")] + ["<"]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text((bpe / "merges.txt").read_text())
    lines = [f"{i} 1" for i in order(range(len(tokens)))]
    (folder / "dict.txt").write_text("\n".join([*lines, "madeupword0000 0"]) + "\n")
    return {token: i for i, token in enumerate(tokens)}


def test_fairseq_layout_is_read(bpe, tmp_path):
    """RoBERTa's id is 4 plus the index of the line of GPT-2's id in dict.txt. Tokens without a line become <unk>."""
    text = "the km, Añil"
    numbers = fairseq_layout(bpe, tmp_path / "backwards", lambda numbers: reversed(numbers))
    ids, offsets = RobertaTokenizer(tmp_path / "backwards").encode_with_offsets(text)
    last = 4 + len(numbers) - 1
    assert ids[:2] == [last - numbers["t"], last - numbers["he"]] and last - numbers["Ġkm"] in ids
    original, same_offsets = RobertaTokenizer(bpe).encode_with_offsets(text)
    assert same_offsets == offsets and len(original) == len(ids)

    fairseq_layout(bpe, tmp_path / "few", lambda numbers: numbers[:5])  # only the tokens that merges make
    few, same_offsets = RobertaTokenizer(tmp_path / "few").encode_with_offsets(text)
    assert same_offsets == offsets and few[1:3] == [4 + numbers["he"], 4 + numbers["Ġkm"]]
    assert few.count(3) == len(few) - 2


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("merges.txt", "h e l", "cannot be read as RoBERTa's tokenizer: "),
        ("merges.txt", "zz q", "cannot be read as RoBERTa's tokenizer: .*zz"),
        ("vocab.json", "[1]", "vocab.json: contains \\[1\\], not an object"),
        ("vocab.json", '{"a": 3}', "it has no token '!'; expected one per byte"),
        ("vocab.json", None, "the id of '!' is '3'"),
    ],
)
def test_broken_files_are_one_line_errors(bpe, tmp_path, name, text, message):
    for file in ("merges.txt", "vocab.json"):
        (tmp_path / file).write_text((bpe / file).read_text())
    if text is None:
        text = json.dumps(json.loads((bpe / "vocab.json").read_text()) | {"!": "3"})
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        RobertaTokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_files_are_named(bpe, tmp_path):
    (tmp_path / "merges.txt").write_text((bpe / "merges.txt").read_text())
    with pytest.raises(FileNotFoundError, match="has neither vocab.json nor encoder.json"):
        RobertaTokenizer(tmp_path)


def test_offsets_cover_the_text(data):
    """Byte tokens of the same character have the same offsets."""
    tokenizer = RobertaTokenizer(data / "roberta" / "bpe")
    for text in ("Añil's 12 km 🙂\n\n  the\u00a0end", "字 e\u0301 \u2028x", ""):
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert len(ids) == len(offsets) and ids == tokenizer.encode(text)
        assert "".join(text[a:b] for a, b in dict.fromkeys(offsets)) == text
