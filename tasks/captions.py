"""COCO captions (Chen et al., 2015): images, each with captions by several people.

The captions are read from the official annotation files. Responses are scored with COCO's own code: pip install
pycocoevalcap.
"""

import io
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import click

from data import Example, check_text
from runtime.errors import printable
from runtime.files import read_json, write_json
from runtime.schema import brief
from tasks import Task
from tasks.responses import Responses, require_responses

INSTRUCTION = "Generate caption for this image"


@dataclass(frozen=True, kw_only=True)
class Picture(Example):
    """An image with the captions that people wrote for it."""

    id: int
    captions: tuple[str, ...]


def read(path: str | Path, images: str | Path | None = None, split: str | None = None) -> list[Example]:
    """Return one training example per caption. `images` and `split` are not used. Raises as `read_pictures` does."""
    return [
        Example(picture.instruction, output=caption, image=picture.image, name=picture.name)
        for picture in read_pictures(path)
        for caption in picture.captions
    ]


def read_for_scoring(path: str | Path, images: str | Path | None = None, split: str | None = None) -> list[Picture]:
    """Return one example per image, to be scored. Raises as `read_pictures` and `coco_scorers` do."""
    coco_scorers()
    return read_pictures(path)


def read_pictures(path: str | Path) -> list[Picture]:
    """Return a Picture for each image that has captions in an annotation file, such as captions_val2017.json.

    The image files are not opened. Raises OSError, or a ValueError that names the invalid image or annotation.
    """
    fields = values if isinstance(values := read_json(path), dict) else {}
    if missing := [key for key in ("images", "annotations") if not isinstance(fields.get(key), list)]:
        raise ValueError(f"{path}: has no list {' or '.join(map(repr, missing))}; expected COCO's captions_*.json")
    files: dict[int, str] = {}
    for index, record in enumerate(fields["images"]):
        if not isinstance(record, dict) or type(record.get("id")) is not int or not record.get("file_name"):
            raise ValueError(f"{path}: images[{index}]: expected an integer 'id' and a string 'file_name'")
        check_text(record["file_name"], f"{path}: images[{index}]", "file_name")
        files[record["id"]] = record["file_name"]
    captions: dict[int, list[str]] = {}
    for index, record in enumerate(fields["annotations"]):
        where = f"{path}: annotations[{index}]"
        if not isinstance(record, dict) or not record.get("caption"):
            raise ValueError(f"{where}: expected an object with a non-empty string 'caption'")
        if type(record.get("image_id")) is not int or record["image_id"] not in files:
            raise ValueError(f"{where}: image_id {brief(record.get('image_id'))} is not an id in 'images'")
        check_text(record["caption"], where, "caption")
        captions.setdefault(record["image_id"], []).append(record["caption"].strip())
    if not captions:
        raise ValueError(f"{path}: contains no captions")
    return [
        Picture(INSTRUCTION, image=file, name=f"image {id}", id=id, captions=tuple(captions[id]))
        for id, file in files.items()
        if id in captions
    ]


def read_responses(path: str | Path, pictures: Sequence[Picture]) -> list[str]:
    """Read a caption for each picture from a results file in COCO's format, [{"image_id": ..., "caption": ...}].

    Raises OSError, or ValueError if the file is invalid or a picture has no caption.
    """
    values = read_json(path)
    valid = isinstance(values, list) and all(isinstance(v, dict) and {"image_id", "caption"} <= set(v) for v in values)
    if not valid or not all(isinstance(v["caption"], str) and type(v["image_id"]) is int for v in values):
        raise ValueError(f"{path}: is not a list of objects with an integer 'image_id' and a string 'caption'")
    responses = {value["image_id"]: value["caption"] for value in values}
    require_responses(path, [picture.id for picture in pictures], responses, "image")
    return [responses[picture.id] for picture in pictures]


def coco_scorers() -> list[tuple[list[str], object]]:
    """Return the scorers of BLEU, ROUGE-L and CIDEr from COCO's code, each with the names of its scores.

    Raises ValueError if the package or Java is missing.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        raise ValueError("COCO's metrics need one more package: pip install pycocoevalcap") from None
    if shutil.which("java") is None:
        raise ValueError("COCO's metrics tokenize captions with a Java program; install a Java runtime")
    return [([f"BLEU-{n}" for n in range(1, 5)], Bleu(4)), (["ROUGE-L"], Rouge()), (["CIDEr"], Cider())]


def score(pictures: Sequence[Picture], responses: Sequence[str | None]) -> dict[str, float]:
    """Score captions with COCO's BLEU, ROUGE-L and CIDEr.

    The best possible score is 1, or 10 for CIDEr. A prompt that fills the base's context gets an empty caption.

    The command writes results.json, in COCO's format, and scores.json.
    """
    scorers = coco_scorers()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenized(captions: dict[int, Sequence[str]]) -> dict[int, list[str]]:
        """Return the captions as words separated by spaces. The Java program requires captions without line breaks."""
        lines = {id: [{"caption": one_line(text)} for text in texts] for id, texts in captions.items()}
        return PTBTokenizer().tokenize(lines)

    with redirect_stdout(io.StringIO()):  # the scorers print their progress
        references = tokenized({picture.id: picture.captions for picture in pictures})
        candidates = tokenized({picture.id: [text or ""] for picture, text in zip(pictures, responses)})
        scores: dict[str, float] = {}
        for names, scorer in scorers:
            values, _ = scorer.compute_score(references, candidates)
            scores |= zip(names, map(float, values if isinstance(values, list) else [values]))
    return scores


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def write_results(responses: Responses, scores: dict[str, float], folder: Path) -> None:
    """Print the scores, and write results.json and scores.json to `folder`. Raises OSError."""
    pictures = responses.examples
    click.echo(f"captions of {len(pictures):,} images; the best score is 1, or 10 for CIDEr\n")
    click.echo("".join(f"{name:>9}" for name in scores))
    click.echo("".join(f"{value:>9.4f}" for value in scores.values()))
    rows = [{"image_id": picture.id, "caption": one_line(text)} for picture, text in zip(pictures, responses.texts)]
    (folder / "scores.json").unlink(missing_ok=True)  # an earlier call's scores do not belong to the new results
    write_json(folder / "results.json", rows)
    write_json(folder / "scores.json", scores | {"images": len(pictures)})
    click.echo(f"wrote results.json and scores.json to {printable(str(folder))}", err=True)


TASK = Task(
    read,
    score,
    read_for_scoring=read_for_scoring,
    read_responses=read_responses,
    write_results=write_results,
    needs_images=True,
    data_help="COCO's annotation file captions_*.json.",
    unit="image",
)
