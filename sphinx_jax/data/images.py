"""Images from files to what the encoders expect: RGB, square, normalised by CLIP's statistics."""

import base64
import binascii
import io
import math
import re
import stat
import struct
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image

from sphinx_jax.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CROP_AREA, CROP_RATIO = (0.9, 1.0), (0.75, 1.3333)
"""Fraction of the image's area, and width over height, of a random resized crop."""
ImageTransform = Literal["pad", "crop"]
"""How a training image becomes a square: padded, or cropped at random."""
PAD_COLOUR = tuple(int(mean * 255) for mean in CLIP_MEAN)
"""CLIP's mean colour: padding that is near zero once normalised."""

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are decoded. Others are never opened: Pillow runs other programs for some, as for EPS."""
MAX_PIXELS = 178_956_970
"""Larger images are refused before they are decoded: Pillow's own limit, 512 MiB as RGB."""
MAX_FILE_BYTES = 1 << 30

_LONGEST_SIDE = 8192
_SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}
_DATA_URL = re.compile(r"data:(?:image/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*);base64,", re.IGNORECASE)
_URL = re.compile(r"(https?|ftps?|s3|gs|hf|file):/+", re.IGNORECASE)
# EXIF's orientation -> the operation that turns the stored pixels upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")
_PNG_ORIENTATION = (b"XML:com.adobe.xmp\0\0", b"Raw profile type exif\0")
"""Beginnings of the text chunks that may hold an orientation."""


def load_image(
    source: str | Path | bytes | Image.Image, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The image at a path, of encoded bytes or of PIL, as 8-bit RGB, upright by its EXIF orientation.

    `name` is its name in messages. An image of more than `max_pixels` is refused before it is decoded. Raises UserError
    if it is missing, too large, truncated or no image that is read.
    """
    if isinstance(source, Image.Image):
        name = name or str(getattr(source, "filename", "")) or "the image"
        return _decode(source, name, max_pixels)
    if isinstance(source, bytes):
        data, name = source, name or "the image"
    else:
        name = name or printable(source)
        data = _read_file(source, name)
    try:
        image = Image.open(io.BytesIO(_without_png_metadata(data)), formats=FORMATS)
    # Pillow's parsers raise exceptions of many types on damaged files, and new ones with every format.
    except Image.DecompressionBombError as error:
        raise UserError(_too_many_pixels(name, max_pixels)) from error
    except Exception as error:
        raise UserError(f"{name}: {_what_it_is(data)}") from error
    return _decode(image, name, max_pixels)


def is_data_url(name: str) -> bool:
    """Whether an image's name holds the image itself."""
    return name[:5].lower() == "data:"


def data_url_bytes(url: str) -> bytes:
    """The bytes of a data: URL in base64. Line breaks and missing padding are mended, as many programs write them.

    Raises UserError if it is no such URL.
    """
    header = _DATA_URL.match(url)
    if header is None:
        raise UserError(f"the image {url[:30]!r}... is no data: URL in base64: write data:image/png;base64,...")
    content = "".join(url[header.end() :].split()).rstrip("=")
    try:
        return base64.b64decode(content + "=" * (-len(content) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"the image of the data: URL is not valid base64 ({error})") from error


def printable(path: str | Path) -> str:
    """A path for messages: on one line, valid Unicode, at most about 200 characters."""
    text = str(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    text = " ".join(text.splitlines())
    return text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}"


def _read_file(path: str | Path, name: str) -> bytes:
    """The bytes of a regular file. Raises UserError on URLs, and if it cannot be read or is not a regular file."""
    if url := _URL.match(str(path)):
        # Path() joins the two slashes of a URL.
        address = f"{url[1]}://{name[url.end() :]}"
        raise UserError(f"{address}: URLs are not read; download the image and give the path of the file")
    if str(path).lower().startswith("data:"):
        raise UserError(f"{name[:30]}...: data URIs are not read; save the image and give the path of the file")
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise UserError(f"{name}: cannot read the image (it is a device or a pipe); give a file")
        if status.st_size > MAX_FILE_BYTES:
            raise UserError(f"{name}: the file of {status.st_size / 2**30:.1f} GiB is too large for an image")
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot read the image ({error.strerror})") from error
    except ValueError as error:
        # A NUL, or half a surrogate pair.
        raise UserError(f"{name}: cannot read the image (this is not a valid file name)") from error


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise UserError(_too_many_pixels(name, max_pixels))
    if not image.width * image.height:
        raise UserError(f"{name}: the image has no pixels, its size is {image.width} x {image.height}")
    try:
        transparency = _transparent_colour(image)
        image.load()
    except Image.DecompressionBombError as error:
        raise UserError(_too_many_pixels(name, max_pixels)) from error
    except Exception as error:
        # Pillow's own texts name objects of Python; they stay in the traceback.
        raise UserError(f"{name}: the image is damaged or truncated; get it again") from error
    operation = _UPRIGHT.get(_orientation(image))
    try:
        rgb = _to_rgb(image, transparency)
    except Exception as error:
        raise UserError(f"{name}: its colour mode {image.mode} cannot be converted to RGB; save it as RGB") from error
    return rgb if operation is None else rgb.transpose(operation)


def _too_many_pixels(name: str, max_pixels: int) -> str:
    return f"{name}: the image has too many pixels, at most {max_pixels:,} are decoded; scale it down first"


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 if unknown. No other tag is used, so that a malformed one does no harm."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Malformed metadata, while the pixels are fine.
        return 1
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else 1


def _without_png_metadata(data: bytes) -> bytes:
    """A PNG without its colour profile and text, which Pillow limits to 1 MiB; any other file as it is."""
    if not data.startswith(_PNG_SIGNATURE):
        return data
    chunks, position = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        orients = length < 1 << 16 and data.startswith(_PNG_ORIENTATION, position + 8)
        if kind not in _PNG_METADATA or orients or end > len(data):
            chunks.append(data[position:end])
        position = end
    return b"".join([*chunks, data[position:]])


def _what_it_is(data: bytes) -> str:
    """What a file holds that is no image, with the remedy."""
    head = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    text = head.lower()
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    convert = "convert it to JPEG or PNG"
    if not data:
        return "the file is empty, not an image; get it again"
    if head.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the image itself; run git lfs pull"
    if text.startswith((b"<!doctype html", b"<html")) or b"<html" in text[:1024]:
        return "this is an HTML page, not an image; download the image itself"
    if b"<svg" in text:
        return f"this is an SVG drawing, not an image of pixels; {convert}"
    if head.startswith(b"%PDF"):
        return "this is a PDF document, not an image; export its page as JPEG or PNG"
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return f"this is PostScript (EPS), which is not read; {convert}"
    if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return f"this is a HEIC photo, which is not read; {convert}"
    if brand in (b"avif", b"avis"):
        return f"this is an AVIF image that cannot be decoded here; {convert}"
    if brand:
        return "this is a video, not an image; save one of its frames as JPEG or PNG"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return f"this is a JPEG XL image, which is not read; {convert}"
    if head.startswith(b"8BPS"):
        return f"this is a Photoshop document, which is not read; {convert}"
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")):
        return "this is an archive, not an image; unpack it first"
    return f"not an image that can be read, or damaged; readable are {', '.join(FORMATS)}"


def _transparent_colour(image: Image.Image) -> int | tuple[int, ...] | bytes | None:
    """The transparent colour of an image that is not loaded yet, in the units of its loaded pixels."""
    colour = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    raw_mode = tiles[0].args if tiles else None
    # PNG gives it in the file's bit depth, while Pillow scales grey to 8 bits and colour from 16 to 8.
    if isinstance(colour, int) and raw_mode in ("L;2", "L;4"):
        return colour * (85 if raw_mode == "L;2" else 17)
    if isinstance(colour, tuple) and raw_mode == "RGB;16B":
        return tuple(value >> 8 for value in colour)
    return colour


def _to_rgb(image: Image.Image, transparency: int | tuple[int, ...] | bytes | None) -> Image.Image:
    """8-bit RGB. What is transparent becomes white; 16-bit grey is scaled, not clipped."""
    if image.mode in _SIXTEEN_BIT:
        grey = np.asarray(image).astype(np.uint16)
        scaled = (grey // 257).astype(np.uint8)
        if isinstance(transparency, int):
            scaled[grey == transparency] = 255
        image = Image.fromarray(scaled)
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_grey_to_8_bit(np.nan_to_num(np.asarray(image, np.float64))))
    elif image.mode == "La":
        image = image.convert("LA")
    elif transparency is not None:
        image = image.copy()
        image.info["transparency"] = transparency
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        image = Image.alpha_composite(white, coloured)
    return image.convert("RGB")


def _grey_to_8_bit(grey: Float[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width"]:
    """32-bit grey has no defined white: the smallest of 1, 255 and 65535 that no value exceeds is taken."""
    brightest = grey.max(initial=0.0)
    white = next((white for white in (1.0, 255.0) if brightest <= white), 65535.0)
    return (grey / white * 255).clip(0, 255).astype(np.uint8)


def padded_resize(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole RGB image padded to a square with CLIP's mean colour, scaled to `size` (bicubic, antialiased)."""
    if max(image.size) > _LONGEST_SIDE:
        # The square around a long strip could exceed memory.
        image = image.reduce(math.ceil(max(image.size) / _LONGEST_SIDE))
    width, height = image.size
    side = max(width, height)
    if width != height:
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image)


def random_resized_crop(image: Image.Image, size: int, random: np.random.Generator) -> UInt8[np.ndarray, "size size 3"]:
    """A random crop of an RGB image, scaled to a square of `size` (bicubic, antialiased), as the original trains.

    The crop has 90 to 100 % of the image's area, an aspect ratio from 3:4 to 4:3, and any position. If ten draws do not
    fit, it is the largest centred crop within these ratios (Inception's augmentation, https://arxiv.org/abs/1409.4842,
    with the original's numbers).
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*CROP_AREA)
        ratio = math.exp(random.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            break
    else:
        least, most = CROP_RATIO
        w, h = min(width, round(height * most)), min(height, round(width / least))
        left, top = (width - w) // 2, (height - h) // 2
    # Cropped first: resize() with a box would filter across its edges.
    cropped = image.crop((left, top, left + w, top + h))
    return np.array(cropped.resize((size, size), Image.Resampling.BICUBIC))


def normalise(pixels: UInt8[np.ndarray, "*batch height width 3"]) -> Float[np.ndarray, "*batch height width 3"]:
    """Pixels 0 to 255 to float32, normalised by CLIP's mean and standard deviation."""
    mean, std = np.asarray(CLIP_MEAN, np.float32), np.asarray(CLIP_STD, np.float32)
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std
