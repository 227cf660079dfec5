"""Adam's two moments, stored in 8, 4 or 2 bytes per parameter. Every kind computes the step in float32."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Moments = Literal["float32", "bfloat16", "factored"]

MOMENTS: dict[Moments, str] = {
    "float32": "both moments in float32",
    "bfloat16": "both moments rounded to bfloat16 after every step",
    "factored": "first moment in bfloat16, second factored into row and column means (Adafactor)",
}
"""Description of each kind, for logs and plans."""


def scale_by_moments(moments: Moments, b1: float, b2: float) -> optax.GradientTransformation:
    """Adam's update direction (https://arxiv.org/abs/1412.6980), its two moments stored as `moments`."""
    if moments == "factored":
        return factored_moments(b1, b2)
    adam = optax.scale_by_adam(b1=b1, b2=b2)
    return adam if moments == "float32" else cast_state(adam, jnp.bfloat16)


def cast_state(inner: optax.GradientTransformation, dtype: jax.typing.DTypeLike) -> optax.GradientTransformation:
    """`inner`, with its state cast to `dtype` between steps and to float32 within them.

    A running mean with decay b moves by (1 - b) of its distance to the new value. In bfloat16, whose significand has 8
    bits, an update below 1/512 of the mean rounds to nothing: with b = 0.95 the mean stalls within 4 % of its limit.
    With b = 0.999 it would stall far from it, so `b2` must not be raised with this.
    """

    def cast(state: Any, to: jax.typing.DTypeLike) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def factored_moments(b1: float, b2: float) -> optax.GradientTransformation:
    """Adafactor's second moment (https://arxiv.org/abs/1804.04235), then a bfloat16 mean of the scaled gradients.

    For an array whose two largest dimensions have 128 or more elements, only the means of g^2 along each of them are
    stored; the second moment is their outer product divided by their mean. The decay is Adam's with bias correction:
    step t has weight (1 - b2) / (1 - b2^t) (section 7.1 there).
    """

    def decay(step: Any, b2: Any) -> Any:
        return b2 * (1 - b2**step) / (1 - b2 ** (step + 1))

    scale = optax.scale_by_factored_rms(decay_rate=b2, decay_rate_fn=decay)
    return optax.chain(scale, cast_state(optax.ema(b1, debias=True), jnp.bfloat16))
