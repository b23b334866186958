"""Pictures and videos opened, and made ready for a vision transformer."""

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

PREPROCESSING_VERSION = 2  # count up when `frames_of` or `preprocess` makes other pixels of a file: caches depend on it
# Of Pillow's formats those that are pictures and nothing else: for EPS, say, it would run Ghostscript.
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
MOVING = ("GIF", "WEBP", "PNG")  # those whose frames are one moving picture; a TIFF has pages
PIXELS = 2**26  # at most, of a picture
MOVING_PIXELS = 2**30  # at most, of all frames of a moving picture
SCANS = 200  # at most, of a progressive JPEG, which has about ten; each takes as long as the whole picture
FRAME_PIXELS = 2**25  # at most: 8K video has 33,177,600
VIDEO_SECONDS = 120  # at most, to decode a video
# FFmpeg's formats that are videos and nothing else: a playlist, say, would open other files.
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,h264,hevc,m4v"
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


def open_image(path: str | Path) -> Image.Image:
    """A picture in RGB, the right way up, of a moving one the first frame.

    Raises FileNotFoundError, or ValueError that says what is wrong with it.
    """
    return open_picture(path, None)[0]


def open_picture(path: str | Path, number: int | None = 8) -> list[Image.Image]:
    """Return `number` frames of a moving picture, evenly spread, or all that it has; with None the first alone.

    Raises as `open_image`.
    """
    require_file(path, "image")
    frames, pixels = [], 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is lower
            with Image.open(path, formats=PICTURES) as image:
                check_size(image)
                if image.format == "JPEG" and Path(path).read_bytes().count(b"\xff\xda") > SCANS:
                    raise ValueError(f"a JPEG of more than {SCANS} scans")
                wanted = {0}
                if number is not None and image.format in MOVING:
                    wanted = evenly_spread(number, image.n_frames)
                for i in range(max(wanted) + 1):
                    image.seek(i)
                    check_size(image)  # a GIF's frame may be larger than the one before
                    pixels += image.width * image.height
                    if pixels > MOVING_PIXELS:
                        raise ValueError(f"its frames have more than {MOVING_PIXELS:,} pixels")
                    if i in wanted:
                        frames.append(on_white(eight_bits(ImageOps.exif_transpose(image))))
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is not an image of a kind that is read: {', '.join(PICTURES)}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: has more than {PIXELS:,} pixels") from None
    except Exception as error:  # whatever a broken file makes a decoder meet
        raise ValueError(f"{path}: is a broken image: {error}") from None
    return [showing(frame, path) for frame in frames]


def check_size(image: Image.Image) -> None:
    """Raise DecompressionBombError if the image has too many pixels."""
    if image.width * image.height > PIXELS:
        raise Image.DecompressionBombError


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8: Pillow would cut it off. Raises ValueError at wider pixels, of unknown range."""
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.uint32)
        pixels += 128
        pixels //= 257
        return Image.fromarray(pixels.astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = {"I": "whole numbers", "F": "floating-point numbers"}[image.mode]
        raise ValueError(f"its pixels are {kind} of 32 bits, of no known range: save it with 8 or 16 bits")
    return image


def on_white(image: Image.Image) -> Image.Image:
    """Return the image in RGB, on a white ground where it is transparent: under that, most files hold black."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def showing(image: Image.Image, path: str | Path) -> Image.Image:
    """The image; raises ValueError where it is a mere dot or thread."""
    width, height = image.size
    if min(image.size) < 2 or max(image.size) > 100 * min(image.size):
        raise ValueError(f"{path}: {width} x {height} pixels show nothing")
    return image


def open_video(path: str | Path, number: int = 8) -> list[Image.Image]:
    """So many frames in RGB, evenly spread over a video, or all that it has. Raises FileNotFoundError or ValueError."""
    require_file(path, "image")
    try:
        import av
    except ImportError:
        raise ValueError(f"{path}: reading videos needs PyAV: pip install av") from None
    try:
        # An absolute path, so that no name is taken for a URL or for a protocol of FFmpeg's.
        options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
        with av.open(os.path.abspath(path), container_options=options, timeout=VIDEO_SECONDS) as file:
            stream = file.streams.video[0]
            check_frame(stream)
            deadline = monotonic() + VIDEO_SECONDS
            total = stream.frames  # not all formats say how many, and a fragmented MP4 says too few
            for _ in range(2):
                wanted, seen, frames = evenly_spread(number, total), 0, []
                file.seek(0)
                for frame in decoded(file, stream, deadline):
                    if seen in wanted:
                        frames.append(upright(check_frame(frame)))
                    seen += 1
                if seen == total:
                    break
                total = seen
    except Exception as error:  # whatever a broken file makes a decoder meet
        raise ValueError(f"{path}: is a broken video, or none: {error}") from None
    if not frames:
        raise ValueError(f"{path}: has no frames")
    return [showing(frame, path) for frame in frames]


def evenly_spread(number: int, total: int) -> set[int]:
    """Return the indices of so many of `total` frames, or of all."""
    return {(2 * i + 1) * total // (2 * number) for i in range(number)}


def upright(frame) -> Image.Image:
    """A frame of a video in RGB, the right way up: phones turn no pixels, and write down how the film was held."""
    return frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)  # both are counterclockwise


def decoded(file, stream, deadline: float) -> Iterator:
    """Yield the frames of a stream. Raises ValueError when the time is up."""
    for frame in file.decode(stream):
        if monotonic() > deadline:
            raise ValueError(f"decoding takes more than {VIDEO_SECONDS} seconds")
        yield frame


def check_frame(frame):
    """It, or a stream of such; raises ValueError where it is too large."""
    if frame.width * frame.height > FRAME_PIXELS:
        raise ValueError(f"a frame of {frame.width} x {frame.height} has more than {FRAME_PIXELS:,} pixels")
    return frame


def frames_of(path: str | Path) -> list[Image.Image]:
    """Return the frames of a video or of a moving picture, or a still one.

    Raises FileNotFoundError or ValueError.
    """
    return (open_video if Path(path).suffix.lower() in VIDEOS else open_picture)(path)


def preprocess(image: Image.Image, config: ViTConfig) -> Tensor:
    """Resize a picture, crop its middle and normalize its pixels as in the encoder's training; (c, S, S)."""
    S, R = config.image_size, config.resized or config.image_size
    width, height = (R, R) if config.squeezed else (R * side // min(image.size) for side in image.size)
    left, top = (width - S) // 2, (height - S) // 2
    image = image.convert("L" if config.channels == 1 else "RGB")
    image = image.resize((width, height), RESAMPLES[config.resample]).crop((left, top, left + S, top + S))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(S, S, config.channels) / 255
    return ((pixels - torch.tensor(config.mean)) / torch.tensor(config.std)).permute(2, 0, 1)


def files_in(paths: Sequence[str | Path], of_any_kind: bool = False) -> list[Path]:
    """The files among them, and the pictures and videos (or all files) in folders among them, by name.

    Raises OSError or ValueError where there are none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            readable = VIDEOS | {end for end, kind in Image.registered_extensions().items() if kind in PICTURES}
            files = [file for file in sorted(path.iterdir()) if file.is_file()]
            inside = [file for file in files if of_any_kind or file.suffix.lower() in readable]
            if not inside:
                raise ValueError(f"{path}: holds no images")
            found += inside
        else:
            found.append(require_file(path, "image"))
    return found
