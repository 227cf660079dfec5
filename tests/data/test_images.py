"""Images against the original's transforms, and files of every kind."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sphinx_jax.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    load_image,
    normalise,
    padded_resize,
    random_resized_crop,
)
from sphinx_jax.errors import UserError

RED, GREEN = (255, 0, 0), (0, 255, 0)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The original's other transform: the shorter side scaled to `size`, and the middle of the longer one."""
    width, height = image.size
    short, long = sorted(image.size)
    scaled = int(size * long / short)
    new = (size, scaled) if width <= height else (scaled, size)
    if new != image.size:
        image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("size", [48, 224])
@pytest.mark.parametrize(
    ("number", "name", "transform"),
    [
        *((number, "padded_resize", padded_resize) for number in range(5)),
        # Image 3 has 9 x 1 pixels, and no stored crop.
        *((number, "resized_center_crop", center_crop) for number in (0, 1, 2, 4)),
    ],
)
def test_transforms_equal_the_originals(golden, number, size, name, transform):
    arrays = golden("transform.npz")
    image = Image.fromarray(arrays[f"in{number}"])
    expected = arrays[f"out{number}_{name}_{size}"].transpose(1, 2, 0)
    got = normalise(transform(image, size))
    assert got.shape == (size, size, 3) and got.dtype == np.float32
    # Of the larger results every fifth pixel is stored.
    step = -(-size // len(expected))
    np.testing.assert_allclose(got[::step, ::step], expected, atol=1e-6, rtol=0)


def test_normalise_is_undone_by_its_inverse():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    back = (normalise(pixels) * np.array(CLIP_STD) + np.array(CLIP_MEAN)) * 255
    np.testing.assert_allclose(back, pixels, atol=1e-3)


def test_a_square_of_the_right_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(padded_resize(Image.fromarray(pixels), 64), pixels)


def test_a_long_strip_needs_no_huge_square():
    assert padded_resize(Image.new("RGB", (80_000, 3)), 32).shape == (32, 32, 3)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def two_halves(mode: str = "RGB") -> Image.Image:
    """Red above green."""
    image = Image.new("RGB", (6, 8), RED)
    image.paste(GREEN, (0, 4, 6, 8))
    return image.convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # What a camera held in each of EXIF's eight ways stores of the same scene.
    store = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }.get(orientation, [])
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8))
    stored = scene
    for step in store:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.array(load_image(saved(stored, "PNG", exif=exif))), np.array(scene))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("TIFF", "CMYK"), *((kind, mode) for kind in ("PNG", "TIFF", "GIF") for mode in ("RGB", "P", "RGBA"))],
)
def test_colour_modes_become_rgb(kind, mode):
    image = load_image(saved(two_halves(mode), kind))
    assert image.mode == "RGB"
    assert image.getpixel((2, 1)) == RED and image.getpixel((2, 6)) == GREEN


def test_greys_of_all_depths():
    # Black, middle grey and white, in each depth's own units.
    def grey(values, dtype):
        return Image.fromarray(np.array([values], dtype))

    for image in (
        load_image(saved(grey([0, 128, 255], np.uint8), "PNG")),
        load_image(saved(grey([0, 128 * 257, 65535], np.uint16), "PNG")),
        load_image(saved(grey([0, 128 * 257, 65535], np.uint16), "TIFF")),
        load_image(saved(grey([0, 128 * 257, 65535], np.int32), "TIFF")),
        load_image(saved(grey([0, 128, 255], np.float32), "TIFF")),
        load_image(grey([0, 128 / 255, 1], np.float32)),
        load_image(saved(grey([0, 128, 255], np.uint8).convert("LA"), "PNG")),
    ):
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.array(image)[0], [[v] * 3 for v in (0, 128, 255)])
    bits = load_image(saved(grey([0, 255], np.uint8).convert("1"), "PNG"))
    np.testing.assert_array_equal(np.array(bits)[0], [[0] * 3, [255] * 3])
    dark = load_image(saved(grey([0, 200], np.uint16), "PNG"))
    assert np.array(dark).max() == 0, "a dark 16-bit image is dark, not 8-bit"


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    np.testing.assert_array_equal(np.array(load_image(saved(image, "PNG")))[0], [[255] * 3, [10, 20, 30]])
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(
        np.array(load_image(saved(palette, "PNG", transparency=0)))[0], [[255] * 3, list(GREEN)]
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_a_truncated_file_is_named(tmp_path, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    data = saved(noise, kind)
    for fraction in (0.1, 0.5, 0.95):
        path = tmp_path / "cut.png"
        path.write_bytes(data[: int(len(data) * fraction)])
        with pytest.raises(UserError, match=r"cut.png: (not an image|the image is damaged)"):
            load_image(path)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_one_kind_of_error(tmp_path):
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    refused = 0
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000", "ICO"):
        data = np.frombuffer(saved(noise, kind), np.uint8)
        for _ in range(60):
            broken = data.copy()
            where = random.integers(0, min(len(data), 120), 5)
            broken[where] = random.integers(0, 256, 5)
            try:
                load_image(broken.tobytes(), "broken")
            except UserError as error:
                assert str(error).startswith("broken: ")
                refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"", "the file is empty"), (b"GIF89a", "not an image"), (None, "No such file")]
)
def test_a_file_that_is_no_image_is_named(tmp_path, content, complaint):
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"photo.jpg: .*{complaint}"):
        load_image(path)


def test_a_directory_is_no_image(tmp_path):
    with pytest.raises(UserError, match="cannot read the image"):
        load_image(tmp_path)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match="too many pixels"):
        load_image(saved(two_halves(), "PNG"))


def test_random_crops_have_the_originals_area_and_shape():
    """Red tells a pixel's column and green its row: the box of each crop is read off its colours."""
    width, height, size = 240, 200, 64
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(width)[None, :], np.arange(height)[:, None]
    image = Image.fromarray(ramp)
    random = np.random.default_rng(0)
    boxes = []
    for _ in range(300):
        crop = random_resized_crop(image, size, random).astype(float)
        # Away from the edges a ramp stays a ramp: its slope is the box's side over the size.
        inner = np.arange(8, size - 8)
        across, left = np.polyfit(inner + 0.5, crop[size // 2, inner, 0] + 0.5, 1)
        down, top = np.polyfit(inner + 0.5, crop[inner, size // 2, 1] + 0.5, 1)
        boxes.append((left, top, across * size, down * size))
    left, top, w, h = np.array(boxes).T
    area = w * h / (width * height)
    assert area.min() > 0.885 and area.max() < 1.005 and abs(area.mean() - 0.95) < 0.02
    assert (w / h).min() > 0.74 and (w / h).max() < 1.35
    for start, length, side in ((left, w, width), (top, h, height)):
        assert start.min() > -0.6 and (start + length).max() < side + 0.6 and start.std() > 2


@pytest.mark.parametrize(("shape", "box"), [((400, 30), (180, 40, 0, 30)), ((30, 400), (0, 30, 180, 40))])
def test_a_crop_of_a_strip_is_centred(shape, box):
    """No crop between 3:4 and 4:3 has 90 % of it: the largest such part in the middle."""
    width, height = shape
    left, w, top, h = box
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    middle = Image.fromarray(pixels[top : top + h, left : left + w]).resize((16, 16), Image.Resampling.BICUBIC)
    got = random_resized_crop(Image.fromarray(pixels), 16, np.random.default_rng(0))
    np.testing.assert_array_equal(got, np.array(middle))


def exif_with(orientation: int, tag: int, kind: int, count: int, value: bytes) -> bytes:
    """EXIF with an orientation and one other tag, of any type."""
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack(">HHI", tag, kind, count) + value
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + struct.pack(">I", 0)


ODD_TAGS = [
    *(
        (0x0128, 2, 4, b"inch"),
        (0x0131, 11, 1, struct.pack(">f", 1.5)),
        (0x011A, 2, 4, b"72dp"),
        (0x0131, 4, 1, b"\0\0\0\7"),
    ),
    *(
        (0x8769, 2, 4, b"none"),
        (0x8825, 3, 1, b"\0\7\0\0"),
        (0x0132, 5, 1, b"\xff\xff\xff\xff"),
        (0x9999, 13, 9, b"\0\0\0\1"),
    ),
]


@pytest.mark.parametrize("tag", ODD_TAGS, ids=lambda tag: f"{tag[0]:04x}-{tag[1]}")
@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_only_orientation_is_read_of_exif(kind, orientation, tag):
    """One tag of a wrong type beside the orientation neither refuses the image nor ends in another error."""
    exif, image = exif_with(orientation, *tag), Image.new("RGB", (16, 8), RED)
    data = tiff_with(orientation, *tag) if kind == "TIFF" else saved(image, kind, exif=exif)
    loaded = load_image(data, "photo")
    assert loaded.size == ((8, 16) if orientation in (6, 8) else (16, 8))


def tiff_with(orientation: int, tag: int, kind: int, count: int, value: bytes) -> bytes:
    """An uncompressed TIFF of 16 x 8 red pixels with one more tag."""
    pixels = bytes(RED) * 128

    def short(number, value):
        return struct.pack(">HHIHH", number, 3, 1, value, 0)

    def long(number, value):
        return struct.pack(">HHII", number, 4, 1, value)

    offset = 8 + len(pixels)
    entries = [short(256, 16), short(257, 8), struct.pack(">HHII", 258, 3, 3, offset), short(259, 1), short(262, 2)]
    entries += [long(273, 8), short(274, orientation), short(277, 3), short(278, 8), long(279, len(pixels))]
    entries += [struct.pack(">HHI", tag, kind, count) + value]
    entries.sort(key=lambda entry: struct.unpack(">H", entry[:2]))
    directory = struct.pack(">H", len(entries)) + b"".join(entries) + struct.pack(">I", 0)
    return b"MM\0*" + struct.pack(">I", offset + 6) + pixels + struct.pack(">3H", 8, 8, 8) + directory


@pytest.mark.parametrize(
    ("kind", "count", "value", "size"),
    [
        (4, 1, b"\0\0\0\6", (8, 16)),
        (3, 2, b"\0\6\0\6", (8, 16)),
        (2, 2, b"6\0\0\0", (16, 8)),
        (11, 1, struct.pack(">f", 6.0), (16, 8)),
        (3, 1, b"\0\x09\0\0", (16, 8)),
        (3, 0, b"\0\6\0\0", (16, 8)),
        (7, 4, b"\0\0\0\6", (16, 8)),
        (5, 1, b"\xff\0\0\6", (16, 8)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_orientation_of_another_type_is_no_error(kind, count, value, size):
    entry = struct.pack(">HHHI", 1, 0x0112, kind, count) + value
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + entry + struct.pack(">I", 0)
    assert load_image(saved(Image.new("RGB", (16, 8)), "JPEG", exif=exif)).size == size


def test_a_pil_image_is_turned_as_its_file_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    by_path = np.array(load_image(tmp_path / "photo.png"))
    opened, loaded = Image.open(tmp_path / "photo.png"), Image.open(tmp_path / "photo.png")
    loaded.load()
    assert by_path.shape == (10, 6, 3)
    np.testing.assert_array_equal(np.array(load_image(opened)), by_path)
    np.testing.assert_array_equal(np.array(load_image(loaded)), by_path)
    np.testing.assert_array_equal(np.array(loaded), pixels, "the caller's image stays as it is")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_a_truncated_pil_image_is_a_user_error(tmp_path, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    (tmp_path / "cut").write_bytes(saved(noise, kind)[:-2000])
    try:
        image = Image.open(tmp_path / "cut")
    except OSError:
        return  # Pillow does not open it, so nobody can pass it.
    with pytest.raises(UserError, match=r"cut: the image is damaged or truncated"):
        load_image(image)


def test_a_closed_pil_image_is_a_user_error():
    image = Image.open(io.BytesIO(saved(two_halves(), "PNG")))
    image.close()
    with pytest.raises(UserError, match="the image: "):
        load_image(image)


def test_any_exception_of_a_decoder_is_a_user_error(monkeypatch):
    def fail(*_):
        raise AttributeError("'NoneType' object has no attribute 'seek'")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_end", fail)
    with pytest.raises(UserError, match=r"photo\.png: the image is damaged"):
        load_image(saved(two_halves(), "PNG"), "photo.png")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(depth: int, colour: int, row: bytes, *chunks: bytes, width: int = 3) -> bytes:
    """A PNG of one row."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


LARGE = bytes(3 << 20)


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(LARGE)),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LARGE)),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LARGE)),
        chunk(b"tEXt", b"Comment\0" + b"x" * len(LARGE)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LARGE)),
        chunk(b"iCCP", b"profile\0\0no zlib"),
    ],
    ids=["profile", "zTXt", "iTXt", "tEXt", "XMP", "damaged profile"],
)
def test_large_metadata_of_a_png_is_no_reason_to_refuse_it(metadata):
    loaded = load_image(png(8, 2, bytes([*RED, *GREEN, *RED]), metadata))
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [RED, GREEN, RED]


def big_endian(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(16, 0, big_endian(0, 128 * 257, 65535), chunk(b"tRNS", big_endian(0))), [255, 128, 255]),
        (png(16, 0, big_endian(0, 128 * 257, 65535), chunk(b"tRNS", big_endian(128 * 257))), [0, 255, 255]),
        (
            png(16, 2, big_endian(*[300] * 3, *[32896] * 3, *[65535] * 3), chunk(b"tRNS", big_endian(*[32896] * 3))),
            [1, 255, 255],
        ),
        (png(8, 0, b"\0\x80\xff", chunk(b"tRNS", big_endian(128))), [0, 255, 255]),
        (png(4, 0, b"\x07\xf0", chunk(b"tRNS", big_endian(7))), [0, 255, 255]),
        (png(2, 0, b"\x18", chunk(b"tRNS", big_endian(1))), [0, 255, 170]),
        (png(1, 0, b"\x40", chunk(b"tRNS", big_endian(0))), [255, 255, 255]),
        (png(16, 4, big_endian(0, 65535, 32896, 65535, 0, 0)), [0, 128, 255]),
    ],
)
def test_transparency_of_greys_of_all_depths(data, expected):
    assert np.array(load_image(data))[0].tolist() == [[value] * 3 for value in expected]


HEIC = b"\0\0\0\x24ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (HEIC, "HEIC photo"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "a video"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG drawing"),
        (b"\xef\xbb\xbf<svg/>", "SVG drawing"),
        (b"\n<!DOCTYPE html><html></html>", "HTML page"),
        (b"%PDF-1.7\n", "PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git-lfs pointer.*git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PostScript"),
        (b"\xff\x0a\x00\x00", "JPEG XL"),
        (b"8BPS\0\1", "Photoshop"),
        (b"PK\x03\x04abc", "archive"),
        (b"hello", "not an image that can be read"),
    ],
)
def test_files_that_are_no_images_are_named_for_what_they_are(tmp_path, content, complaint):
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(UserError, match=f"photo.jpg: .*{complaint}") as error:
        load_image(tmp_path / "photo.jpg")
    assert "BytesIO" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["EPS", "SPIDER", "TGA", "PCX", "MSP"])
def test_formats_beyond_the_list_are_never_opened(kind):
    data = saved(Image.new({"SPIDER": "F", "MSP": "1"}.get(kind, "RGB"), (8, 8)), kind)
    with pytest.raises(UserError, match="PostScript" if kind == "EPS" else "not an image that can be read"):
        load_image(data, "drawing")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("https://example.org/a.png", "https://example.org/a.png: URLs are not read"),
        (Path("https://example.org/a.png"), "https://example.org/a.png: URLs are not read"),
        ("s3://bucket/a.png", "s3://bucket/a.png: URLs are not read"),
        ("data:image/png;base64," + "A" * 9000, r"data:image/png;base64,AAAAAAAA\.\.\.: data URIs are not read"),
        ("a" * 5000, "a{150}...a{40}: cannot read the image .File name too long"),
        ("a\0b.png", r"a\\0b.png: cannot read the image .this is not a valid file name"),
        ("a\ud83d.png", r"a\\ud83d.png: cannot read the image"),
        ("/dev/zero", "/dev/zero: cannot read the image .it is a device or a pipe"),
    ],
)
def test_paths_that_are_no_files_are_named(source, complaint):
    with pytest.raises(UserError, match=f"^{complaint}") as error:
        load_image(source)
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png: cannot read the image"):
        load_image(tmp_path / "pipe.png")


@pytest.mark.parametrize("mode", ["La", "LA", "PA", "RGBa", "HSV", "YCbCr", "CMYK", "LAB", "1", "I;16", "I", "F"])
def test_pil_images_of_every_mode_become_rgb(mode):
    try:
        image = two_halves().convert({"La": "LA", "RGBa": "RGBA", "I;16": "I"}.get(mode, mode)).convert(mode)
    except ValueError:
        image = Image.new(mode, (6, 8))
    assert (load_image(image).mode, load_image(image).size) == ("RGB", (6, 8))


def test_a_mode_that_cannot_be_converted_is_named(monkeypatch):
    def fail(*_):
        raise ValueError("conversion not supported")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(UserError, match="the image: its colour mode CMYK cannot be converted to RGB"):
        load_image(Image.new("CMYK", (6, 8)))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_an_error(size):
    with pytest.raises(UserError, match="the image has no pixels"):
        load_image(Image.new("RGB", size))


def test_pixels_are_counted_before_decoding(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)

    def fail(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    for source in (saved(two_halves(), "PNG"), Image.open(io.BytesIO(saved(two_halves(), "PNG")))):
        with pytest.raises(UserError, match="too many pixels, at most 40"):
            load_image(source, max_pixels=40)
