"""Images and videos: opening them, and preprocessing for CLIP and other vision transformers."""

import struct

import numpy as np
import pytest
import torch
from helpers import HALF, save_video, make_picture
from PIL import Image

from encoders.media import files_in, frames_of, open_image, open_video, preprocess
from encoders.models import ViTConfig


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(60, 40), (41, 300), (224, 224), (9, 7), (451, 226)])
def test_preprocessing_equals_clip(tmp_path, mode, size):
    transformers = pytest.importorskip("transformers")
    image = make_picture(*size, mode=mode)
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(file)
    theirs = transformers.CLIPImageProcessor()(Image.open(file), return_tensors="pt")["pixel_values"][0]
    ours = preprocess(open_image(file), ViTConfig())
    assert ours.shape == (3, 224, 224)
    gray_level = 1 / 255 / torch.tensor(ViTConfig.std)[:, None, None]
    assert ((ours - theirs).abs() <= 1.01 * gray_level).all()


@pytest.mark.parametrize("size", [(60, 40), (16, 16), (31, 90)])
def test_preprocessing_equals_vit_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    theirs = transformers.ViTImageProcessor(size={"height": 24, "width": 24})
    if "Fast" in type(theirs).__name__ or hasattr(theirs, "_fuse_mean_std_and_rescale_factor"):
        theirs = pytest.importorskip("transformers").models.vit.image_processing_pil_vit.ViTImageProcessorPil(
            size={"height": 24, "width": 24}
        )
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    ours = preprocess(image, ViTConfig(24, 8, mean=HALF, std=HALF, squeezed=True, resample="bilinear"))
    assert ((ours - expected).abs() <= 1.01 * 2 / 255).all()


def test_exif_orientation_is_applied(tmp_path):
    """EXIF orientation 6 means that the image must be rotated clockwise by 90 degrees."""
    image, exif = make_picture(), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.png")), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "P.png", "RGB.png", "RGBA.webp", "P.gif", "RGBA.tif"])
def test_transparent_images_have_a_white_background(tmp_path, kind):
    """A black square is transparent on the left. In RGBA images, its whole lower half has an alpha of 20% instead."""
    mode, ending = kind.split(".")
    half_transparent = mode == "RGBA"
    alpha = np.zeros((16, 16), np.uint8)
    alpha[:, 8:] = 255
    if half_transparent:
        alpha[8:] = 51
    image = Image.new("L", (16, 16), 0)
    options = {"lossless": True} if ending == "webp" else {}
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(alpha))
    elif mode == "P":
        image = Image.fromarray(alpha // 255, "P")  # both colors of the palette are black
        image.putpalette([0, 0, 0, 0, 0, 0])
        options["transparency"] = 0
    else:  # one color is marked as transparent
        image = Image.merge("RGB", [image, image, Image.fromarray(255 - alpha)])
        options["transparency"] = (0, 0, 255)
    image.save(tmp_path / f"x.{ending}", **options)
    read = np.asarray(open_image(tmp_path / f"x.{ending}"))
    assert (read[:8, :8] == 255).all() and (read[:8, 8:] == 0).all()
    assert not half_transparent or (read[8:] == 204).all()


def save_animation(path, colors, **options):
    """Save an animation in which each frame has one color and a transparent middle."""
    frames = []
    for color in colors:
        frames.append(Image.new("RGBA", (16, 12), color))
        frames[-1].paste((0, 0, 0, 0), (6, 0, 10, 12))
    options |= {"lossless": True} if path.suffix == ".webp" else {"disposal": 2} if path.suffix == ".gif" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_frames_of_an_animation_are_sampled(tmp_path, suffix):
    """Eight evenly spread frames are used, or all if there are fewer. Transparent parts become white."""
    many = [(10 * i, 255 - 10 * i, 128) for i in range(20)]
    for colors, expected in ((many, [1, 3, 6, 8, 11, 13, 16, 18]), (many[:3], [0, 1, 2]), (many[:1], [0])):
        save_animation(tmp_path / f"x{suffix}", colors)
        frames = [np.asarray(frame).astype(int) for frame in frames_of(tmp_path / f"x{suffix}")]
        assert all(frame.shape == (12, 16, 3) and (frame[:, 6:10] == 255).all() for frame in frames)
        assert [tuple(frame[5, 3]) for frame in frames] == [colors[i] for i in expected]
        assert tuple(np.asarray(open_image(tmp_path / f"x{suffix}"))[5, 3]) == colors[0]


def test_only_the_first_page_of_a_tiff_is_used(tmp_path):
    pages = [Image.new("RGB", (16, 12), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    (page,) = frames_of(tmp_path / "x.tif")
    assert page.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_number_of_animation_pixels_is_limited(tmp_path, monkeypatch, suffix):
    save_animation(tmp_path / f"x{suffix}", ["red", "lime", "blue"])
    monkeypatch.setattr("encoders.media.MAX_ANIMATION_PIXELS", 3 * 16 * 12)
    assert len(frames_of(tmp_path / f"x{suffix}")) == 3
    monkeypatch.setattr("encoders.media.MAX_ANIMATION_PIXELS", 3 * 16 * 12 - 1)
    with pytest.raises(
        ValueError, match=f"x{suffix}: cannot be read as an image: its frames have more than 575 pixels"
    ):
        frames_of(tmp_path / f"x{suffix}")
    assert open_image(tmp_path / f"x{suffix}").size == (16, 12)


def test_gif_with_an_oversized_second_frame_is_refused(tmp_path, monkeypatch):
    """Pillow accepts frames that are larger than the first."""
    save_animation(tmp_path / "x.gif", ["red", "blue"])
    content = bytearray((tmp_path / "x.gif").read_bytes())
    start = content.rindex(b"\x2c\x00\x00\x00\x00")  # marker of the last frame; left, top, width, height follow it
    content[start + 5 : start + 9] = struct.pack("<2H", 1000, 1000)
    (tmp_path / "x.gif").write_bytes(content)
    monkeypatch.setattr("encoders.media.MAX_PIXELS", 999_999)
    with pytest.raises(ValueError, match="x.gif: has more than 999,999 pixels"):
        frames_of(tmp_path / "x.gif")


def test_normalization_uses_mean_and_std():
    found = preprocess(Image.new("RGB", (8, 8), (255, 0, 0)), ViTConfig(image_size=8, patch_size=4))
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor(ViTConfig.mean)) / torch.tensor(ViTConfig.std)
    torch.testing.assert_close(found, expected[:, None, None].expand(3, 8, 8))


def save_bad_image(tmp_path, kind):
    file = tmp_path / f"{kind}.jpg"
    if kind == "text":
        file.write_text("not an image at all")
    if kind == "truncated":
        make_picture(200, 200).save(file)
        file.write_bytes(file.read_bytes()[:3000])
    if kind == "bomb":
        Image.new("1", (20_000, 20_000)).save(file, format="PNG")
    if kind == "dot":
        make_picture(1, 1).save(file)
    if kind == "thread":
        Image.new("RGB", (9000, 3)).save(file)
    return file


@pytest.mark.parametrize(
    "kind, message",
    [
        ("text", "text.jpg: is not an image"),
        ("truncated", "truncated.jpg: cannot be read as an image: "),
        ("bomb", "bomb.jpg: has more than 67,108,864 pixels"),
        ("dot", "dot.jpg: has 1 x 1 pixels; expected at least 2"),
        ("thread", "thread.jpg: has 9000 x 3 pixels; expected at least 2 pixels per side"),
    ],
)
def test_bad_images_are_one_line_errors(tmp_path, kind, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_image(save_bad_image(tmp_path, kind))
    assert len(str(caught.value).splitlines()) == 1


def test_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png: no such file"):
        open_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_frames_are_spread_over_a_video(tmp_path, suffix):
    save_video(tmp_path / f"x.{suffix}", ["red", "lime", "blue", "white"])
    frames = open_video(tmp_path / f"x.{suffix}")
    means = [np.asarray(frame).mean(axis=(0, 1)) for frame in frames]
    assert [int(mean.argmax()) for mean in means[:6]] == [0, 0, 1, 1, 2, 2] and min(means[7]) > 200
    assert len(frames) == 8 and len(open_video(tmp_path / f"x.{suffix}", 3)) == 3


@pytest.mark.parametrize(
    "matrix, turns",
    [((1, 0, 0, 1), 0), ((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
    ids=["as it is", "clockwise", "upside down", "counterclockwise"],
)
def test_rotation_of_a_video_is_applied(tmp_path, matrix, turns):
    """The matrix (a, b, c, d) in the track header moves pixel (x, y) to (ax + cy, bx + dy), with y pointing down."""
    av = pytest.importorskip("av")
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:16, :16] = 255  # marks the upper left corner
    with av.open(str(tmp_path / "x.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(stream.encode())
    content = bytearray((tmp_path / "x.mp4").read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    start = content.index(b"tkhd") + 44
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "x.mp4").write_bytes(content)
    shown = np.asarray(open_video(tmp_path / "x.mp4")[0]).astype(float)
    expected = np.rot90(pixels, turns)
    assert shown.shape == expected.shape and np.abs(shown - expected).mean() < 5


@pytest.mark.parametrize("movflags", ["frag_keyframe", "frag_keyframe+empty_moov"])
def test_fragmented_video_is_read_to_its_end(tmp_path, movflags):
    """The header of the file counts only the frames of the first fragment, or none."""
    av = pytest.importorskip("av")
    save_video(tmp_path / "x.mp4", ["red", "lime", "blue", "white"], movflags=movflags)
    with av.open(str(tmp_path / "x.mp4")) as file:
        assert file.streams.video[0].frames != 20
    means = [np.asarray(frame).mean(axis=(0, 1)) for frame in open_video(tmp_path / "x.mp4")]
    assert [int(mean.argmax()) for mean in means[:6]] == [0, 0, 1, 1, 2, 2] and min(means[7]) > 200 and len(means) == 8


def test_bad_videos_are_reported(tmp_path, monkeypatch):
    pytest.importorskip("av")
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="x.mp4: cannot be read as a video: Invalid data found when processing input$"):
        frames_of(tmp_path / "x.mp4")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match="x.mp4: reading videos needs PyAV, which is not installed: pip install av"):
        frames_of(tmp_path / "x.mp4")


def test_real_videos_have_eight_frames(data):
    pytest.importorskip("av")
    for file in sorted((data / "media" / "llamafactory_mllm_demo_data").glob("*.[ma][pv][4i]")):
        assert len(open_video(file)) == 8, file


def test_files_of_a_folder_are_sorted_by_name(tmp_path):
    for name in ("b.PNG", "a.mp4", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    found = files_in([tmp_path, tmp_path / "c.txt"])
    assert [file.name for file in found] == ["a.mp4", "b.PNG", "c.txt"]
    assert [file.name for file in files_in([tmp_path], of_any_kind=True)] == ["a.mp4", "b.PNG", "c.txt"]
    with pytest.raises(ValueError, match="empty: contains no images or videos"):
        files_in([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="d.png: no such file"):
        files_in([tmp_path / "d.png"])


@pytest.mark.parametrize("ending, order", [("png", "<"), ("tif", "<"), ("tif", ">")])
def test_16_bit_grayscale_is_scaled_to_8_bits(tmp_path, ending, order):
    values = np.linspace(0, 65535, 256).round().reshape(16, 16)
    Image.fromarray(values.astype(f"{order}u2")).save(tmp_path / f"x.{ending}")
    read = np.asarray(open_image(tmp_path / f"x.{ending}"))
    assert read.shape == (16, 16, 3) and np.array_equal(read[..., 1].flatten(), np.arange(256))


@pytest.mark.parametrize("kind, name", [("i4", "32-bit integers"), ("f4", "32-bit floating-point numbers")])
def test_pixel_types_without_a_known_range_are_refused(tmp_path, kind, name):
    Image.fromarray(np.arange(256).reshape(16, 16).astype(kind)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=f"x.tif: .*{name}"):
        open_image(tmp_path / "x.tif")


def test_unsupported_image_formats_are_refused(tmp_path):
    """An example is EPS, which Pillow would pass to Ghostscript. In a folder, such files are skipped."""
    make_picture().save(tmp_path / "x.eps")
    make_picture().save(tmp_path / "y.png")
    with pytest.raises(ValueError, match="x.eps: is not an image in a supported format .PNG, JPEG"):
        open_image(tmp_path / "x.eps")
    assert files_in([tmp_path]) == [tmp_path / "y.png"]


def test_large_video_frames_are_refused(tmp_path, monkeypatch):
    save_video(tmp_path / "x.mp4", ["red"])
    monkeypatch.setattr("encoders.media.MAX_FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(ValueError, match="x.mp4: .*a frame of 64 x 48 has more than 3,071 pixels"):
        open_video(tmp_path / "x.mp4")


def test_16_bit_grayscale_is_rounded(tmp_path):
    """Compare all 65,536 values v with v / 257, rounded in float64."""
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "x.png")
    found = np.asarray(open_image(tmp_path / "x.png"))[:, :, 0]
    assert (found == np.round(values / 257)).all()


def test_progressive_jpeg_with_many_scans_is_refused(tmp_path):
    make_picture(300, 200).save(tmp_path / "x.jpg", progressive=True)
    content = (tmp_path / "x.jpg").read_bytes()
    assert open_image(tmp_path / "x.jpg").size == (300, 200) and content.count(b"\xff\xda") > 5
    scan = content[content.rfind(b"\xff\xda") : -2]
    (tmp_path / "bomb.jpg").write_bytes(content[:-2] + 300 * scan + content[-2:])
    with pytest.raises(ValueError, match="bomb.jpg: cannot be read as an image: it is a JPEG with more than 200 scans"):
        open_image(tmp_path / "bomb.jpg")


@pytest.mark.parametrize("playlist", ["ffconcat version 1.0\nfile '{}'\n", "#EXTM3U\n#EXTINF:1,\n{}\n"])
def test_playlists_cannot_open_other_files(tmp_path, playlist):
    save_video(tmp_path / "x.mp4", ["red", "blue"])
    (tmp_path / "list.mp4").write_text(playlist.format(tmp_path / "x.mp4"))
    with pytest.raises(ValueError, match="list.mp4: cannot be read as a video"):
        frames_of(tmp_path / "list.mp4")


@pytest.mark.parametrize("name", ["http:/host/x.mp4", "concat:x.mp4", "data:x.mp4"])
def test_file_names_are_not_parsed_as_urls(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    save_video(tmp_path / name, ["red", "blue"])
    assert len(frames_of(name)) == 8


@pytest.mark.parametrize("suffix, in_time", [("mp4", 0), ("mkv", 0), ("mkv", 15)])
def test_decoding_time_of_a_video_is_limited(tmp_path, monkeypatch, suffix, in_time):
    """A Matroska file does not state its number of frames, so it is decoded twice, within one time limit."""
    save_video(tmp_path / f"x.{suffix}", ["red", "blue"])
    times = iter([0, *[0] * in_time, *[1000] * 9])
    monkeypatch.setattr("encoders.media.monotonic", lambda: next(times))
    with pytest.raises(ValueError, match=f"x.{suffix}: .*takes more than 120 seconds"):
        frames_of(tmp_path / f"x.{suffix}")
