"""COCO captions (Chen et al., 2015): images, each with what several people wrote about it.

They are read from the official annotation files, and scored by COCO's own code: pip install pycocoevalcap.
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
from tasks import Task
from tasks.responses import Responses, require_responses

INSTRUCTION = "Generate caption for this image"


@dataclass(frozen=True, kw_only=True)
class Picture(Example):
    """An image, and what people wrote about it."""

    id: int
    captions: tuple[str, ...]


def read(path: str | Path, images: str | Path | None = None, split: str | None = None) -> list[Example]:
    """To train on: an example for every caption. Raises as `read_pictures`."""
    return [
        Example(picture.instruction, output=caption, image=picture.image, name=picture.name)
        for picture in read_pictures(path)
        for caption in picture.captions
    ]


def read_for_scoring(path: str | Path, images: str | Path | None = None, split: str | None = None) -> list[Picture]:
    """To ask about: an example for every image. Raises as `read_pictures`, and where nothing could be scored."""
    coco_scorers()
    return read_pictures(path)


def read_pictures(path: str | Path) -> list[Picture]:
    """Of an annotation file such as captions_val2017.json: the images that have captions.

    Raises OSError, or ValueError that names the annotation.
    """
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(values.get(key), list) for key in ("images", "annotations")):
        raise ValueError(f"{path}: has no lists 'images' and 'annotations', as COCO's captions_*.json")
    files: dict[int, str] = {}
    for index, record in enumerate(values["images"]):
        if not isinstance(record, dict) or type(record.get("id")) is not int or not record.get("file_name"):
            raise ValueError(f"{path}: images[{index}]: has no number 'id' or no name 'file_name'")
        check_text(record["file_name"], f"{path}: images[{index}]", "file_name")
        files[record["id"]] = record["file_name"]
    captions: dict[int, list[str]] = {}
    for index, record in enumerate(values["annotations"]):
        where = f"{path}: annotations[{index}]"
        if not isinstance(record, dict) or not record.get("caption"):
            raise ValueError(f"{where}: has no text 'caption'")
        if type(record.get("image_id")) is not int or record["image_id"] not in files:
            raise ValueError(f"{where}: image_id {record.get('image_id')} is none of its images")
        check_text(record["caption"], where, "caption")
        captions.setdefault(record["image_id"], []).append(record["caption"].strip())
    if not captions:
        raise ValueError(f"{path}: holds no captions")
    return [
        Picture(INSTRUCTION, image=file, name=f"image {id}", id=id, captions=tuple(captions[id]))
        for id, file in files.items()
        if id in captions
    ]


def read_responses(path: str | Path, pictures: Sequence[Picture]) -> list[str]:
    """A caption for each of the pictures, of a results file in COCO's format, [{"image_id": ..., "caption": ...}].

    Raises OSError, or ValueError where one has none.
    """
    values = read_json(path)
    right = isinstance(values, list) and all(isinstance(v, dict) and {"image_id", "caption"} <= set(v) for v in values)
    if not right or not all(isinstance(v["caption"], str) and type(v["image_id"]) is int for v in values):
        raise ValueError(f"{path}: is not a list of objects with a number 'image_id' and a text 'caption'")
    responses = {value["image_id"]: value["caption"] for value in values}
    require_responses(path, [picture.id for picture in pictures], responses, "image")
    return [responses[picture.id] for picture in pictures]


def coco_scorers() -> list[tuple[list[str], object]]:
    """BLEU, ROUGE-L and CIDEr as COCO defines them, by name. Raises ValueError where they cannot run."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        raise ValueError("COCO's metrics are in a package of their own: pip install pycocoevalcap") from None
    if shutil.which("java") is None:
        raise ValueError("COCO's metrics cut captions into words by a Java program: install a Java runtime")
    return [([f"BLEU-{n}" for n in range(1, 5)], Bleu(4)), (["ROUGE-L"], Rouge()), (["CIDEr"], Cider())]


def score(pictures: Sequence[Picture], responses: Sequence[str | None]) -> dict[str, float]:
    """Score captions by BLEU, ROUGE-L and CIDEr.

    As COCO defines them; each is 1 at best but CIDEr, which is 10.

    Writes results.json, in COCO's format, and scores.json.
    """
    scorers = coco_scorers()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def words(captions: dict[int, Sequence[str]]) -> dict[int, list[str]]:
        """Of every caption, parted by spaces; the program takes one line for one caption, whatever ends a line."""
        lines = {id: [{"caption": one_line(text)} for text in texts] for id, texts in captions.items()}
        return PTBTokenizer().tokenize(lines)

    with redirect_stdout(io.StringIO()):  # they talk
        references = words({picture.id: picture.captions for picture in pictures})
        candidates = words({picture.id: [text or ""] for picture, text in zip(pictures, responses)})
        scores: dict[str, float] = {}
        for names, scorer in scorers:
            found, _ = scorer.compute_score(references, candidates)
            scores |= zip(names, map(float, found if isinstance(found, list) else [found]))
    return scores


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def write_results(responses: Responses, scores: dict[str, float], folder: Path) -> None:
    """Print the table; write results.json and scores.json. Raises OSError."""
    pictures = responses.examples
    click.echo(f"captions of {len(pictures):,} images; 1 is the best, of CIDEr 10\n")
    click.echo("".join(f"{name:>9}" for name in scores))
    click.echo("".join(f"{value:>9.4f}" for value in scores.values()))
    rows = [{"image_id": picture.id, "caption": one_line(text)} for picture, text in zip(pictures, responses.texts)]
    (folder / "scores.json").unlink(missing_ok=True)  # of an earlier call: the two files belong together
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
    data_help="COCO's captions_*.json.",
    unit="image",
)
