"""From the normalised image to the input of each encoder: crops, resizing and half-precision rounding.

The published weights were trained on inputs that passed through half precision, so the inputs are rounded in the same
steps here, whatever dtype the encoders compute in.
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


def encoder_inputs(
    images: Float[Array, "batch size size 3"], config: VisionConfig
) -> dict[str, Float[Array, "crops _ _ 3"]]:
    """The input of each encoder in the config, by its name: [batch x crops, size, size, 3], float32, in its own size.

    `images` are normalised with CLIP's statistics. The crops of one image are consecutive: the full image, then, if
    there are five, top left, top right, bottom left, bottom right.
    """
    inputs = {}
    if config.clip is not None:
        inputs["clip"] = _resized_crops(images, config.clip.image_size, config.num_crops)
    if config.convnext is not None:
        inputs["convnext"] = _original_crops(images, config.convnext.image_size, config.num_crops)
    if config.dino is not None:
        inputs["dino"] = _imagenet_normalised(_resized_crops(images, config.dino.image_size, config.num_crops))
    if config.qformer is not None:
        inputs["qformer"] = _resized_crops(images, config.qformer.image_size, config.num_crops)
    return inputs


def _resized_crops(
    images: Float[Array, "batch old old 3"], size: int, num_crops: int
) -> Float[Array, "crops {size} {size} 3"]:
    """The vision transformers' input: every crop comes from a resized and rounded image."""
    half = to_half(images)
    full = to_half(resize(half, size))
    return full if num_crops == 1 else _with_quarters(full, to_half(resize(half, 2 * size)))


def _original_crops(
    images: Float[Array, "batch old old 3"], size: int, num_crops: int
) -> Float[Array, "crops {size} {size} 3"]:
    """ConvNeXt's input: the quarters are the image's original pixels, and are not rounded."""
    full = to_half(resize(to_half(images), size))
    return full if num_crops == 1 else _with_quarters(full, resize(images, 2 * size))


def _with_quarters(
    full: Float[Array, "batch size size 3"], double: Float[Array, "batch 2*size 2*size 3"]
) -> Float[Array, "5*batch size size 3"]:
    """Five crops per image: the full image, and the quarters of the same image at twice the size."""
    size = full.shape[1]
    quarters = [double[:, y : y + size, x : x + size] for y in (0, size) for x in (0, size)]
    return jnp.stack([full, *quarters], axis=1).reshape(-1, *full.shape[1:])


def _imagenet_normalised(images: Float[Array, "batch size size 3"]) -> Float[Array, "batch size size 3"]:
    """Images normalised with ImageNet's statistics, from images normalised with CLIP's."""
    clip_mean, clip_std, mean, std = np.array((CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD), np.float32)
    return (images * clip_std + clip_mean - mean) / std


def to_half(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` rounded to the nearest half-precision number; the dtype stays float32."""
    # XLA would remove a pair of casts as excess precision, and reduce_precision flushes subnormal numbers (below 2^-14,
    # in steps of 2^-24) to zero.
    normal = jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
    return jnp.where(jnp.abs(x) < 2.0**-14, jnp.round(x * 2.0**24) * 2.0**-24, normal)


def resize(
    images: Float[Array, "batch old old channels"], size: int, scale: float | None = None
) -> Float[Array, "batch {size} {size} channels"]:
    """Bicubic resize of square images to size x size, as by PyTorch's `interpolate`.

    Cubic convolution (Keys 1981) with a = -0.75, no antialiasing, samples at pixel centres, edge samples repeated; when
    compiled for a CPU it is bit-identical to PyTorch's. `scale` is the number of new samples per old one if that is not
    size / old size. Images that have the size already are returned unchanged.
    """
    old = images.shape[1]
    if old == size:
        return images
    taps, weights = _bicubic_taps(old, size, old / size if scale is None else 1 / scale)

    def along(
        axis: int, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch new_height new_width channels"]:
        products = [jnp.take(x, taps[i], axis=axis) * jnp.expand_dims(weights[i], (0, 3 - axis, 3)) for i in range(4)]
        return products[0] + products[1] + products[2] + products[3]

    # The barrier separates the two passes: each row's result is rounded before the columns are summed.
    return along(1, jax.lax.optimization_barrier(along(2, images)))


@functools.lru_cache
def _bicubic_taps(old: int, new: int, step: float) -> tuple[Int[np.ndarray, "4 new"], Float[np.ndarray, "4 new"]]:
    """The indices of the four old samples of each new one, and their weights.

    PyTorch computes them in single precision, in which sample positions are off by up to 1e-5: enough to change the
    rounding to half of one pixel in a hundred. So each operation is rounded as in PyTorch, where a product and a sum
    that its compiler fuses are rounded once.
    """
    single = np.float32
    position = ((np.arange(new) + 0.5) * np.float64(single(step)) - 0.5).astype(single)
    first = np.floor(position) - 1
    t = position - np.floor(position)
    a = single(-0.75)

    def near(x: np.ndarray) -> np.ndarray:
        """The kernel at distances 0 to 1."""
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        """The kernel at distances 1 to 2."""
        return ((a * x - 5 * a).astype(np.float64) * x + 8 * a).astype(single) * x - 4 * a

    taps = np.clip(np.stack([first + i for i in range(4)]), 0, old - 1).astype(np.int32)
    return taps, np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)])
