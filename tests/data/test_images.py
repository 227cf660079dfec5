"""Pictures against the original's transforms, and files of every kind."""

import io

import numpy as np
import pytest
from PIL import Image

from sphinx_jax.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    center_crop,
    normalise,
    open_image,
    padded_resize,
    random_resized_crop,
    to_rgb,
)
from sphinx_jax.errors import UserError

RED, GREEN = (255, 0, 0), (0, 255, 0)


@pytest.mark.parametrize("size", [48, 224])
@pytest.mark.parametrize(
    ("number", "name", "transform"),
    [
        *((number, "padded_resize", padded_resize) for number in range(5)),
        # Picture 3 has 9 x 1 pixels, and no stored crop.
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
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 64), pixels)


def test_a_long_strip_needs_no_huge_square():
    assert padded_resize(Image.new("RGB", (80_000, 3)), 32).shape == (32, 32, 3)
    with pytest.raises(UserError, match="80000 x 3 pixels"):
        center_crop(Image.new("RGB", (80_000, 3)), 32)


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
def test_orientation_is_obeyed(orientation):
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
    np.testing.assert_array_equal(np.array(open_image(saved(stored, "PNG", exif=exif))), np.array(scene))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("TIFF", "CMYK"), *((kind, mode) for kind in ("PNG", "TIFF", "GIF") for mode in ("RGB", "P", "RGBA"))],
)
def test_colour_modes_become_rgb(kind, mode):
    image = open_image(saved(two_halves(mode), kind))
    assert image.mode == "RGB"
    assert image.getpixel((2, 1)) == RED and image.getpixel((2, 6)) == GREEN


def test_greys_of_all_depths():
    # Black, middle grey and white, in each depth's own units.
    def grey(values, dtype):
        return Image.fromarray(np.array([values], dtype))

    for image in (
        open_image(saved(grey([0, 128, 255], np.uint8), "PNG")),
        open_image(saved(grey([0, 128 * 257, 65535], np.uint16), "PNG")),
        open_image(saved(grey([0, 128 * 257, 65535], np.uint16), "TIFF")),
        open_image(saved(grey([0, 128 * 257, 65535], np.int32), "TIFF")),
        open_image(saved(grey([0, 128, 255], np.float32), "TIFF")),
        to_rgb(grey([0, 128 / 255, 1], np.float32)),
        open_image(saved(grey([0, 128, 255], np.uint8).convert("LA"), "PNG")),
    ):
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.array(image)[0], [[v] * 3 for v in (0, 128, 255)])
    bits = open_image(saved(grey([0, 255], np.uint8).convert("1"), "PNG"))
    np.testing.assert_array_equal(np.array(bits)[0], [[0] * 3, [255] * 3])
    dark = open_image(saved(grey([0, 200], np.uint16), "PNG"))
    assert np.array(dark).max() == 0, "a dark 16-bit picture is dark, not 8-bit"


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    np.testing.assert_array_equal(np.array(open_image(saved(image, "PNG")))[0], [[255] * 3, [10, 20, 30]])
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(
        np.array(open_image(saved(palette, "PNG", transparency=0)))[0], [[255] * 3, list(GREEN)]
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_a_truncated_file_is_named(tmp_path, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    data = saved(noise, kind)
    for share in (0.1, 0.5, 0.95):
        path = tmp_path / "cut.png"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError, match=r"cut.png: not a picture"):
            open_image(path)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_one_kind_of_error(tmp_path):
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    refused = 0
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "DDS", "SGI"):
        data = np.frombuffer(saved(noise, kind), np.uint8)
        for _ in range(60):
            broken = data.copy()
            where = random.integers(0, min(len(data), 120), 5)
            broken[where] = random.integers(0, 256, 5)
            try:
                open_image(broken.tobytes(), "broken")
            except UserError as error:
                assert str(error).startswith("broken: ")
                refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"", "not a picture"), (b"GIF89a", "not a picture"), (None, "read")]
)
def test_what_is_no_picture_is_named(tmp_path, content, complaint):
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"photo.jpg: .*{complaint}"):
        open_image(path)


def test_a_directory_is_no_picture(tmp_path):
    with pytest.raises(UserError, match="cannot read the image"):
        open_image(tmp_path)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match="too many pixels"):
        open_image(saved(two_halves(), "PNG"))


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
    share = w * h / (width * height)
    assert share.min() > 0.885 and share.max() < 1.005 and abs(share.mean() - 0.95) < 0.02
    assert (w / h).min() > 0.74 and (w / h).max() < 1.35
    for start, length, side in ((left, w, width), (top, h, height)):
        assert start.min() > -0.6 and (start + length).max() < side + 0.6 and start.std() > 2


@pytest.mark.parametrize(("shape", "box"), [((400, 30), (180, 40, 0, 30)), ((30, 400), (0, 30, 180, 40))])
def test_a_crop_of_a_strip_is_its_middle(shape, box):
    """No crop between 3:4 and 4:3 has 90 % of it: the largest such part in the middle."""
    width, height = shape
    left, w, top, h = box
    picture = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    middle = Image.fromarray(picture[top : top + h, left : left + w]).resize((16, 16), Image.Resampling.BICUBIC)
    got = random_resized_crop(Image.fromarray(picture), 16, np.random.default_rng(0))
    np.testing.assert_array_equal(got, np.array(middle))
