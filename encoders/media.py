"""Open images and videos, and preprocess them for a vision transformer."""

import os
from time import monotonic
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from encoders.models import RESAMPLES, ViTConfig
from runtime.files import require_file

PREPROCESSING_VERSION = 2  # increase it if `frames_of` or `preprocess` returns different pixels: caches depend on it
# Formats that Pillow decodes by itself. For EPS, for example, it would run Ghostscript.
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
ANIMATED = ("GIF", "WEBP", "PNG")  # their frames are an animation; the frames of a TIFF are pages
MAX_PIXELS = 2**26  # maximum per image
MAX_ANIMATION_PIXELS = 2**30  # maximum of all decoded frames together
MAX_SCANS = 200  # a progressive JPEG usually has ten; each takes as long as decoding the whole image
MAX_FRAME_PIXELS = 2**25  # maximum per video frame; 8K has 33,177,600
MAX_VIDEO_SECONDS = 120  # time to decode a video
# FFmpeg's formats that consist of one file. A playlist, for example, would open other files.
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,h264,hevc,m4v"
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


def open_image(path: str | Path) -> Image.Image:
    """Open an image, upright and in RGB. If it is an animation, return the first frame.

    Raises FileNotFoundError, or ValueError if the file is not a valid image, or is too large or too narrow.
    """
    return open_picture(path, None)[0]


def open_picture(path: str | Path, number: int | None = 8) -> list[Image.Image]:
    """Open an image or an animation. Return a list of one image, or of `number` evenly spaced frames of the animation.

    If the animation has fewer frames, all are returned; if `number` is None, only the first one. Raises as `open_image`
    does.
    """
    require_file(path)
    frames, pixels = [], 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(path, formats=PICTURES) as image:
                check_size(image)
                if image.format == "JPEG" and Path(path).read_bytes().count(b"\xff\xda") > MAX_SCANS:
                    raise ValueError(f"it is a JPEG with more than {MAX_SCANS} scans")
                wanted = {0}
                if number is not None and image.format in ANIMATED:
                    wanted = evenly_spread(number, image.n_frames)
                for i in range(max(wanted) + 1):
                    image.seek(i)
                    check_size(image)  # a frame of a GIF may be larger than the previous one
                    pixels += image.width * image.height
                    if pixels > MAX_ANIMATION_PIXELS:
                        raise ValueError(f"its frames have more than {MAX_ANIMATION_PIXELS:,} pixels in total")
                    if i in wanted:
                        frames.append(on_white(to_eight_bits(ImageOps.exif_transpose(image))))
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is not an image in a supported format ({', '.join(PICTURES)})") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: has more than {MAX_PIXELS:,} pixels; scale the image down") from None
    except Exception as error:  # a broken file can cause any exception in a decoder
        raise ValueError(f"{path}: cannot be read as an image: {error}") from None
    return [require_visible(frame, path) for frame in frames]


def check_size(image: Image.Image) -> None:
    """Raise DecompressionBombError if the image has more than MAX_PIXELS pixels."""
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Return the image, with 16-bit gray scaled to 8 bits, because Pillow would clip it.

    Raises ValueError if the image is 32-bit gray, whose range is unknown.
    """
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.uint32)
        pixels += 128
        pixels //= 257
        return Image.fromarray(pixels.astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = {"I": "integers", "F": "floating-point numbers"}[image.mode]
        raise ValueError(f"its pixels are 32-bit {kind}, whose range is unknown; save it with 8 or 16 bits per pixel")
    return image


def on_white(image: Image.Image) -> Image.Image:
    """Return the image in RGB, on a white background: transparent pixels are usually stored as black."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def require_visible(image: Image.Image, path: str | Path) -> Image.Image:
    """Return the image. Raises ValueError if a side has fewer than 2 pixels, or the aspect ratio is above 100."""
    width, height = image.size
    if min(image.size) < 2 or max(image.size) > 100 * min(image.size):
        expected = "at least 2 pixels per side and an aspect ratio of at most 100"
        raise ValueError(f"{path}: has {width} x {height} pixels; expected {expected}")
    return image


def open_video(path: str | Path, number: int = 8) -> list[Image.Image]:
    """Return `number` evenly spaced frames of a video in RGB, or all if it has fewer.

    Raises FileNotFoundError, or ValueError if the file is not a valid video, its frames are too large or too narrow,
    decoding is too slow, or PyAV is missing.
    """
    require_file(path)
    try:
        import av
    except ImportError:
        raise ValueError(f"{path}: reading videos needs PyAV, which is not installed: pip install av") from None
    try:
        # An absolute path, so that FFmpeg does not mistake a file name for a URL.
        options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
        with av.open(os.path.abspath(path), container_options=options, timeout=MAX_VIDEO_SECONDS) as file:
            if not file.streams.video:
                raise ValueError("it has no video stream")
            stream = file.streams.video[0]
            check_frame(stream)
            deadline = monotonic() + MAX_VIDEO_SECONDS
            total = stream.frames  # some formats do not state it, and a fragmented MP4 states too few
            for _ in range(2):
                wanted, seen, frames = evenly_spread(number, total), 0, []
                file.seek(0)
                for frame in decode_frames(file, stream, deadline):
                    if seen in wanted:
                        frames.append(rotate_upright(check_frame(frame)))
                    seen += 1
                if seen == total:
                    break
                total = seen
    except Exception as error:  # a broken file can cause any exception in a decoder
        reason = getattr(error, "strerror", None) or error  # the text of PyAV's errors repeats the path
        raise ValueError(f"{path}: cannot be read as a video: {reason}") from None
    if not frames:
        raise ValueError(f"{path}: has no frames")
    return [require_visible(frame, path) for frame in frames]


def evenly_spread(number: int, total: int) -> set[int]:
    """Return the indices of `number` evenly spaced frames out of `total`, or of all frames if there are fewer."""
    return {(2 * i + 1) * total // (2 * number) for i in range(number)}


def rotate_upright(frame) -> Image.Image:
    """Return a video frame in RGB, rotated as its metadata says: phones record their orientation there."""
    return frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)  # both are counterclockwise


def decode_frames(file, stream, deadline: float) -> Iterator:
    """Yield the frames of a stream. Raises ValueError after the deadline, a value of `monotonic()` in seconds."""
    for frame in file.decode(stream):
        if monotonic() > deadline:
            raise ValueError(f"decoding takes more than {MAX_VIDEO_SECONDS} seconds")
        yield frame


def check_frame(frame):
    """Return `frame`, a video frame or stream. Raises ValueError if a frame has more than MAX_FRAME_PIXELS pixels."""
    if frame.width * frame.height > MAX_FRAME_PIXELS:
        raise ValueError(f"a frame of {frame.width} x {frame.height} has more than {MAX_FRAME_PIXELS:,} pixels")
    return frame


def frames_of(path: str | Path) -> list[Image.Image]:
    """Return up to eight evenly spaced frames of a video or an animation, or a list of one image.

    Raises as `open_image` and `open_video` do.
    """
    return (open_video if Path(path).suffix.lower() in VIDEOS else open_picture)(path)


def preprocess(image: Image.Image, config: ViTConfig) -> Tensor:
    """Resize an image, crop its center, and normalize its pixels as in the training of the encoder.

    Return float32 pixels (channels, S, S).
    """
    S, R = config.image_size, config.resized or config.image_size
    width, height = (R, R) if config.squeezed else (R * side // min(image.size) for side in image.size)
    left, top = (width - S) // 2, (height - S) // 2
    image = image.convert("L" if config.channels == 1 else "RGB")
    image = image.resize((width, height), RESAMPLES[config.resample]).crop((left, top, left + S, top + S))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(S, S, config.channels) / 255
    return ((pixels - torch.tensor(config.mean)) / torch.tensor(config.std)).permute(2, 0, 1)


def files_in(paths: Sequence[str | Path], of_any_kind: bool = False) -> list[Path]:
    """Return the files of `paths`, with each folder replaced by its images and videos.

    If `of_any_kind`, a folder is replaced by all of its files. Raises OSError if a path does not exist, or ValueError
    if a folder contains no such file.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            readable = VIDEOS | {end for end, kind in Image.registered_extensions().items() if kind in PICTURES}
            files = [file for file in sorted(path.iterdir()) if file.is_file()]
            inside = [file for file in files if of_any_kind or file.suffix.lower() in readable]
            if not inside:
                raise ValueError(f"{path}: contains no {'files' if of_any_kind else 'images or videos'}")
            found += inside
        else:
            found.append(require_file(path))
    return found
