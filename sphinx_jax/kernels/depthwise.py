"""Depthwise convolution: each channel with its own small kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import sharding

Images = Float[Array, "batch height width channels"]


@jax.custom_vjp
def depthwise_conv(x: Images, w: Float[Array, "k k channels"]) -> Images:
    """y[b, i, j, c] = sum over u, v of w[u, v, c] x[b, i + u - k // 2, j + v - k // 2, c], zeros outside; k is odd.

    Written as k x k shifted copies, each times its weight. XLA:CPU runs that, with its gradient, 8 to 14 times
    (k = 3) or 2 to 4 times (k = 7) as fast as its own grouped convolution. Elsewhere the rows of the kernel are
    the steps of a loop: a sum of 49 copies that a norm follows, whole on one GPU, takes XLA many minutes to compile.
    """
    if sharding.platform() == "cpu":
        return sum(copy * w[u, v] for (u, v), copy in _shifted(x, w.shape[0]))
    (k, _, _), (height, width) = w.shape, x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))

    def add_row(u, y):
        rows, weights = jax.lax.dynamic_slice_in_dim(padded, u, height, 1), w[u].astype(jnp.float32)
        return y + sum(rows[:, :, v : v + width].astype(jnp.float32) * weights[v] for v in range(k))

    return jax.lax.fori_loop(0, k, add_row, jnp.zeros_like(x, jnp.float32)).astype(x.dtype)


def _shifted(x: Images, k: int) -> list[tuple[tuple[int, int], Images]]:
    """The picture seen from each place (u, v) of the kernel."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    return [((u, v), padded[:, u : u + height, v : v + width]) for u in range(k) for v in range(k)]


def _forward(x, w):
    return depthwise_conv(x, w), (x, w)


def _backward(residuals, dy):
    x, w = residuals
    dx = depthwise_conv(dy, w[::-1, ::-1])
    # The GPU compiler makes a kernel of each shifted copy and keeps them all; the library's does neither.
    dw = jax.lax.platform_dependent(x, dy, w, cpu=_weight_gradient_shifted, default=_weight_gradient_grouped)
    return dx, dw


def _weight_gradient_shifted(x: Images, dy: Images, w: Float[Array, "k k channels"]) -> Float[Array, "k k channels"]:
    """dw[u, v, c] = sum over b, i, j of dy[b, i, j, c] times x seen from (u, v)."""
    sums = [jnp.sum(copy * dy, axis=(0, 1, 2), dtype=jnp.float32) for _, copy in _shifted(x, w.shape[0])]
    return jnp.stack(sums).reshape(w.shape).astype(w.dtype)


def _weight_gradient_grouped(x: Images, dy: Images, w: Float[Array, "k k channels"]) -> Float[Array, "k k channels"]:
    """The same by XLA's grouped convolution."""

    def grouped(w):
        layout, channels = ("NHWC", "HWIO", "NHWC"), x.shape[-1]
        return jax.lax.conv_general_dilated(
            x, w[:, :, None], (1, 1), "SAME", dimension_numbers=layout, feature_group_count=channels
        )

    return jax.vjp(grouped, w)[1](dy)[0]


depthwise_conv.defvjp(_forward, _backward)
