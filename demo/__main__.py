"""A page to try adapters on: python -m demo --adapter a.safetensors, then open what it says in a browser."""

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
    option("--template", type=click.Choice(NAMES), help="The prompt template.  [default: the adapter's]"),
)
@option_group("Memory", *bits_options)
@option_group(
    "Page",
    option("--host", default="127.0.0.1", help="Who is listened to: this machine alone; 0.0.0.0 is everybody."),
    option("--port", type=click.IntRange(1, 65535), default=7860, help="Where the page is: http://HOST:PORT."),
)
def main(adapter_paths, base, device, dtype, vision_encoder, encoder, template, bits, host, port):
    """Serve a page on which adapters respond beside their base, and their prompts are seen at work.

    It is for this machine alone, unless --host says otherwise, and loads nothing from elsewhere. Ctrl-C ends it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the uploads are deleted
    with one_line_errors(), TemporaryDirectory(prefix="llama-adapter-demo-") as uploads:
        if not adapter_paths:
            raise ValueError("nothing to show: give --adapter FILE, one or several")
        # Gradio reads both when it is imported: where uploads lie until they are read, and that it reports to nobody.
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
