"""Pictures from files to what the encoders expect: RGB, square, normalised by CLIP's statistics."""

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from sphinx_jax.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CROP_AREA, CROP_RATIO = (0.9, 1.0), (0.75, 1.3333)
"""Share of the picture's area, and width over height, of a random resized crop."""
ImageTransform = Literal["pad", "crop"]
"""How a training picture becomes a square: padded, or cropped at random."""
PAD_COLOUR = tuple(int(mean * 255) for mean in CLIP_MEAN)
"""CLIP's mean colour: padding that is near zero once normalised."""

_SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}
_LONGEST_SIDE = 8192
# All of these have come out of Pillow's decoders on damaged files.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError),
    *(struct.error, zlib.error),
)


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """The picture at a path, or in `source` bytes, as upright 8-bit RGB; `name` is what an error calls it.

    Raises UserError if it is missing, cannot be read, is cut short, or is no picture.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot read the image ({error.strerror})") from error
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: the image has too many pixels; scale it down first") from error
    except _DECODER_ERRORS as error:
        raise UserError(f"{name}: not a picture that can be read, or damaged ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. What is transparent becomes white; 16-bit grey is scaled down, not cut off."""
    if image.mode in _SIXTEEN_BIT:
        image = Image.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_grey_to_8_bit(np.nan_to_num(np.asarray(image, np.float64))))
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bit(grey: Float[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width"]:
    """32-bit grey says nowhere what its white is: taken to be 1, 255 or 65535, the least that holds all values."""
    brightest = grey.max(initial=0.0)
    white = next((white for white in (1.0, 255.0) if brightest <= white), 65535.0)
    return (grey / white * 255).clip(0, 255).astype(np.uint8)


def padded_resize(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole RGB picture on a square of CLIP's mean colour, scaled to `size` (bicubic, antialiased)."""
    if max(image.size) > _LONGEST_SIDE:
        # The square of a long strip could take more memory than there is.
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
    """A part of an RGB picture scaled to a square of `size` (bicubic, antialiased), as the original trains with it.

    The part has 90 to 100 % of the picture's area, is between 3:4 and 4:3, and lies anywhere; where no such part
    fits in ten tries, it is the largest in the middle that is not narrower or wider (Inception's augmentation,
    https://arxiv.org/abs/1409.4842, with the original's numbers).
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*CROP_AREA)
        ratio = math.exp(random.uniform(*map(math.log, CROP_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            break
    else:
        least, most = CROP_RATIO
        w, h = min(width, round(height * most)), min(height, round(width / least))
        left, top = (width - w) // 2, (height - h) // 2
    # Cut out first: given a box, Pillow's filter would reach over its edges.
    part = image.crop((left, top, left + w, top + h))
    return np.array(part.resize((size, size), Image.Resampling.BICUBIC))


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The middle of an RGB picture, its shorter side scaled to `size` (bicubic, antialiased).

    Raises UserError if one side is more than 100 times the other.
    """
    width, height = image.size
    short, long = sorted(image.size)
    if long > 100 * short:
        raise UserError(f"a picture of {width} x {height} pixels is too narrow to crop; use padded resize")
    scaled = int(size * long / short)
    new = (size, scaled) if width <= height else (scaled, size)
    if new != image.size:
        image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


def normalise(pixels: UInt8[np.ndarray, "*batch height width 3"]) -> Float[np.ndarray, "*batch height width 3"]:
    """Pixels 0 to 255 to float32 with CLIP's mean and deviation taken out."""
    mean, std = np.asarray(CLIP_MEAN, np.float32), np.asarray(CLIP_STD, np.float32)
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std
