"""Serve a page for trying out adapters: python -m demo --adapter a.safetensors, then open the printed address."""

import os
import signal
from tempfile import TemporaryDirectory

import click
from cloup import command, option, option_group

from demo.responses import Demonstration
from formats.chat_templates import NAMES
from formats.loading import load_with_adapters
from runtime.cli import adapter_options, bits_options, encoder_options, one_line_errors
from runtime.device import select_device


@command(context_settings={"show_default": True})
@adapter_options
@option_group(
    "Prompt",
    *encoder_options,
    option("--template", type=click.Choice(NAMES), help="The prompt template.  [default: the adapter's, or alpaca]"),
)
@option_group("Memory", *bits_options)
@option_group(
    "Page",
    option(
        "--host",
        default="127.0.0.1",
        help="Address to listen on; 0.0.0.0 also accepts connections from other machines.",
    ),
    option("--port", type=click.IntRange(1, 65535), default=7860, help="Port of the page, http://HOST:PORT."),
)
def main(adapter_paths, base, device, dtype, vision_encoder, encoder, template, bits, host, port):
    """Serve a page that compares adapters with their base.

    Only this machine can open the page, unless --host allows others. The page loads nothing from other servers. Stop
    the server with Ctrl-C.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that the uploads are deleted
    with one_line_errors(), TemporaryDirectory(prefix="llama-adapter-demo-") as uploads:
        if not adapter_paths:
            raise ValueError("there is no adapter to show; use --adapter FILE one or more times")
        # The folder of uploads, which Gradio reads when it is imported, and a switch for its usage data.
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            from demo.page import make_page, serve
        except ImportError:
            raise ValueError("the page needs a package that is not installed: pip install gradio") from None
        device, dtype = select_device(device, dtype)
        model, tokenizer, adapters = load_with_adapters(adapter_paths, base, device, dtype, bits=bits)
        options = {"vision_encoder": vision_encoder, "encoder": encoder, "template": template}
        serve(make_page(Demonstration(model, tokenizer, adapters, **options)), host, port)


if __name__ == "__main__":
    main()
