"""An encoder for sounds: --encoder docs/examples/spectrum.py:rows. It needs PyAV: pip install av."""

import av
import numpy as np


def rows(path):
    """Return the mean log amplitude of a sound in 128 frequency bands, for each quarter of its duration, (4, 128)."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=16000)
    with av.open(str(path)) as file:
        pieces = [piece for frame in file.decode(audio=0) for piece in resampler.resample(frame)]
    samples = np.concatenate([piece.to_ndarray()[0] for piece in pieces])
    quarters = samples[: len(samples) // 1024 * 1024].reshape(4, -1, 256)
    return np.log(1e-6 + np.abs(np.fft.rfft(quarters, axis=2)[..., 1:])).mean(axis=1)
