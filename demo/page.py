"""The page, made of Gradio's blocks: its controls, the two responses, the heat map and the gates."""

import re
from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path

import click
import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from demo.responses import MAX_CHARACTERS, Demonstration, Sampling, Upload, gates_figure, shares_table
from formats.requests import Request
from runtime.errors import error_line, is_out_of_memory

MAX_WAITING = 16  # requests in the queue; further ones are rejected
MAX_UPLOAD = "64mb"
# All events that use the model share a limit of one at a time.
MODEL_EVENT = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
SYSTEM_FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # so that no fonts are downloaded

INTRODUCTION = """# LLaMA-Adapter

Give one instruction to a frozen LLaMA, with and without an adapter. The adapter adds K prompt embeddings to each
of the topmost L layers. In each head a gate g scales their contribution.
"""
ABOUT_SHARES = """### Share of the prompts

In an adapted layer the attention output of a token, before Wo, is the sum **g A vp + W v**: the term of the
prompts, and the term of the tokens, as in the frozen base. A cell is the share of the prompts in percent,
|g A vp| / (|g A vp| + |W v|) over all heads, at the position that predicted the token above it. At 50 both terms have
the same norm; at 0 the layer is equal to the frozen one. The share measures size, not effect. To see the effect,
compare the two responses.
"""
ABOUT_GATES = """### Gate values

tanh(g) in each head of each adapted layer, at strength 1 (or g itself, if the adapter file says so). Training starts
with all gates at 0 (white), where the model is equal to the base. A negative gate subtracts the prompts' term. The
strength multiplies all gate values; at 0 the model is equal to the base.
"""
CSS = """
.shares { overflow-x: auto; padding-bottom: 10px; }
.shares table { border-collapse: collapse; font-size: 12px; line-height: 1.2; }
.shares th, .shares td { padding: 3px 4px; text-align: center; border: 1px solid var(--border-color-primary); }
.shares th { font-weight: normal; white-space: pre; }
.shares th:first-child { position: sticky; left: 0; background: var(--body-background-fill); }
.shares tr:first-child th { vertical-align: bottom; }
.shares th span { display: inline-block; writing-mode: vertical-rl; transform: rotate(180deg); }
.shares th span { font-family: ui-monospace, monospace; }
.shares td { min-width: 24px; color: #111; background: color-mix(in srgb, #e8590c calc(var(--share) * 100%), #fff); }
#preview img { height: 96px; }
#notice:not(:has(.notice)) { display: none; }
.notice { border-left: 4px solid #e8590c; padding: 4px 12px; }
"""


def make_page(demonstration: Demonstration) -> gr.Blocks:
    """Build the page for a demonstration. An upload that is never processed is deleted after an hour."""
    names, encoders = list(demonstration.adapters), demonstration.encoders
    with gr.Blocks(title="LLaMA-Adapter", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                instruction = gr.Textbox(
                    label="Instruction", max_lines=6, max_length=MAX_CHARACTERS, elem_id="instruction"
                )
                context = gr.Textbox(label="Input (optional)", max_lines=6, max_length=MAX_CHARACTERS, elem_id="input")
                with gr.Row(visible=names[0] in encoders) as image:
                    file = gr.File(label="Image", height=120, elem_id="file")
                    with gr.Column(min_width=160):
                        preview, upload = gr.HTML(elem_id="preview"), gr.State()
                        remove = gr.Button("Remove the image", visible=False, size="sm")
            with gr.Column(min_width=280):
                name = gr.Radio(names, value=names[0], label="Adapter", visible=len(names) > 1, elem_id="adapter")
                strength = gr.Slider(0, 2, 1, step=0.05, label="Strength", elem_id="strength")
                with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                    sampling = sampling_controls()
        with gr.Row():
            ask = gr.Button("Generate", variant="primary", scale=4, elem_id="ask")
            stop = gr.Button("Stop")
        notice = gr.HTML(elem_id="notice", padding=False)
        with gr.Row():
            response = {"lines": 3, "max_lines": 20, "interactive": False, "min_width": 300}
            adapted = gr.Textbox(label="With the adapter", elem_id="adapted", **response)
            base = gr.Textbox(label="The base alone", elem_id="base", **response)
        gr.Markdown(ABOUT_SHARES)
        shares = gr.HTML(elem_id="shares")
        gr.Markdown(ABOUT_GATES)
        gates = gr.Plot(gates_figure(demonstration.adapters[names[0]]), show_label=False, elem_id="gates")

        inputs = [instruction, context, name, strength, upload, *sampling]
        outputs = [adapted, base, shares, notice]
        generation = gr.on(
            [ask.click, instruction.submit], partial(stream_responses, demonstration), inputs, outputs, **MODEL_EVENT
        )
        stop.click(None, cancels=[generation], api_visibility="private")
        image_outputs = [file, upload, preview, remove, notice]
        file.upload(partial(encode_image, demonstration), file, image_outputs, **MODEL_EVENT)
        remove.click(clear_image, None, image_outputs, api_visibility="private")
        name.change(partial(choose_adapter, demonstration), name, [image, gates], api_visibility="private")
    return page.queue(max_size=MAX_WAITING)


def sampling_controls() -> list[gr.Slider | gr.Textbox]:
    """Return a control for each field of `Sampling` except the strength, in the order of the fields."""
    defaults = Sampling()
    return [
        gr.Slider(0, 2, defaults.temperature, step=0.05, label="Temperature (0: greedy)"),
        gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="Top-p"),
        gr.Slider(1, 1024, defaults.max_new_tokens, step=1, precision=0, label="Max new tokens", elem_id="tokens"),
        gr.Slider(0, 99, defaults.seed, step=1, precision=0, label="Seed"),
        gr.Slider(1, 2, defaults.repetition_penalty, step=0.05, label="Repetition penalty (1: none)"),
        gr.Textbox(defaults.stop, lines=2, label="Stop texts, one per line", elem_id="stop_texts"),
    ]


def stream_responses(
    demonstration: Demonstration,
    instruction: str,
    context: str,
    name: str,
    strength: float,
    upload: Upload | None,
    *sampling,
) -> Iterator[list]:
    """Yield lists of the contents of the two responses, the heat map and the notice, while the responses grow.

    `sampling` are the fields of `Sampling` after the strength. An error that the user can act on becomes a notice.
    """
    features = upload.features.get(name) if upload else None
    request = Request(instruction, context, name, features=features)
    first_layer = len(demonstration.model.layers) - len(demonstration.adapters[name].gates)
    yield ["", "", "", ""]  # clears the previous outputs
    drawn = False
    try:
        for responses in demonstration.respond(request, Sampling(strength, *sampling)):
            heat_map = gr.skip()
            if responses.shares is not None and not drawn:
                heat_map, drawn = shares_table(responses.shares, responses.labels, first_layer), True
            yield [responses.adapter, responses.base, heat_map, gr.skip()]
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ValueError | OSError) and not is_out_of_memory(error):
            raise
        yield [gr.skip(), gr.skip(), gr.skip(), as_notice(error)]


def encode_image(demonstration: Demonstration, path: str) -> list:
    """Encode an uploaded file and delete it; return the new values of the image's controls and of the notice.

    An error that the user can act on becomes a notice, and the previous image is removed.
    """
    try:
        upload = demonstration.encode_upload(Path(path))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ValueError | OSError) and not is_out_of_memory(error):
            raise
        return [*clear_image()[:-1], as_notice(error)]
    return [None, upload, upload.preview, gr.Button(visible=True), ""]


def clear_image() -> list:
    return [None, None, "", gr.Button(visible=False), ""]


def choose_adapter(demonstration: Demonstration, name: str) -> list:
    return [gr.Row(visible=name in demonstration.encoders), gates_figure(demonstration.adapters[name])]


def as_notice(error: Exception) -> str:
    return f'<p class="notice" role="alert">{escape(error_line(error))}</p>'


class PageOnly:
    """ASGI middleware that rejects requests to the parts of Gradio's API that the page does not use."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        app = self.app
        if scope["type"] == "http" and re.match(r"(/gradio_api)?/(run|call|api)\b", scope["path"]):
            app = PlainTextResponse("this server has no API; open its page in a browser", status_code=404)
        await app(scope, receive, send)


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until Ctrl-C, without contacting other servers. Raises OSError if it cannot listen on the address.

    Unless `host` is 0.0.0.0 or ::, requests whose Host header is not `host`, localhost or 127.0.0.1 are rejected,
    because a website could make its own domain name resolve to this address (DNS rebinding).
    """
    hosts = ["*"] if host in ("0.0.0.0", "::") else [host, "localhost", "127.0.0.1"]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(PageOnly)]
    off = dict.fromkeys(("share", "run_history", "enable_monitoring", "mcp_server", "ssr_mode"), False)
    theme = gr.themes.Default(font=SYSTEM_FONTS[0], font_mono=SYSTEM_FONTS[1])
    try:
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=MAX_UPLOAD,
            app_kwargs={"middleware": middleware},
            theme=theme,
            css=CSS,
            footer_links=[],
            **off,
        )
    except OSError:
        raise OSError(f"{host}:{port}: cannot listen on this address; choose a different --port or --host") from None
    click.echo(f"http://{host}:{port}, press Ctrl-C to stop")
    page.block_thread()
