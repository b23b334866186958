"""Functions behind the page: two responses side by side, features of images, HTML of previews, and the heat map."""

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

THUMBNAIL = (240, 240)  # maximum size of a preview in pixels
MAX_CHARACTERS = 20_000  # limit for an instruction or input, because not every base states its context length


class Sampling(NamedTuple):
    """Sampling settings of a response. The default is greedy decoding."""

    strength: float = 1.0  # multiplies the gate values; 0 gives the base alone
    temperature: float = 0.0
    top_p: float = 0.75
    max_new_tokens: int = 256
    seed: int = 0
    repetition_penalty: float = 1.0
    stop: str = ""  # strings that end a response, one per line


class SideBySide(NamedTuple):
    """Both responses so far, and the shares of the prompts once the adapter's response is complete."""

    adapter: str = ""
    base: str = ""
    labels: list[str] = []  # the n tokens of the adapter's response, as text
    shares: Tensor | None = None  # (L, n), share of the prompts at the position that predicted each token


class Upload(NamedTuple):
    """Features and preview of an uploaded file. The file itself is deleted."""

    features: dict[str, Tensor]  # (F,) for each adapter that was trained on images, by its name
    preview: str  # HTML


class Demonstration:
    """A base, its adapters by name, and an image encoder for each adapter that was trained on images.

    `vision_encoder`, `encoder` and `template` are the options --clip, --encoder and --template of generate.py. Raises
    OSError or ValueError if an encoder cannot be loaded, or if one is given but no adapter uses images.
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
            raise ValueError(
                "--clip and --encoder need an adapter that was trained on images, but none of the adapters was"
            )

    def encode_upload(self, path: Path) -> Upload:
        """Return the features and the preview of an uploaded file, and delete the file.

        If the file cannot be read or encoded, raises a ValueError that contains the name of the file, but not that of
        its folder on the server.
        """
        try:
            features = {name: encoder.encode([path])[0] for name, encoder in self.encoders.items()}
            return Upload(features, preview(path))
        except (OSError, ValueError) as error:
            raise ValueError(error_line(error).replace(str(path), path.name)) from None
        finally:
            path.unlink(missing_ok=True)

    def respond(self, request: Request, sampling: Sampling) -> Iterator[SideBySide]:
        """Yield the responses while they grow, first that of the adapter, then that of the base.

        Both use the same template and the same seed; the base gets no image. After the adapter's response is complete,
        the shares of the prompts are computed. Raises ValueError if the instruction is empty or the prompt is too long.
        """
        if not request.instruction.strip():
            raise ValueError("The instruction is empty: type an instruction.")
        if max(len(request.instruction), len(request.input)) > MAX_CHARACTERS:
            raise ValueError(
                f"The instruction or the input is too long: each may have {MAX_CHARACTERS:,} characters at most."
            )
        name = request.adapter
        responder = Responder(
            self.model,
            self.tokenizer,
            {name: self.adapters[name]},  # no other adapter, because the base uses the template of the first one
            gate_scale=sampling.strength,
            template=self.template,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            repetition_penalty=sampling.repetition_penalty,
            stop=[*filter(None, sampling.stop.splitlines())],
        )
        responses, ids = SideBySide(), []
        for piece in response_pieces(responder, request, sampling.seed, ids):
            responses = responses._replace(adapter=responses.adapter + piece)
            yield responses
        if ids:
            labels, shares = token_texts(self.tokenizer, ids), response_shares(responder, request, ids)
            responses = responses._replace(labels=labels, shares=shares)
            yield responses
        for piece in response_pieces(responder, Request(request.instruction, request.input), sampling.seed, []):
            responses = responses._replace(base=responses.base + piece)
            yield responses


def response_pieces(responder: Responder, request: Request, seed: int, ids: list[int]) -> Iterator[str]:
    """Yield a response piece by piece, and fill the empty list `ids` with its token ids.

    Raises ValueError if the prompt fills the base's context.
    """
    tokens, limit = responder.prompt_ids_and_limit(request)
    generator = torch.Generator(responder.model.device).manual_seed(seed)
    sampling = responder.sampling._replace(max_new_tokens=limit, generator=generator)
    new = stream(responder.model, [tokens], responder.adaption_prompts(request), sampling)
    yield from text_pieces(new, responder.tokenizer, ids, responder.stop)


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the text that each id adds. A character that consists of several tokens belongs to the last of them."""
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            text = shown
        texts.append(text[len(shown) :])
        shown = text
    return texts


def response_shares(responder: Responder, request: Request, ids: list[int]) -> Tensor:
    """Return the share of the prompts (L, n) at the position before each of the n tokens of a response."""
    tokens = torch.tensor([responder.prompt_ids(request) + ids], device=responder.model.device)
    shares = prompt_shares(responder.model, tokens, responder.adaption_prompts(request))  # (L, 1, T + n)
    return shares[:, 0, -len(ids) - 1 : -1].cpu()


def preview(path: Path) -> str:
    """Return HTML: a small image (a video's first frame), embedded as data so that no file is kept.

    If the file is neither an image nor a video, return its name.
    """
    try:
        image = frames_of(path)[0]
    except ValueError:  # for example, a sound for an encoder that the user provides
        return f"<p>{escape(path.name)}</p>"
    image.thumbnail(THUMBNAIL)
    image.save(png := io.BytesIO(), "PNG")
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(path.name)}">'


def shares_table(shares: Tensor, labels: list[str], first_layer: int) -> str:
    """Return a heat map in percent as an HTML table with a row per layer, topmost first, and a column per token.

    `shares` is (L, n), with n labels; its row 0 belongs to layer `first_layer`. The color scale is the same in every
    table: white is 0, and full color is 1.
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
    """Return a figure of the gate values, an image of layers by heads, as in curves.png."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    draw_gates(figure.subplots(), adapter)
    return figure
