"""Depthwise convolution: every channel has its own k x k filter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Images = Float[Array, "batch height width channels"]
Filters = Float[Array, "k k channels"]


@jax.custom_vjp
def depthwise_conv(x: Images, w: Filters) -> Images:
    """y[b, i, j, c] = sum over u, v of w[u, v, c] x[b, i + u - k // 2, j + v - k // 2, c], zeros outside; k is odd.

    A loop over the filter's rows, whose body adds k shifted copies of the image, each times its weight. XLA:CPU runs it
    several times as fast as its own grouped convolution. Unrolled for k = 3 alone: XLA computes a sum of 49 copies once
    for each of its uses by a norm, and takes many minutes to compile it for one GPU.
    """
    (k, _, _), (height, width) = w.shape, x.shape[1:3]
    padded = _pad(x, k)

    def add_row(u, y):
        rows, weights = jax.lax.dynamic_slice_in_dim(padded, u, height, 1), w[u].astype(jnp.float32)
        return y + sum(rows[:, :, v : v + width].astype(jnp.float32) * weights[v] for v in range(k))

    return jax.lax.fori_loop(0, k, add_row, jnp.zeros_like(x, jnp.float32), unroll=k <= 3).astype(x.dtype)


def _pad(x: Images, k: int) -> Float[Array, "batch padded_height padded_width channels"]:
    """Zero padding on all four sides, so that a k x k filter keeps the size."""
    return jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))


def _shifted_views(x: Images, k: int) -> list[tuple[tuple[int, int], Images]]:
    """One slice of the padded image, of the size of `x`, per offset (u, v) of the filter."""
    height, width = x.shape[1:3]
    padded = _pad(x, k)
    return [((u, v), padded[:, u : u + height, v : v + width]) for u in range(k) for v in range(k)]


def _forward(x: Images, w: Filters) -> tuple[Images, tuple[Images, Filters]]:
    return depthwise_conv(x, w), (x, w)


def _backward(residuals: tuple[Images, Filters], dy: Images) -> tuple[Images, Filters]:
    x, w = residuals
    # The gradient with respect to x is a convolution with the flipped filter.
    dx = depthwise_conv(dy, w[::-1, ::-1])
    # XLA:GPU compiles one kernel per shifted copy and stores all copies; cuDNN's grouped convolution does neither.
    dw = jax.lax.platform_dependent(x, dy, w, cpu=_dw_from_views, default=_dw_from_grouped_conv)
    return dx, dw


def _dw_from_views(x: Images, dy: Images, w: Filters) -> Filters:
    """dw[u, v, c] = sum over b, i, j of dy[b, i, j, c] times the view of x at (u, v)."""
    sums = [jnp.sum(view * dy, axis=(0, 1, 2), dtype=jnp.float32) for _, view in _shifted_views(x, w.shape[0])]
    return jnp.stack(sums).reshape(w.shape).astype(w.dtype)


def _dw_from_grouped_conv(x: Images, dy: Images, w: Filters) -> Filters:
    """The same from the gradient of XLA's grouped convolution."""

    def grouped_conv(w):
        layout, channels = ("NHWC", "HWIO", "NHWC"), x.shape[-1]
        return jax.lax.conv_general_dilated(
            x, w[:, :, None], (1, 1), "SAME", dimension_numbers=layout, feature_group_count=channels
        )

    return jax.vjp(grouped_conv, w)[1](dy)[0]


depthwise_conv.defvjp(_forward, _backward)
