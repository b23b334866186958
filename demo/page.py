"""The page itself, of Gradio's blocks: what is typed and set, and where responses and pictures appear."""

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

from demo.responses import LONGEST, Demonstration, Sampling, Upload, gates_figure, shares_table
from formats.requests import Request
from runtime.errors import error_line, is_out_of_memory

WAITING = 16  # requests; a further one is told to come again
UPLOAD = "64mb"
# Each request for the model carries this: of all kinds of them, one at a time.
ON_THE_MODEL = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
SYSTEM_FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # nothing is fetched

INTRODUCTION = """# LLaMA-Adapter

One instruction, given to a frozen LLaMA with an adapter and without. The adapter adds K prompts to the topmost L
layers; in each head a gate g says how far they are let in.
"""
ABOUT_SHARES = """### Where the prompts speak

In an adapted layer a token's attention output, before Wo, is the sum **g A vp + W v**: what the prompts say, and what
the tokens say, as in the frozen base. A cell is the prompts' part of it, |g A vp| / (|g A vp| + |W v|), over all heads,
in per cent, while the token above it was chosen; 50 means that both are equally long, 0 is the frozen layer. It is a
size: what the prompts change, the two responses show.
"""
ABOUT_GATES = """### Gate values

tanh(g) in each head of each adapted layer, at strength 1 (g itself, where the adapter's file says so). Training starts
with all at 0 (white), where the model is the base. A gate below 0 subtracts what the prompts say. The strength
multiplies them all; at 0 the model is the base again.
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
    """All there is to see, bound to a demonstration; an upload that nobody waited for goes after an hour."""
    names, encoders = list(demonstration.adapters), demonstration.encoders
    with gr.Blocks(title="LLaMA-Adapter", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                instruction = gr.Textbox(label="Instruction", max_lines=6, max_length=LONGEST, elem_id="instruction")
                context = gr.Textbox(
                    label="Input, where the instruction is about one", max_lines=6, max_length=LONGEST, elem_id="input"
                )
                with gr.Row(visible=names[0] in encoders) as image:
                    file = gr.File(label="Image", height=120, elem_id="file")
                    with gr.Column(min_width=160):
                        preview, upload = gr.HTML(elem_id="preview"), gr.State()
                        forget = gr.Button("Remove the image", visible=False, size="sm")
            with gr.Column(min_width=280):
                name = gr.Radio(names, value=names[0], label="Adapter", visible=len(names) > 1, elem_id="adapter")
                strength = gr.Slider(0, 2, 1, step=0.05, label="Strength", elem_id="strength")
                with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                    sampling = sampling_controls()
        with gr.Row():
            ask = gr.Button("Ask", variant="primary", scale=4, elem_id="ask")
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
        shown = [adapted, base, shares, notice]
        answering = gr.on(
            [ask.click, instruction.submit], partial(stream_responses, demonstration), inputs, shown, **ON_THE_MODEL
        )
        stop.click(None, cancels=[answering], api_visibility="private")
        picture = [file, upload, preview, forget, notice]
        file.upload(partial(take_image, demonstration), file, picture, **ON_THE_MODEL)
        forget.click(no_image, None, picture, api_visibility="private")
        name.change(partial(choose_adapter, demonstration), name, [image, gates], api_visibility="private")
    return page.queue(max_size=WAITING)


def sampling_controls() -> list[gr.Slider | gr.Textbox]:
    """The fields of `Sampling` but for the strength, in their order."""
    usual = Sampling()
    return [
        gr.Slider(0, 2, usual.temperature, step=0.05, label="Temperature (0: greedy)"),
        gr.Slider(0.05, 1, usual.top_p, step=0.05, label="Top-p"),
        gr.Slider(1, 1024, usual.max_new_tokens, step=1, precision=0, label="New tokens, at most", elem_id="tokens"),
        gr.Slider(0, 99, usual.seed, step=1, precision=0, label="Seed"),
        gr.Slider(1, 2, usual.repetition_penalty, step=0.05, label="Repetition penalty (1: none)"),
        gr.Textbox(usual.stop, lines=2, label="Texts that end a response, one per line", elem_id="stop_texts"),
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
    """Yield the content of both responses, the heat map and the notice, while the responses grow."""
    features = upload.features.get(name) if upload else None
    request = Request(instruction, context, name, features=features)
    first_layer = len(demonstration.model.layers) - len(demonstration.adapters[name].gates)
    yield ["", "", "", ""]  # nothing of what was asked before
    drawn = False
    try:
        for responses in demonstration.respond(request, Sampling(strength, *sampling)):
            heat = gr.skip()
            if responses.shares is not None and not drawn:
                heat, drawn = shares_table(responses.shares, responses.labels, first_layer), True
            yield [responses.adapter, responses.base, heat, gr.skip()]
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ValueError | OSError) and not is_out_of_memory(error):
            raise
        yield [gr.skip(), gr.skip(), gr.skip(), as_notice(error)]


def take_image(demonstration: Demonstration, path: str) -> list:
    """An upload becomes features and a preview; the place for files is free again, and the file is gone."""
    try:
        upload = demonstration.encode_upload(Path(path))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ValueError | OSError) and not is_out_of_memory(error):
            raise
        return [*no_image()[:-1], as_notice(error)]
    return [None, upload, upload.preview, gr.Button(visible=True), ""]


def no_image() -> list:
    return [None, None, "", gr.Button(visible=False), ""]


def choose_adapter(demonstration: Demonstration, name: str) -> list:
    return [gr.Row(visible=name in demonstration.encoders), gates_figure(demonstration.adapters[name])]


def as_notice(error: Exception) -> str:
    return f'<p class="notice" role="alert">{escape(error_line(error))}</p>'


class PageOnly:
    """ASGI middleware that refuses the paths of Gradio's API that the page does not use."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        app = self.app
        if scope["type"] == "http" and re.match(r"(/gradio_api)?/(run|call|api)\b", scope["path"]):
            app = PlainTextResponse("there is a page, and no API", status_code=404)
        await app(scope, receive, send)


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until Ctrl-C. It loads and reports nothing elsewhere. Raises OSError if the port is taken.

    Requests whose Host header is another name are refused, because a website could give its own name this address
    (DNS rebinding).
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
            max_file_size=UPLOAD,
            app_kwargs={"middleware": middleware},
            theme=theme,
            css=CSS,
            footer_links=[],
            **off,
        )
    except OSError:
        raise OSError(f"{host}:{port}: is taken, or no place to listen at; give another --port, or --host") from None
    click.echo(f"http://{host}:{port}, until Ctrl-C")
    page.block_thread()
