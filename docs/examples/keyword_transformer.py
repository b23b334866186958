"""An encoder for spoken words: --encoder docs/examples/keyword_transformer.py:class_tokens

The Keyword Transformer KWT-1 (Berg et al., 2021) is a vision transformer of 607,000 parameters. Its patches are the 98
frames of one second of sound; the model itself computes their MFCC from the samples. This file needs two packages and
the model, models_data_v2_12_labels/kwt1/tflite_non_stream/non_stream.tflite of
github.com/ARM-software/keyword-transformer. The environment variable KWT_MODEL is the path of the model:

    pip install av ai-edge-litert
    export KWT_MODEL=non_stream.tflite
"""

import os
from functools import cache

import numpy as np

RATE = 16000  # samples per second; the model takes one second
DEPTHS = [3, 6, 9, 12]  # of 12 layers, evenly spaced up to the last, as multimodal.py takes them from CLIP
# The name of a layer's output, (1, 99, 64).
TOKENS = "kws_transformer/transformer_block_{}/layer_normalization_{}/batchnorm/add_1"


def class_tokens(path):
    """Return the class token at four depths, (4, 64). Raises ValueError, or OSError if the file cannot be opened."""
    model = run_model(path)
    index = {tensor["name"]: tensor["index"] for tensor in model.get_tensor_details()}
    names = [TOKENS.format(depth - 1, 2 * depth - 1) for depth in DEPTHS]
    missing = [name for name in names if name not in index]
    if missing:
        raise ValueError(f"{os.environ['KWT_MODEL']}: is not KWT-1, because it has no tensor {missing[0]}")
    return np.stack([model.get_tensor(index[name])[0, 0] for name in names])


def label_scores(path):
    """Return the logits (1, 12) of silence, unknown, yes, no, up, down, left, right, on, off, stop and go.

    Raises ValueError or OSError as `class_tokens` does.
    """
    model = run_model(path)
    return model.get_tensor(model.get_output_details()[0]["index"])


def run_model(path):
    """Run the model on a sound; return its interpreter, which contains the outputs of all layers."""
    model = load_keyword_transformer(os.environ.get("KWT_MODEL", ""))
    model.set_tensor(model.get_input_details()[0]["index"], one_second(read_sound(path))[None])  # (1, 16000)
    model.invoke()
    return model


@cache
def load_keyword_transformer(path):
    """Load the model so that the outputs of all layers are kept. Delegates are disabled, as they would fuse layers."""
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError:
        raise ValueError("the Keyword Transformer needs one more package: pip install ai-edge-litert") from None
    if not os.path.isfile(path):
        raise ValueError(f"KWT_MODEL={path}: no such file; set it to the path of the Keyword Transformer's .tflite")
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        model = Interpreter(path, experimental_op_resolver_type=plain, experimental_preserve_all_tensors=True)
    except ValueError as error:
        raise ValueError(f"{path}: is not a TFLite model: {error}") from None
    model.allocate_tensors()
    shape = model.get_input_details()[0]["shape"].tolist()
    if shape != [1, RATE]:
        raise ValueError(f"{path}: has an input of shape {shape}; expected one second of sound, [1, {RATE}]")
    return model


def read_sound(path):
    """Read a sound of any sampling rate as mono samples (n,) in [-1, 1], at 16 kHz."""
    try:
        import av
    except ImportError:
        raise ValueError("reading sounds needs PyAV: pip install av") from None
    resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
    with av.open(str(path)) as file:
        frames = [*file.decode(audio=0), None]  # None flushes the resampler
        pieces = [piece.to_ndarray()[0] for frame in frames for piece in resampler.resample(frame)]
    return np.concatenate(pieces)


def one_second(samples):
    """Return the second around the center of the sound's energy, (16000,), padded with silence."""
    energy = samples.astype(np.float64) ** 2
    middle = np.average(np.arange(len(samples)), weights=energy) if energy.any() else len(samples) / 2
    return np.pad(samples, RATE // 2)[round(middle) : round(middle) + RATE].astype(np.float32)
