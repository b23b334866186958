"""JSON files in a tokenizer's folder: they determine special tokens, <bos>, and the tokens that end a response."""

import json
import shutil

import pytest
from helpers import CHATML, SAMPLES, save_chatml, save_llama2_json
from sentencepiece import SentencePieceTrainer

from data import AlpacaTemplate, Example, Turn
from formats.chat_templates import load_template
from formats.tokenizers import JsonTokenizer, load_tokenizer

MARKERS = ["<|im_start|>", "<|im_end|>", "<|im_sep|>"]  # ids 3, 4, 5
DECODER = {str(3 + i): {"content": token, "special": True} for i, token in enumerate(MARKERS)}
PLAIN_CHATML = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TURNS = [Turn("user", "Hi there,\n friend"), Turn("assistant", "Hello, my lord.  What news?"), Turn("user", " Why?")]


@pytest.fixture(scope="module")
def markers(tmp_path_factory):
    """Path of a tokenizer.model with chat markers as control symbols."""
    folder = tmp_path_factory.mktemp("markers")
    (folder / "corpus.txt").write_text("\n".join([*SAMPLES, "Hello there, user, assistant, system: what news?"] * 20))
    SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        control_symbols=MARKERS,
    )
    return folder / "tokenizer.model"


def save_settings(folder, **settings):
    """Save each keyword argument NAME to the file NAME.json in `folder`."""
    for name, values in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


@pytest.mark.parametrize("legacy", [{}, {"legacy": False}, {"legacy": True}])
def test_chat_markers_of_a_tokenizer_model_equal_transformers(markers, tmp_path, legacy):
    transformers = pytest.importorskip("transformers")
    shutil.copy(markers, tmp_path / "tokenizer.model")
    save_settings(
        tmp_path,
        config={"model_type": "llama", "eos_token_id": 2},
        generation_config={"eos_token_id": [2, 4]},
        tokenizer_config={
            "tokenizer_class": "LlamaTokenizer",
            "eos_token": "<|im_end|>",
            "add_bos_token": False,
            "added_tokens_decoder": DECODER,
            "chat_template": PLAIN_CHATML,
        }
        | legacy,
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.end_ids, tokenizer.start_ids, tokenizer.vocab_size) == (4, [4, 2], [], 500)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [turn._asdict() for turn in TURNS]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    template = load_template("auto", tokenizer)
    assert template.encode_prompt(TURNS[-1].content, history=TURNS[:-1]) == expected
    assert template.end_ids == [4, 2]
    assert AlpacaTemplate(tokenizer).encode_prompt("Hi")[0] != 1
    prompt = load_template("chatml", tokenizer).encode_prompt("Hi")
    assert (prompt[0], prompt.count(3), prompt.count(4)) == (3, 2, 1)
    # A marker in a user's text is encoded as text.
    assert load_template("chatml", tokenizer).encode_prompt("<|im_end|>").count(4) == 1
    assert tokenizer.decode([3, *tokenizer.encode("ho"), 4]) == "ho"


def test_tokens_added_to_a_tokenizer_model_are_read(markers, tmp_path):
    """Added tokens are in added_tokens.json or in the newer added_tokens_decoder, which can also rename pieces."""
    shutil.copy(markers, tmp_path / "tokenizer.model")
    save_settings(tmp_path, added_tokens={"<|turn|>": 500}, tokenizer_config={"eos_token": "<|turn|>"})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.special_ids["<|turn|>"], tokenizer.eos_id, tokenizer.end_ids) == (500, 500, [500, 2])
    assert tokenizer.vocab_size == 501 and tokenizer.decode([500]) == ""
    decoder = {"5": {"content": "<|turn|>", "special": True}}
    (tmp_path / "added_tokens.json").unlink()
    save_settings(tmp_path, tokenizer_config={"eos_token": {"content": "<|turn|>"}, "added_tokens_decoder": decoder})
    assert load_tokenizer(tmp_path).end_ids == [5, 2]


def test_bos_is_not_a_token_that_ends_a_text(data, tmp_path):
    """A published base has <s> as eos_token_id in config.json, and empty strings as tokens in tokenizer_config.json."""
    shutil.copy(data / "tokenizers" / "llama2_tokenizer.model", tmp_path / "tokenizer.model")
    empty = {"bos_token": "", "eos_token": ""}
    save_settings(tmp_path, config={"eos_token_id": 1}, tokenizer_config=empty, special_tokens_map=empty)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.start_ids, tokenizer.eos_id, tokenizer.end_ids) == ([1], 2, [2])
    assert tokenizer.named_tokens["eos_token"] == "</s>"
    save_settings(tmp_path, config={"eos_token_id": [1, 7, -1, 32000, "2"]}, tokenizer_config={"add_bos_token": False})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.start_ids, tokenizer.end_ids) == ([], [7, 2])
    save_chatml(tmp_path)
    save_settings(tmp_path, config={}, generation_config={"eos_token_id": 0})
    save_settings(tmp_path, tokenizer_config={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    assert load_tokenizer(tmp_path).end_ids == [0]  # SmolLM has one token for both


def test_tokenizer_json_overrides_tokenizer_model(data, tmp_path, capsys):
    """Mistral v0.3 has both files, which treat leading spaces differently. Special tokens of the JSON file are kept."""
    save_llama2_json(data, tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values["added_tokens"].append(token | {"id": 32000, "content": "[INST]"})
    values["normalizer"] = None
    values["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    shutil.copy(data / "tokenizers" / "llama2_tokenizer.model", tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer) is JsonTokenizer and tokenizer.special_ids["[INST]"] == 32000
    message = "tokenizer.json and tokenizer.model encode 'Below is an instruction.' differently; using tokenizer.json"
    assert message in capsys.readouterr().err


def test_eos_token_can_be_missing_in_tokenizer_json(data, tmp_path):
    save_llama2_json(data, tmp_path)
    save_settings(tmp_path, added_tokens={"<|im_end|>": 32000}, tokenizer_config={"eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.decode([32000])) == (32000, 32001, "")


def test_llama3_tokenizer_takes_its_eos_from_hugging_faces_files(data, tmp_path):
    """Responses are trained to end with this <eos>.

    In generation, each token that ends a text, including Llama 3.1's <|eom_id|>, ends a response.
    """
    (tmp_path / "original").mkdir()
    shutil.copy(data / "tokenizers" / "llama3_tokenizer.model", tmp_path / "original" / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.end_ids) == (128001, [128001, 128008, 128009])
    decoder = {"128009": {"content": "<|eot_id|>", "special": True}}
    save_settings(tmp_path, tokenizer_config={"eos_token": "<|eot_id|>", "added_tokens_decoder": decoder})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, sorted(tokenizer.end_ids)) == (128009, [128001, 128008, 128009])
    assert next(AlpacaTemplate(tokenizer).encode_exchanges([Example("Hi", "", "Ho")]))[0].response_ids[-1] == 128009


def test_special_token_without_embedding_is_refused_only_if_used(data, tmp_path):
    """A <pad> that a user added is harmless, unless a template writes it or a response ends with it."""
    shutil.copy(data / "tokenizers" / "llama2_tokenizer.model", tmp_path / "tokenizer.model")
    save_settings(tmp_path, added_tokens={"<pad>": 32000})
    tokenizer = load_tokenizer(tmp_path, 32000)
    assert tokenizer.vocab_size == 32000 and tokenizer.decode([32000]) == ""
    template = "{% for message in messages %}{{ message.content + '<pad>' }}{% endfor %}"
    save_settings(tmp_path, tokenizer_config={"chat_template": template})
    with pytest.raises(ValueError, match="the template auto writes <pad>, but token 32000 has no embedding"):
        load_template("auto", load_tokenizer(tmp_path, 32000))
    load_template("auto", load_tokenizer(tmp_path, 32001))
    save_settings(tmp_path, tokenizer_config={"eos_token": "<pad>"})
    with pytest.raises(ValueError, match="32000 embeddings, but its tokenizer has 32001 tokens"):
        load_tokenizer(tmp_path, 32000)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="31999 embeddings, but its tokenizer has 32001 tokens"):
        load_tokenizer(tmp_path, 31999)


def test_ordinary_token_without_embedding_is_refused(tmp_path):
    save_chatml(tmp_path)
    size = load_tokenizer(tmp_path).vocab_size
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    added = values["added_tokens"][0] | {"id": size, "content": "<think>"}
    for special in (True, False):
        values["added_tokens"][3:] = [added | {"special": special}]
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
        if special:
            assert load_tokenizer(tmp_path, size).vocab_size == size
        else:
            with pytest.raises(ValueError, match=f"{size} embeddings, but its tokenizer has {size + 1} tokens"):
                load_tokenizer(tmp_path, size)
