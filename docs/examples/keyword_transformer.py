"""An encoder for spoken words, as `--encoder docs/examples/keyword_transformer.py:class_tokens` takes it.

The Keyword Transformer KWT-1 (Berg et al., 2021) is a vision transformer of 607,000 parameters, whose patches are the
98 moments of a second of sound; the MFCC that it begins with are computed inside the file. It needs two packages, and
an environment variable that says where the file is, models_data_v2_12_labels/kwt1/tflite_non_stream/non_stream.tflite
of github.com/ARM-software/keyword-transformer:

    pip install av ai-edge-litert
    export KWT_MODEL=non_stream.tflite
"""

import os
from functools import cache

import numpy as np

RATE = 16000  # samples a second, and as many as the model takes
DEPTHS = [3, 6, 9, 12]  # of 12 layers: evenly spaced up to the last, as section 3.3 of the paper has them of CLIP's
TOKENS = (
    "kws_transformer/transformer_block_{}/layer_normalization_{}/batchnorm/add_1"  # what a layer yields, (1, 99, 64)
)


def class_tokens(path):
    """(4, 64): the class token at four depths. Raises ValueError in one line, OSError where there is no such sound."""
    model = hear(path)
    index = {tensor["name"]: tensor["index"] for tensor in model.get_tensor_details()}
    names = [TOKENS.format(depth - 1, 2 * depth - 1) for depth in DEPTHS]
    if not set(names) <= set(index):
        raise ValueError(f"{os.environ['KWT_MODEL']}: is not KWT-1: it has no {names[-1]}")
    return np.stack([model.get_tensor(index[name])[0, 0] for name in names])


def label_scores(path):
    """(1, 12): the logits of silence, unknown, yes, no, up, down, left, right, on, off, stop, go.

    Raises as class_tokens.
    """
    model = hear(path)
    return model.get_tensor(model.get_output_details()[0]["index"])


def hear(path):
    """The model after it has heard a sound."""
    model = load_keyword_transformer(os.environ.get("KWT_MODEL", ""))
    model.set_tensor(model.get_input_details()[0]["index"], one_second(read_sound(path))[None])  # (1, 16000)
    model.invoke()
    return model


@cache
def load_keyword_transformer(path):
    """The interpreter, which keeps what all layers yield: without delegates, which would fuse some of them away."""
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError:
        raise ValueError("the Keyword Transformer needs a package of its own: pip install ai-edge-litert") from None
    if not os.path.isfile(path):
        raise ValueError(f"KWT_MODEL={path}: no such file; the variable names the Keyword Transformer's .tflite")
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        model = Interpreter(path, experimental_op_resolver_type=plain, experimental_preserve_all_tensors=True)
    except ValueError as error:
        raise ValueError(f"{path}: is no tflite model: {error}") from None
    model.allocate_tensors()
    shape = list(model.get_input_details()[0]["shape"])
    if shape != [1, RATE]:
        raise ValueError(f"{path}: takes {shape} numbers, not a second of sound, [1, {RATE}]")
    return model


def read_sound(path):
    """(samples,) at 16 kHz, of whatever rate, in [-1, 1]."""
    try:
        import av
    except ImportError:
        raise ValueError("reading sounds needs PyAV: pip install av") from None
    resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
    with av.open(str(path)) as file:
        frames = [*file.decode(audio=0), None]  # None: what is left in the resampler
        pieces = [piece.to_ndarray()[0] for frame in frames for piece in resampler.resample(frame)]
    return np.concatenate(pieces)


def one_second(samples):
    """(16000,): the second around the middle of a sound's energy, with silence where the sound ends before."""
    energy = samples.astype(np.float64) ** 2
    middle = np.average(np.arange(len(samples)), weights=energy) if energy.any() else len(samples) / 2
    return np.pad(samples, RATE // 2)[round(middle) : round(middle) + RATE].astype(np.float32)
