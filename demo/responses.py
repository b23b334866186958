"""Functions behind the page: two responses side by side, a picture's features, and the HTML of what is shown."""

import base64
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from adapter import Adapter
from data import Request, Tokenizer
from demo.prompt_share import prompt_shares
from encoders.media import frames_of
from formats.image_encoders import load_image_encoder
from generate import Responder, stream, text_pieces
from model import LLaMA
from multimodal import ImageAdapter
from runtime.errors import error_line
from training.curves import draw_gates

THUMBNAIL = (240, 240)  # pixels, at most
LONGEST = 20_000  # characters of a prompt or its input: not every base says how many tokens it sees


class Sampling(NamedTuple):
    """Sampling settings of a response; the defaults are greedy."""

    strength: float = 1.0  # scales the gates; 0 is the base
    temperature: float = 0.0
    top_p: float = 0.75
    max_new_tokens: int = 256
    seed: int = 0
    repetition_penalty: float = 1.0
    stop: str = ""  # texts that end a response, one per line


class SideBySide(NamedTuple):
    """Both responses so far, and the prompts' shares once the adapter's response is complete."""

    adapter: str = ""
    base: str = ""
    labels: list[str] = []  # the adapter's response, token by token: n texts
    shares: Tensor | None = None  # (L, n), of the prompts, while each of them was chosen


class Upload(NamedTuple):
    """What is left of an upload."""

    features: dict[str, Tensor]  # (F,) for every adapter that takes images, by its name
    preview: str  # HTML


class Demonstration:
    """A base, adapters over it by name, and what makes features of images for those that take them.

    `vision_encoder`, `encoder` and `template` are the options of generate.py. Raises OSError or ValueError where an
    image adapter's encoder cannot be loaded.
    """

    def __init__(
        self,
        model: LLaMA,
        tokenizer: Tokenizer,
        adapters: dict[str, Adapter],
        *,
        vision_encoder: str | None = None,
        encoder: str | None = None,
        template: str | None = None,
    ):
        self.model, self.tokenizer, self.adapters, self.template = model, tokenizer, adapters, template
        self.encoders = {
            name: load_image_encoder(vision_encoder, encoder, model.dtype, model.device, adapter)
            for name, adapter in adapters.items()
            if isinstance(adapter, ImageAdapter)
        }
        if (vision_encoder or encoder) and not self.encoders:
            raise ValueError("--clip and --encoder are for adapters that were trained on images; here is none")

    def encode_upload(self, path: Path) -> Upload:
        """The features of a file that was uploaded, for every adapter that takes images; the file is deleted.

        Raises OSError or ValueError, in words that name the file alone, not the folder where it was put.
        """
        try:
            features = {name: encoder.encode([path])[0] for name, encoder in self.encoders.items()}
            return Upload(features, preview(path))
        except (OSError, ValueError) as error:
            raise ValueError(error_line(error).replace(str(path), path.name)) from None
        finally:
            path.unlink(missing_ok=True)

    def respond(self, request: Request, sampling: Sampling) -> Iterator[SideBySide]:
        """Yield the responses of an adapter, then of the base, each growing piece by piece; the base sees no image.

        Both have the adapter's template and the same seed. Raises ValueError where nothing is asked, or more than the
        base's context holds.
        """
        if not request.instruction.strip():
            raise ValueError("There is no prompt yet: type an instruction.")
        if max(len(request.instruction), len(request.input)) > LONGEST:
            raise ValueError(f"A prompt or its input has {LONGEST:,} characters at most.")
        name = request.adapter
        responder = Responder(
            self.model,
            self.tokenizer,
            {name: self.adapters[name]},  # alone: the base takes the template of the first one
            gate_scale=sampling.strength,
            template=self.template,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            repetition_penalty=sampling.repetition_penalty,
            stop=[*filter(None, sampling.stop.splitlines())],
        )
        responses, ids = SideBySide(), []
        for piece in pieces(responder, request, sampling.seed, ids):
            responses = responses._replace(adapter=responses.adapter + piece)
            yield responses
        if ids:
            labels, shares = token_texts(self.tokenizer, ids), response_shares(responder, request, ids)
            responses = responses._replace(labels=labels, shares=shares)
            yield responses
        for piece in pieces(responder, Request(request.instruction, request.input), sampling.seed, []):
            responses = responses._replace(base=responses.base + piece)
            yield responses


def pieces(responder: Responder, request: Request, seed: int, ids: list[int]) -> Iterator[str]:
    """Yield a response piece by piece; `ids` is an empty list, which gets all ids. Raises ValueError."""
    tokens, limit = responder.prompt_ids_and_limit(request)
    generator = torch.Generator(responder.model.device).manual_seed(seed)
    sampling = responder.sampling._replace(max_new_tokens=limit, generator=generator)
    new = stream(responder.model, [tokens], responder.adaption_prompts(request), sampling)
    yield from text_pieces(new, responder.tokenizer, ids, responder.stop)


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the text that each id adds; a character of several tokens belongs to the last of them."""
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            text = shown
        texts.append(text[len(shown) :])
        shown = text
    return texts


def response_shares(responder: Responder, request: Request, ids: list[int]) -> Tensor:
    """The prompts' share (L, n) while each of a response's n tokens was chosen: at the token before it."""
    tokens = torch.tensor([responder.prompt_ids(request) + ids], device=responder.model.device)
    shares = prompt_shares(responder.model, tokens, responder.adaption_prompts(request))  # (L, 1, T + n)
    return shares[:, 0, -len(ids) - 1 : -1].cpu()


def preview(path: Path) -> str:
    """A file as the page shows it: small, and within the page itself, so that no file is kept; else its name."""
    try:
        image = frames_of(path)[0]
    except ValueError:  # a sound, say, that an encoder of the user's understands
        return f"<p>{escape(path.name)}</p>"
    image.thumbnail(THUMBNAIL)
    image.save(png := io.BytesIO(), "PNG")
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(path.name)}">'


def shares_table(shares: Tensor, labels: list[str], first_layer: int) -> str:
    """A heat map as an HTML table, layers (the topmost first) by tokens, in per cent.

    shares (L, n); n labels; `first_layer` is that of row 0. The colours mean the same in every table: white is 0, full
    colour is 1.
    """
    head = "".join(f"<th><span>{escape(repr(label)[1:-1])}</span></th>" for label in labels)
    rows = []
    for layer in reversed(range(len(shares))):
        cells = (
            f'<td style="--share: {share:.2f}" title="{share:.1%}">{100 * share:.0f}</td>'
            for share in shares[layer].tolist()
        )
        rows.append(f"<tr><th>{first_layer + layer}</th>{''.join(cells)}</tr>")
    return f'<div class="shares"><table><tr><th>layer</th>{head}</tr>{"".join(rows)}</table></div>'


def gates_figure(adapter: Adapter) -> Figure:
    """The adapter's gates, layers by heads, as training drew them."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    draw_gates(figure.subplots(), adapter)
    return figure
