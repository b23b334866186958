"""RoBERTa's tokenizer: GPT-2's byte-level BPE with different ids."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from formats.tokenizers import library_errors
from runtime.files import read_json_object, read_text


class RobertaTokenizer:
    """RoBERTa's tokenizer, loaded from a folder with Hugging Face's files or the original ones.

    Hugging Face's files are vocab.json and merges.txt. The original ones are GPT-2's encoder.json and vocab.bpe, and
    fairseq's dict.txt. Raises FileNotFoundError or ValueError.
    """

    bos_id, pad_id, eos_id, unknown_id = 0, 1, 2, 3

    def __init__(self, folder: str | Path):
        folder, names = Path(folder), ("merges.txt", "vocab.bpe")
        merges = next((folder / name for name in names if (folder / name).is_file()), None)
        if merges is None:
            raise FileNotFoundError(f"{folder}: has neither {names[0]} nor {names[1]} for RoBERTa's tokenizer")
        lines = [line for line in read_text(merges).splitlines() if line and not line.startswith("#version")]
        with library_errors(f"{folder}: cannot be read as RoBERTa's tokenizer"):
            ids = read_ids(folder)
            if missing := sorted(set(ByteLevel.alphabet()) - set(ids)):
                raise ValueError(f"it has no token {missing[0]!r}; expected one per byte")
            if wrong := [token for token, id in ids.items() if type(id) is not int or id < 0]:
                raise ValueError(f"the id of {wrong[0]!r} is {ids[wrong[0]]!r}; expected a non-negative integer")
            # The BPE model uses positions as ids, because several tokens may share the id of unknown tokens.
            self.bpe = Tokenizer(
                BPE({token: i for i, token in enumerate(ids)}, [tuple(line.split(" ")) for line in lines])
            )
        self.bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
        self.ids = list(ids.values())

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, without <s> and </s>."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of the text, and the offsets of each token: (its first character, its last character + 1).

        A token that covers only some of the bytes of a character has the offsets of that character.
        """
        encoding = self.bpe.encode(text)
        return [self.ids[i] for i in encoding.ids], encoding.offsets


def read_ids(folder: Path) -> dict[str, int]:
    """Return RoBERTa's ids, keyed by token. Raises FileNotFoundError or ValueError."""
    if (folder / "vocab.json").is_file():
        return read_json_object(folder / "vocab.json")
    if not (folder / "encoder.json").is_file():
        raise FileNotFoundError(f"{folder}: has neither vocab.json nor encoder.json for RoBERTa's tokenizer")
    # encoder.json has GPT-2's ids, and dict.txt lists them in RoBERTa's order.
    tokens = read_json_object(folder / "encoder.json")
    lines = [line.split(" ")[0] for line in read_text(folder / "dict.txt").splitlines()[: len(tokens)]]
    ids = {int(gpt2_id): 4 + i for i, gpt2_id in enumerate(lines) if gpt2_id.isdecimal()}
    return {token: ids.get(gpt2_id, RobertaTokenizer.unknown_id) for token, gpt2_id in tokens.items()}
