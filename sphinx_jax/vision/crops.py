"""From the one normalised picture to each encoder's input: sizes, views, and places where precision is half.

The published weights were trained on inputs that passed through half precision, so the same roundings
are made here, whatever dtype the encoders then compute in.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sphinx_jax.config import VisionConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Images = Float[Array, "batch height width channels"]


def encoder_inputs(images: Float[Array, "batch size size 3"], config: VisionConfig) -> dict[str, Images]:
    """What each encoder of the config looks at, by its name: [batch x views, its size, its size, 3], float32.

    `images` are normalised with CLIP's statistics. The views of one picture follow one another: the whole,
    then, if there are five, top left, top right, bottom left, bottom right.
    """
    inputs = {}
    if config.clip is not None:
        inputs["clip"] = _resized_views(images, config.clip.image_size, config.num_crops)
    if config.convnext is not None:
        inputs["convnext"] = _original_views(images, config.convnext.image_size, config.num_crops)
    if config.dino is not None:
        inputs["dino"] = _imagenet_normalised(_resized_views(images, config.dino.image_size, config.num_crops))
    if config.qformer is not None:
        inputs["qformer"] = _resized_views(images, config.qformer.image_size, config.num_crops)
    return inputs


def _resized_views(images: Images, size: int, num_crops: int) -> Images:
    """The vision transformers' input: all views cut from a resized picture."""
    half = to_half(images)
    whole = to_half(resize(half, size))
    return whole if num_crops == 1 else _with_quarters(whole, to_half(resize(half, 2 * size)))


def _original_views(images: Images, size: int, num_crops: int) -> Images:
    """ConvNeXt's input: the quarters are the picture's own pixels, and are not rounded."""
    whole = to_half(resize(to_half(images), size))
    return whole if num_crops == 1 else _with_quarters(whole, resize(images, 2 * size))


def _with_quarters(whole: Images, large: Images) -> Images:
    """Five views a picture: the whole, and the quarters of the same picture at twice the size."""
    size = whole.shape[1]
    quarters = [large[:, y : y + size, x : x + size] for y in (0, size) for x in (0, size)]
    return jnp.stack([whole, *quarters], axis=1).reshape(-1, *whole.shape[1:])


def _imagenet_normalised(images: Images) -> Images:
    """Pictures normalised with CLIP's statistics, normalised with ImageNet's instead."""
    clip_mean, clip_std, mean, std = map(np.float32, (CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD))
    return (images * clip_std + clip_mean - mean) / std


def to_half(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounded to the nearest half-precision number; the dtype stays float32."""
    # A pair of casts would be removed by XLA as excess precision, and reduce_precision makes zeros of
    # subnormal numbers (below 2^-14, in steps of 2^-24).
    normal = jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
    return jnp.where(jnp.abs(x) < 2.0**-14, jnp.round(x * 2.0**24) * 2.0**-24, normal)


def resize(images: Images, size: int, scale: float | None = None) -> Images:
    """Bicubic resize of square pictures to size x size, as PyTorch's `interpolate` does it.

    Equal to the last bit to PyTorch's on a CPU, where both were compared and this was compiled. Cubic
    convolution (Keys 1981) with a = -0.75, no antialiasing, samples at pixel centres, edge samples repeated.
    `scale` is new samples per old one where that is not size / old size. Pictures that have the size already
    come back unchanged.
    """
    old = images.shape[1]
    if old == size:
        return images
    taps, weights = _bicubic_taps(old, size, old / size if scale is None else 1 / scale)

    def along(axis: int, x: Images) -> Images:
        products = [jnp.take(x, taps[i], axis=axis) * jnp.expand_dims(weights[i], (0, 3 - axis, 3)) for i in range(4)]
        return products[0] + products[1] + products[2] + products[3]

    # The barrier keeps the two passes apart: rows are rounded before columns are added up.
    return along(1, jax.lax.optimization_barrier(along(2, images)))


@functools.lru_cache
def _bicubic_taps(old: int, new: int, step: float) -> tuple[Int[np.ndarray, "4 new"], Float[np.ndarray, "4 new"]]:
    """The four old samples that each new one reads, and their weights.

    PyTorch works in single precision throughout, and places are off by up to 1e-5 in it: enough to turn
    the rounding to half of one pixel in a hundred. So each operation here is rounded as it is there,
    products and sums that its compiler fuses being rounded once.
    """
    single = np.float32
    place = ((np.arange(new) + 0.5) * np.float64(single(step)) - 0.5).astype(single)
    first = np.floor(place) - 1
    t = place - np.floor(place)
    a = single(-0.75)

    def near(x):
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x):
        return ((a * x - 5 * a).astype(np.float64) * x + 8 * a).astype(single) * x - 4 * a

    taps = np.clip(np.stack([first + i for i in range(4)]), 0, old - 1).astype(np.int32)
    return taps, np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)])
