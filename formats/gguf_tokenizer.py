"""Build the tokenizer of a GGUF file with the library `tokenizers`.

There are two kinds: "llama" has SentencePiece's pieces and scores, and "gpt2" is a byte-level BPE. For "gpt2",
`tokenizer.ggml.pre` names the pre-tokenizer, which splits the text before bytes are merged.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from formats.gguf import find_file, read_header
from formats.tensors import prefix_errors
from formats.tokenizers import JsonTokenizer, TiktokenTokenizer, library_errors

CONTROL, USER_DEFINED = 3, 4  # two of the values in tokenizer.ggml.token_type

QWEN2 = TiktokenTokenizer.PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")  # as in Llama 3, but each digit is separate
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that splits by a regular expression, then maps bytes to GPT-2's alphabet."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), alphabet])


# The supported pre-tokenizers, by their names in `tokenizer.ggml.pre`.
SPLITS = {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "llama-bpe": split_by(TiktokenTokenizer.PATTERN),
    "qwen2": split_by(QWEN2),
}


def find_gguf_tokenizer(base: Path) -> JsonTokenizer | None:
    """Load the tokenizer of the GGUF file `base`, or of the only GGUF model in the folder `base`.

    Returns None if there is no GGUF file, or if the folder contains a tokenizer or a configuration in another format.
    Raises OSError or ValueError.
    """
    if base.is_dir() and any((base / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "config.json")):
        return None
    file = find_file(base)
    return None if file is None else load_gguf_tokenizer(file)


def load_gguf_tokenizer(file: Path) -> JsonTokenizer:
    """Load the tokenizer of a GGUF file, with its chat template. Raises OSError or ValueError."""
    values = read_header(file).values
    with prefix_errors(file):
        model, pre = values["tokenizer.ggml.model"], values.get("tokenizer.ggml.pre")
        tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
        if model == "gpt2" and pre not in SPLITS:
            raise ValueError(f"tokenizer.ggml.pre is {pre!r}; only {', '.join(map(repr, SPLITS))} are supported")
        if model not in ("llama", "gpt2"):
            raise ValueError(f"tokenizer.ggml.model is {model!r}; only 'llama' and 'gpt2' are supported")
        rules = values["tokenizer.ggml.scores" if model == "llama" else "tokenizer.ggml.merges"]
        if len(types) != len(tokens) or (model == "llama" and len(rules) != len(tokens)):
            found = f"{len(tokens)} tokens, {len(types)} token types" + f", {len(rules)} scores" * (model == "llama")
            raise ValueError(f"has {found}; expected equal numbers")
        with library_errors("cannot be read as a tokenizer"):
            if model == "llama":
                tokenizer = sentencepiece_model(values, tokens, rules)
            else:
                tokenizer = byte_level_model(tokens, rules, pre)
            control, added = (
                [AddedToken(token, normalized=False) for token, found in zip(tokens, types) if found == token_type]
                for token_type in (CONTROL, USER_DEFINED)
            )
            tokenizer.add_special_tokens(control)
            tokenizer.add_tokens(added)
    loaded = JsonTokenizer(tokenizer, file)

    def ids(*names: str) -> list[int]:
        found = (values.get(f"tokenizer.ggml.{name}_token_id") for name in names)
        return [id for id in found if type(id) is int and 0 <= id < len(tokens)]

    named = {name: ids(short) for name, short in (("bos_token", "bos"), ("eos_token", "eos"))}
    loaded.named_tokens = {name: tokens[found[0]] for name, found in named.items() if found}
    if values.get("tokenizer.ggml.add_bos_token", model == "llama" or pre == "llama-bpe"):
        loaded.start_ids = named["bos_token"]
    loaded.end_ids = list(dict.fromkeys(ids("eos", "eot", "eom")))
    if not loaded.end_ids:
        found = values.get("tokenizer.ggml.eos_token_id")
        expected = f"an id from 0 to {len(tokens) - 1}, the token that ends text"
        raise ValueError(f"{file}: tokenizer.ggml.eos_token_id is {found!r}; expected {expected}")
    loaded.eos_id = loaded.end_ids[0]
    loaded.special_ids |= {tokens[id]: id for id in (*loaded.start_ids, *loaded.end_ids)}
    template = values.get("tokenizer.chat_template")
    loaded.chat_template = template if isinstance(template, str) else None
    return loaded


def byte_level_model(tokens: list[str], rules: list[str], pre: str) -> Tokenizer:
    """Build a byte-level BPE like GPT-2's. Each of the `rules` is two tokens to merge, separated by a space.

    `pre` is a key of SPLITS.
    """
    merges = [tuple(rule.split(" ", 1)) for rule in rules]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = SPLITS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_model(values: dict, tokens: list[str], scores: list[float]) -> Tokenizer:
    """Build a BPE like that of LLaMA 1 and 2, which always merges the pair whose result has the highest score."""
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = []
    for token, id in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[id], vocabulary[left], vocabulary[right], (left, right)))
    ordered = [pair for *_, pair in sorted(merges)]
    unknown = tokens[values.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocabulary, ordered, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(" ", "▁")]
    if values.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    strip = [decoders.Strip(" ", 1, 0)] if len(spaces) > 1 else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
