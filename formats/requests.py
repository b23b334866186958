"""Read requests from a JSON or JSONL file, each with an optional adapter and image; write the responses as JSONL."""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from data import Request, Turn, check_record, read_records
from formats.conversations import read_turns, remove_placeholder
from formats.image_encoders import load_image_encoder
from multimodal import ImageAdapter
from runtime.distributed import rank
from runtime.files import atomic_write, path_inside, require_file


def read_requests(
    path: str, names: Collection[str], default: str, folder: str | None
) -> tuple[list[dict], list[Request], dict[int, Path]]:
    """Read a file of requests. Return its records, one Request per record, and the image paths keyed by record index.

    Images are in `folder`, by default the folder of the file. `names` are the names of the loaded adapters and "base".
    A record without the field `adapter` uses `default`, and one whose `adapter` is null uses "base". Raises OSError, or
    a ValueError that names the record, or the line if it is not JSON.
    """
    records, requests, images = read_records(path), [], {}
    for index, record in enumerate(records):
        where = f"{path}: record {index}"
        turns = read_turns(record, path, f"record {index}", with_output=False)
        if turns is not None and (not turns or turns[-1].role != "user"):
            raise ValueError(f"{where}: does not end with a user turn, so there is nothing to respond to")
        example = check_record(record, path, f"record {index}", needed=[] if turns else ["instruction"])
        name = record.get("adapter", default)
        name = "base" if name is None else name
        if not isinstance(name, str) or name not in names:
            raise ValueError(f"{where}: adapter {name!r} is not one of {list(names)}")
        *history, (_, instruction, _) = turns or [Turn("user", example.instruction)]
        input = "" if turns else example.input
        if example.image:
            instruction, input, *contents = remove_placeholder(
                [instruction, input, *(t.content for t in history)], where
            )
            history = [turn._replace(content=content) for turn, content in zip(history, contents)]
        requests.append(Request(instruction, input, name, history=history))
        try:
            if example.image and name == "base":
                raise ValueError("the base alone cannot take an image; use an adapter that was trained on images")
            if example.image:
                images[index] = require_file(path_inside(folder or Path(path).parent, example.image))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{where}: {error}") from None
    return records, requests, images


def attach_images(
    requests: Sequence[Request], images: dict[int, Path], responder, vision_encoder: str | None, encoder: str | None
) -> list[Request]:
    """Return the requests with the features of their images.

    `images` maps the indices of requests to image paths. `responder` is a generate.Responder. `vision_encoder` and
    `encoder` are the options --clip and --encoder; the default is the vision encoder that the request's adapter names;
    a function that it names is not run. Raises OSError, or ValueError if an image cannot be encoded, if there is no
    encoder, or if an adapter has no projection or does not fit the encoder.
    """
    requests = list(requests)
    model = responder.model
    for name in dict.fromkeys(requests[i].adapter for i in images):
        adapter = responder.loaded[name].adapter
        if not isinstance(adapter, ImageAdapter):
            raise ValueError(f"the adapter {name} has no projection for images; use one that was trained on images")
        image_encoder = load_image_encoder(vision_encoder, encoder, model.dtype, model.device, adapter)
        indices = [i for i in images if requests[i].adapter == name]
        for i, features in zip(indices, image_encoder.encode([images[i] for i in indices])):
            requests[i] = requests[i]._replace(features=features)
    return requests


def write_responses(path: str, records: Sequence[dict], responses: Iterable[str]) -> None:
    """Write the records as JSONL, each with its response in the field `output`. Raises OSError.

    Only rank 0 writes the file, atomically; the other ranks take part in the generation.
    """
    if rank() > 0:
        for _ in responses:  # generation needs all ranks
            pass
        return
    # UTF-8 cannot encode an unpaired surrogate; it is written as an escape sequence, which is valid JSON.
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        for record, output in zip(records, responses):
            file.write(json.dumps(record | {"output": output}, ensure_ascii=False) + "\n")
