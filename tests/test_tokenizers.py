"""Both kinds of tokenizer, against other implementations, and files that are none."""

import pytest

from data import read_examples
from formats.tokenizers import SentencePieceTokenizer, TiktokenTokenizer, load_tokenizer


def test_missing_and_broken_tokenizers(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(FileNotFoundError, match="tokenizer.model: no such tokenizer file$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="fetch it"):
        load_tokenizer(tmp_path)
    for content, message in [
        (b"\x00junk", "neither a SentencePiece model nor a tiktoken file"),
        (b"", "neither"),
        (b"YQ== 0\nYg== 7\n", "its 2 tokens do not have the ranks 0 to 1"),
        (b"YQ== 0\nYQ== 1\n", "do not have the ranks"),
        (b"YQ== 0\nnot a line\n", "not a tiktoken file"),
        (b"YQ== 0\n\xff\xff 1\n", "not a tiktoken file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"tokenizer.model: .*{message}"):
            load_tokenizer(tmp_path)


def test_an_id_beyond_the_tokenizer_has_no_text(tiny_base):
    """Embeddings are often padded beyond the vocabulary, and such an id can be sampled."""
    tokenizer = load_tokenizer(tiny_base)
    ids = tokenizer.encode("cat")
    assert tokenizer.decode([*ids, 1024, 5000]) == "cat"


SAMPLES = [
    "Hello  world,   it's 12345 o'clock.\n\n\tIndented\r\n  twice ",
    "def f(x: int) -> str:\n\treturn f'{x**2:>8}'  # naïve\n\n\nprint(f(3))",
    "Příliš žluťoučký kůň — “übergroß”, ça va ? ¿Mañana? Łódź",
    "Ελληνικά, русский язык, українська; العربية والعبرية עברית",
    "हिन्दी में लिखा, ไทย, 日本語のテキスト、简体中文。 한국어 문장",
    "🦙🦙 family: 👩‍👩‍👧 flag: 🇪🇺 skin: 👍🏽 rare: 𒀀 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    " leading, trailing ",
    "<s> and </s> and <|begin_of_text|> are text here, <|eot_id|> too",
    "1 22 333 4444 55555 3.14159 1e-7 $9,999.99 50%",
    "I'LL we've THEY'RE don't 'tis",
]


def sentencepiece_by_other_means(path):
    """Hugging Face's BPE in Rust, its merges put together from the pieces and their scores."""
    tokenizers = pytest.importorskip("tokenizers")
    from sentencepiece import SentencePieceProcessor
    from tokenizers import models, normalizers

    model = SentencePieceProcessor(model_file=str(path))
    vocabulary = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []
    for piece, i in vocabulary.items():
        for cut in range(1, len(piece)):
            parts = piece[:cut], piece[cut:]
            if all(part in vocabulary for part in parts):
                merges.append((-model.get_score(i), *(vocabulary[part] for part in parts), parts))
    merges = [merge[-1] for merge in sorted(merges)]
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return bpe


def tiktoken_by_other_means(path):
    """Transformers' conversion of the same file; the pattern is that of Llama 3's model card."""
    pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return TikTokenConverter(vocab_file=str(path), pattern=words, extra_special_tokens=[]).converted()


@pytest.mark.parametrize(
    "name, kind, oracle, vocabulary",
    [
        ("llama2_tokenizer.model", SentencePieceTokenizer, sentencepiece_by_other_means, (1, 2, 32000)),
        ("llama3_tokenizer.model", TiktokenTokenizer, tiktoken_by_other_means, (128000, 128001, 128256)),
    ],
)
def test_real_tokenizers_give_the_ids_of_other_implementations(data, tmp_path, name, kind, oracle, vocabulary):
    """Languages, code, emoji, real instructions; and the kind is told by the content, for the name is the same."""
    (tmp_path / "tokenizer.model").write_bytes((data / "tokenizers" / name).read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer) is kind
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == vocabulary
    other = oracle(data / "tokenizers" / name)
    examples = read_examples(data / "instructions" / "alpaca_data.json.xz")[::40]
    for text in SAMPLES + [example.output for example in examples if example.output]:
        ids = tokenizer.encode(text)
        assert ids == other.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.eos_id]) == "hello"
    with pytest.raises(ValueError):
        tokenizer.encode("half \ud83e a llama")
