"""COCO captions: reading the files, and scores compared with their definitions."""

import json
import math
import sys
from collections import Counter

import pytest
from helpers import save_coco

from tasks import captions
from tasks.captions import read, read_responses, read_pictures, score


@pytest.fixture
def scorers():
    try:
        return captions.coco_scorers()
    except ValueError as error:
        pytest.skip(str(error))


def test_images_are_read_with_their_captions(tmp_path):
    five, nine = read_pictures(save_coco(tmp_path))
    assert five.image == "5.jpg" and five.captions == ("A man rides a horse.",)
    assert nine.captions == ("Two dogs run over the green grass.", "Dogs are running in a field.")
    assert (nine.instruction, nine.id, nine.name) == ("Generate caption for this image", 9, "image 9")
    examples = read(tmp_path / "captions.json")
    assert [(e.instruction, e.output, e.image, e.name) for e in examples] == [
        ("Generate caption for this image", "A man rides a horse.", "5.jpg", "image 5"),
        ("Generate caption for this image", "Two dogs run over the green grass.", "9.jpg", "image 9"),
        ("Generate caption for this image", "Dogs are running in a field.", "9.jpg", "image 9"),
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"annotations": [{"image_id": 4, "caption": "x"}]}, r"annotations\[0\]: image_id 4 is not an id in 'images'"),
        ({"annotations": [{"image_id": [5], "caption": "x"}]}, r"annotations\[0\]: image_id \[5\] is not an id"),
        ({"annotations": [{"image_id": 5}]}, r"annotations\[0\]: expected an object with a non-empty string 'caption'"),
        (
            {"annotations": [{"image_id": 5, "caption": ""}]},
            r"annotations\[0\]: expected an object with a non-empty string 'caption'",
        ),
        (
            {"annotations": [{"image_id": 5, "caption": 7}]},
            r"annotations\[0\]: field 'caption' is 7, not a string",
        ),
        (
            {"annotations": [{"image_id": 5, "caption": "\ud800"}]},
            r"annotations\[0\]: field 'caption' has an unpaired surr",
        ),
        ({"annotations": []}, "contains no captions"),
        ({"images": [{"id": "5"}]}, r"images\[0\]: expected an integer 'id'"),
        ({"images": [{"id": 5, "file_name": "\ud800"}]}, r"images\[0\]: field 'file_name' has an unpaired surrogate"),
        ({"images": None}, "has no list 'images'"),
    ],
)
def test_bad_annotations_are_named(tmp_path, change, message):
    path = save_coco(tmp_path, **change)
    for reading in (read, read_pictures):
        with pytest.raises(ValueError, match=f"captions.json: .*{message}"):
            reading(path)


def ngrams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def test_scores_match_their_definitions(tmp_path, scorers):
    """Recompute BLEU-1 and BLEU-2 of the corpus (Papineni et al., 2002). Captions equal to a reference score best.

    Line breaks in a caption count as spaces.
    """
    pictures = read_pictures(save_coco(tmp_path))
    scores = score(pictures, ["A man rides a brown horse, quickly!", "Two dogs run in a field."])

    tokenized = ["a man rides a brown horse quickly", "two dogs run in a field"]  # lower case, no punctuation
    references = [["a man rides a horse"], ["two dogs run over the green grass", "dogs are running in a field"]]
    logs, length = [], sum(len(text.split()) for text in tokenized)
    closest = 5 + 6  # lengths in words of the closest references
    for n in (1, 2):
        found = total = 0
        for text, text_references in zip(tokenized, references):
            for ngram, count in ngrams(text, n).items():
                found += min(count, max(ngrams(reference, n)[ngram] for reference in text_references))
                total += count
        logs.append(math.log(found / total))
        brevity = min(0, 1 - closest / length)
        assert scores[f"BLEU-{n}"] == pytest.approx(math.exp(brevity + sum(logs) / n), abs=1e-6)
    assert set(scores) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    perfect = score(pictures, [picture.captions[0] for picture in pictures])
    assert perfect["BLEU-4"] == pytest.approx(1, abs=1e-6) and perfect["ROUGE-L"] == pytest.approx(1)
    assert perfect["CIDEr"] > scores["CIDEr"]
    with_line_breaks = ["A man\rrides a\u2028horse.", "Two dogs run\x0bover the green\ngrass."]
    assert score(pictures, with_line_breaks) == perfect


def test_missing_caption_scores_as_an_empty_one(tmp_path, scorers):
    pictures = read_pictures(save_coco(tmp_path))
    scores = score(pictures, [None, "Two dogs run in a field."])
    assert scores == score(pictures, ["", "Two dogs run in a field."]) and 0 < scores["CIDEr"] < 10


def test_missing_requirements_are_reported(tmp_path, monkeypatch):
    path = save_coco(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ValueError, match="pip install pycocoevalcap"):
        captions.read_for_scoring(path)  # before any caption is generated
    monkeypatch.undo()
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="install a Java runtime"):
        captions.coco_scorers()


def test_captions_are_read_from_a_results_file(tmp_path):
    pictures, path = read_pictures(save_coco(tmp_path)), tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 9, "caption": "b"}, {"image_id": 5, "caption": "a"}]))
    assert read_responses(path, pictures) == ["a", "b"]
    path.write_text(json.dumps([{"image_id": 5, "caption": "a"}]))
    with pytest.raises(ValueError, match="has no response to 1 of 2 images, for example 9"):
        read_responses(path, pictures)
    for bad in ({"5": "a"}, [{"image_id": [5], "caption": "a"}]):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="is not a list of objects with an integer 'image_id'"):
            read_responses(path, pictures)
