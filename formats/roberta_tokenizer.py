"""RoBERTa's tokenizer: GPT-2's byte-level BPE, with ids of its own."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from formats.tokenizers import library_errors
from runtime.files import read_json_object, read_text


class RobertaTokenizer:
    """Of vocab.json and merges.txt, as Hugging Face has them, or of what they were made of: GPT-2's encoder.json and
    vocab.bpe, and fairseq's dict.txt.

    Raises FileNotFoundError or ValueError.
    """

    bos_id, pad_id, eos_id, unknown_id = 0, 1, 2, 3

    def __init__(self, folder: str | Path):
        folder, names = Path(folder), ("merges.txt", "vocab.bpe")
        merges = next((folder / name for name in names if (folder / name).is_file()), None)
        if merges is None:
            raise FileNotFoundError(f"{folder}: has neither {names[0]} nor {names[1]}, RoBERTa's tokenizer")
        lines = [line for line in read_text(merges).splitlines() if line and not line.startswith("#version")]
        with library_errors(f"{folder}: cannot be read as RoBERTa's tokenizer"):
            ids = read_ids(folder)
            if missing := sorted(set(ByteLevel.alphabet()) - set(ids)):
                raise ValueError(f"of the 256 bytes it has no token for {missing[0]!r}")
            if wrong := [token for token, id in ids.items() if type(id) is not int or id < 0]:
                raise ValueError(f"the id of {wrong[0]!r} is {ids[wrong[0]]!r}")
            # Its own numbers are the tokens' places: several tokens may be unknown and have the same id.
            self.bpe = Tokenizer(
                BPE({token: i for i, token in enumerate(ids)}, [tuple(line.split(" ")) for line in lines])
            )
        self.bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
        self.ids = list(ids.values())

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without <s> and </s>."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Also from which character of the text to which each token goes; a part of a character has all of it."""
        encoding = self.bpe.encode(text)
        return [self.ids[i] for i in encoding.ids], encoding.offsets


def read_ids(folder: Path) -> dict[str, int]:
    """RoBERTa's id of every token."""
    if (folder / "vocab.json").is_file():
        return read_json_object(folder / "vocab.json")
    tokens = read_json_object(
        folder / "encoder.json"
    )  # with GPT-2's ids, by which dict.txt has them in RoBERTa's order
    lines = [line.split(" ")[0] for line in read_text(folder / "dict.txt").splitlines()[: len(tokens)]]
    ids = {int(number): 4 + i for i, number in enumerate(lines) if number.isdecimal()}
    return {token: ids.get(number, RobertaTokenizer.unknown_id) for token, number in tokens.items()}
