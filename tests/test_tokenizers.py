"""Tokenizers compared with other implementations, and files that are not tokenizers."""

import json
import os
import pytest
from helpers import SAMPLES, save_chatml, save_llama2_json, convert_sentencepiece

from data import read_examples
from formats.tokenizers import JsonTokenizer, SentencePieceTokenizer, TiktokenTokenizer, load_tokenizer


def test_missing_and_broken_tokenizers_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(FileNotFoundError, match="tokenizer.model: no such tokenizer file, and no tokenizer.json"):
        load_tokenizer(tmp_path)
    for content in ("{}", "", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="tokenizer.json: .*(not JSON|cannot be read as a tokenizer)"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for content, message in [
        (b"\x00junk", "neither a SentencePiece model nor a tiktoken file"),
        (b"", "neither"),
        (b"YQ== 0\nYg== 7\n", "expected ranks 0 to 1 for its 2 tokens"),
        (b"YQ== 0\nYQ== 1\n", "expected ranks 0 to 1"),
        (b"YQ== 0\nnot a line\n", "not a tiktoken file"),
        (b"YQ== 0\n\xff\xff 1\n", "not a tiktoken file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"tokenizer.model: .*{message}"):
            load_tokenizer(tmp_path)


def test_ids_beyond_the_vocabulary_have_no_text(tiny_base):
    """Embeddings are often padded beyond the vocabulary, so such an id can be sampled."""
    tokenizer = load_tokenizer(tiny_base)
    ids = tokenizer.encode("cat")
    assert tokenizer.decode([*ids, 1024, 5000]) == "cat"


def convert_tiktoken(path):
    """Convert a tiktoken file to a BPE of `tokenizers`, by transformers' converter and with Llama 3's pattern."""
    pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return TikTokenConverter(vocab_file=str(path), pattern=pattern, extra_special_tokens=[]).converted()


@pytest.mark.parametrize(
    "name, kind, oracle, vocabulary",
    [
        ("llama2_tokenizer.model", SentencePieceTokenizer, convert_sentencepiece, (1, 2, 32000)),
        ("llama3_tokenizer.model", TiktokenTokenizer, convert_tiktoken, (128000, 128001, 128256)),
    ],
)
def test_real_tokenizers_equal_other_implementations(data, tmp_path, name, kind, oracle, vocabulary):
    """Both files are named tokenizer.model. The kind of tokenizer is recognized by the content."""
    (tmp_path / "tokenizer.model").write_bytes((data / "tokenizers" / name).read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer) is kind
    assert (tokenizer.start_ids[0], tokenizer.eos_id, tokenizer.vocab_size) == vocabulary
    other = oracle(data / "tokenizers" / name)
    examples = read_examples(data / "instructions" / "alpaca_data.json.xz")[::40]
    for text in SAMPLES + [example.output for example in examples if example.output]:
        ids = tokenizer.encode(text)
        assert ids == other.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.start_ids[0], *tokenizer.encode("hello"), tokenizer.eos_id]) == "hello"
    with pytest.raises(ValueError):
        tokenizer.encode("half \ud83e a llama")


# ---------------------------------------------------------------------------------------------------
# tokenizer.json


def test_tokenizer_json_equals_tokenizer_model_and_transformers(data, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_llama2_json(data, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer) is JsonTokenizer
    assert (tokenizer.start_ids, tokenizer.end_ids, tokenizer.eos_id, tokenizer.vocab_size) == ([1], [2], 2, 32000)
    model = SentencePieceTokenizer(data / "tokenizers" / "llama2_tokenizer.model")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    examples = read_examples(data / "instructions" / "alpaca_data.json.xz")[::26]
    texts = SAMPLES + [example.output for example in examples if example.output]
    assert len(texts) > 1900
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == model.encode(text), text
        if "<s>" not in text:  # transformers encodes <s> in a text as <bos>
            assert ids == theirs(text, add_special_tokens=False).input_ids, text
        assert tokenizer.decode([1, *ids, 2]) == text


def test_different_tokenizer_files_cause_a_warning(data, tmp_path, capsys):
    save_llama2_json(data, tmp_path)
    for name, hint in (
        ("llama2", ""),
        ("llama3", "encode 'Below is an instruction.' differently; using tokenizer.json"),
    ):
        (tmp_path / "tokenizer.model").write_bytes((data / "tokenizers" / f"{name}_tokenizer.model").read_bytes())
        assert type(load_tokenizer(tmp_path)) is JsonTokenizer
        error = capsys.readouterr().err
        assert hint in error if hint else error == ""


def test_byte_level_tokenizer_json_is_lossless(tmp_path):
    save_chatml(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.start_ids, tokenizer.eos_id, tokenizer.end_ids) == ([], 2, [2, 0])
    for text in SAMPLES + ["<|im_end|>", "a<|im_start|>user", ""]:
        ids = tokenizer.encode(text)
        assert not {0, 1, 2} & set(ids) and tokenizer.decode(ids) == text, text
    assert tokenizer.decode([1, *tokenizer.encode("hello"), 2]) == "hello"
    with pytest.raises(ValueError):
        tokenizer.encode("half \ud83e a llama")


def test_end_tokens_come_from_several_files(tmp_path):
    save_chatml(tmp_path, eos_token_id=0)
    assert load_tokenizer(tmp_path).end_ids == [2, 0]
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).end_ids == [0]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [-1, 10000, "x", null]}')
    with pytest.raises(ValueError, match="none of tokenizer_config.json, .* names a token that ends text"):
        load_tokenizer(tmp_path)


def save_tokenizer(folder, model, **changes):
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    values = {"version": "1.0", "added_tokens": [], "model": model} | parts | changes
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


WORD_LEVEL = {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "[UNK]"}
WORD_PIECE = WORD_LEVEL | {
    "type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
}  # fmt: skip
UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["</s>", 0.0], ["a", -1.0]]}


@pytest.mark.parametrize("model", [WORD_LEVEL, WORD_PIECE, UNIGRAM])
def test_text_that_cannot_be_encoded_is_refused(tmp_path, model):
    save_tokenizer(tmp_path, model)
    with pytest.raises(ValueError, match="tokenizer.json: cannot encode the text: "):
        load_tokenizer(tmp_path).encode("hello")


def test_normalizers_that_multiply_a_text_are_refused(tmp_path):
    twice = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    model = WORD_LEVEL | {"unk_token": "a"}
    save_tokenizer(tmp_path, model, normalizer={"type": "Sequence", "normalizers": [twice] * 40})
    with pytest.raises(ValueError, match=r"json: its normalizers can make text 1.1e\+12 times as long"):
        load_tokenizer(tmp_path)
    save_tokenizer(tmp_path, model, normalizer=twice)
    assert load_tokenizer(tmp_path).encode("b") == [1]


def test_start_token_beyond_the_vocabulary_is_refused(tmp_path):
    single = [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"x": {"id": "x", "ids": [999], "tokens": ["x"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    save_tokenizer(tmp_path, WORD_LEVEL, post_processor=template)
    with pytest.raises(ValueError, match="tokenizer.json: its start token 999 is not among its 2 tokens"):
        load_tokenizer(tmp_path)


def test_long_texts_are_split_as_by_metas_tokenizer(data):
    """Runs of whitespace or of other characters are split after every 25,000 characters. Shorter runs are not split."""
    tokenizer = TiktokenTokenizer(data / "tokenizers" / "llama3_tokenizer.model")
    encode = tokenizer.model.encode_ordinary
    assert tokenizer.encode(" " * 60_000) == 2 * encode(" " * 25_000) + encode(" " * 10_000)
    text = "a b\n" + "x" * 25_001 + " c"
    assert tokenizer.encode(text) == encode(text[:25_004]) + encode("x c")
    assert tokenizer.encode(text[2:25_003]) == encode(text[2:25_003])
    assert len(tokenizer.encode(" " * 1_000_000)) == 40 * len(encode(" " * 25_000))


def test_text_that_is_not_utf_8_is_refused(tiny_base):
    with pytest.raises(ValueError, match="the text has an unpaired surrogate, or bytes that are not UTF-8"):
        load_tokenizer(tiny_base).encode("a\udcff")


def test_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="is a device or a pipe, not a file"):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")
