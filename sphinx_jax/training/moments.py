"""Adam's two moments in less memory than two float32 numbers a parameter: what is kept of them between steps.

Each form computes a step in float32 and differs in what it remembers. `state.abstract_state` lays all of it out on a
mesh as the parameters are.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int8, UInt8

Moments = Literal["float32", "bfloat16", "factored", "int8"]

MOMENTS: dict[Moments, str] = {
    "float32": "two moments in float32",
    "bfloat16": "two moments rounded to bfloat16 after every step",
    "factored": "the first moment in bfloat16, of the second the means of rows and columns (Adafactor)",
    "int8": "two moments in 8 bits, scaled by blocks of up to 64",
}
"""What a person is told of each."""


def scale_by_moments(moments: Moments, b1: float, b2: float) -> optax.GradientTransformation:
    """Adam's direction (https://arxiv.org/abs/1412.6980), its two moments kept as `moments` says."""
    if moments == "factored":
        return factored_moments(b1, b2)
    if moments == "int8":
        return blockwise_moments(b1, b2)
    adam = optax.scale_by_adam(b1=b1, b2=b2)
    return adam if moments == "float32" else narrow_state(adam, jnp.dtype(moments))


def narrow_state(inner: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """`inner`, computing as before, its state kept in `dtype` between steps.

    A running mean with decay b moves by (1 - b) of its distance to the new value. Rounded to bfloat16, 8 bits,
    it stands still once that is less than 1/512 of it: with b = 0.95, within 4 % of where it would settle. With
    b = 0.999 it would never arrive, so do not raise `b2` with this.
    """

    def cast(state: object, to: jnp.dtype) -> object:
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        return jax.tree.map(lambda x: x.astype(to) if is_float(x) else x, state)

    def update(grads, state, params=None):
        updates, state = inner.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def factored_moments(b1: float, b2: float) -> optax.GradientTransformation:
    """Adafactor's second moment (https://arxiv.org/abs/1804.04235), then a running mean in bfloat16 of what it scales.

    Of an array whose two largest dimensions have 128 or more elements, only the means of g^2 along either are kept;
    their outer product over their mean stands for the second moment. Its decay is Adam's with the bias corrected,
    (1 - b2) / (1 - b2^t) of the new value at step t (section 7.1 there).
    """
    decay = lambda step, b2: b2 * (1 - b2**step) / (1 - b2 ** (step + 1))
    scale = optax.scale_by_factored_rms(decay_rate=b2, decay_rate_fn=decay)
    return optax.chain(scale, narrow_state(optax.ema(b1, debias=True), jnp.dtype("bfloat16")))


BLOCK = 64
"""Most elements of one scale: 1/16 of a byte each. Small, so that a mesh cuts few arrays within a block."""

SMALL = 4096
"""Parameters of fewer elements keep float32 moments, as in the paper: they are few, and norms and biases are touchy."""


class Blocked(NamedTuple):
    """An array in 8 bits: the code of each element, and the largest magnitude of each block along one dimension."""

    code: Int8[Array, "..."] | UInt8[Array, "..."]
    largest: Float[Array, "..."]


class BlockwiseState(NamedTuple):
    """Step, and the two moments: `Blocked`, or float32 where a parameter is small."""

    count: Array
    first: Any
    second: Any


def blocks_of(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(dimension, length) of the blocks of a parameter, or None where it is small or has no fitting dimension.

    The dimension with the most factors of two is the one that a mesh is the least likely to cut within a block. The
    choice does not depend on the mesh, so that a run goes on with the same state on another.
    """
    powers = [size & -size for size in shape]
    if math.prod(shape) < SMALL or max(powers) < BLOCK // 4:
        return None
    return powers.index(max(powers)), min(max(powers), BLOCK)


def _shares(bits: int) -> np.ndarray:
    """What codes 0, 1, 2, ... stand for: fractions of `bits` bits at most."""
    shares = np.zeros(256, np.float32)
    for power in range(7):
        steps = 2 ** (bits - power)
        edges = np.linspace(0.1, 1, steps + 1) * 10.0**-power
        shares[steps : 2 * steps] = (edges[:-1] + edges[1:]) / 2
    shares[2 ** (bits + 1) - 1] = 1
    return shares


_SHARES = {"uint8": _shares(7), "int8": _shares(6) - np.roll(_shares(6)[::-1], 1)}


def largest_of_blocks(x: Float[Array, "..."], dim: int, block: int) -> Float[Array, "..."]:
    """The largest magnitude of each block."""
    return jnp.max(jnp.abs(x.reshape(*x.shape[:dim], -1, block, *x.shape[dim + 1 :])), axis=dim + 1)


def encode(x: Float[Array, "..."], largest: Float[Array, "..."], dim: int, block: int, signed: bool) -> Blocked:
    """Eight bits an element, in the dynamic data type of https://arxiv.org/abs/2110.02861 (section 1.3).

    Of its share of the block's largest, the magnitude is a power of ten from 1 to 1e-6 and a fraction from 0.1 to 1,
    which has 6 bits (7 without a sign) beside the first power and one less beside each further one. The code is the
    fraction's bits behind a 1 that tells the power by its place. By arithmetic, which a compiler fuses: a search in
    the table of values is written to memory, with 4 bytes an element.
    """
    blocked = x.reshape(*x.shape[:dim], -1, block, *x.shape[dim + 1 :])
    share = jnp.abs(blocked) * jnp.expand_dims(1 / jnp.where(largest > 0, largest, 1), dim + 1)
    power = jnp.clip(jnp.floor(-jnp.log10(jnp.maximum(share, 1e-7))), 0, 6)
    steps = jnp.exp2((6 if signed else 7) - power)
    code = steps + jnp.clip(jnp.floor((share * 10**power - 0.1) / 0.9 * steps), 0, steps - 1)
    if signed:
        code = jnp.where(share < 1e-7, 0, jnp.sign(blocked) * code)
    return Blocked(code.astype(jnp.int8 if signed else jnp.uint8).reshape(x.shape), largest)


def decode(x: Blocked, dim: int, block: int) -> Float[Array, "..."]:
    """Inverse of `encode` but for the rounding: the middle of what has a code, and 1 for what has the highest."""
    shape = x.code.shape
    code = x.code.reshape(*shape[:dim], -1, block, *shape[dim + 1 :])
    share = jnp.asarray(_SHARES[code.dtype.name]).at[code.astype(jnp.int32) & 255].get(mode="promise_in_bounds")
    return (share * jnp.expand_dims(x.largest, dim + 1)).reshape(shape)


def blockwise_moments(b1: float, b2: float, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam with moments in 8 bits by blocks (https://arxiv.org/abs/2110.02861), steps computed in float32.

    Not as there, the second moment has no code for zero: its square root is a divisor, and a small one rounded to
    zero would make a step of the whole first moment over `eps`, as soon as a gradient is zero.
    """

    def empty(param, signed):
        zeros = jnp.zeros_like(param, jnp.float32)
        blocks = blocks_of(param.shape)
        return encode(zeros, largest_of_blocks(zeros, *blocks), *blocks, signed) if blocks else zeros

    def init(params):
        first, second = (jax.tree.map(lambda p, signed=signed: empty(p, signed), params) for signed in (True, False))
        return BlockwiseState(jnp.zeros((), jnp.int32), first, second)

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        leaves, structure = jax.tree.flatten(grads)

        def moments(gradient, first, second):
            gradient = gradient.astype(jnp.float32)
            return b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2

        def direction(first, second):
            return first / (1 - b1**count) / (jnp.sqrt(second / (1 - b2**count)) + eps)

        def step(gradient, *old):
            blocks = blocks_of(gradient.shape)
            if blocks is None:
                new = moments(gradient, *old)
                return direction(*new), *new
            # Worked out twice, and the barrier hides it: else XLA:GPU writes both moments to memory, in float32,
            # between finding the largest of each block and dividing by it. As it is, it writes one.
            for_largest, new = (
                moments(gradient, *(decode(moment, *blocks) for moment in before))
                for before in (jax.lax.optimization_barrier(old), old)
            )
            kept = (
                encode(moment, largest_of_blocks(same, *blocks), *blocks, signed)
                for moment, same, signed in zip(new, for_largest, (True, False), strict=True)
            )
            return direction(*new), *kept

        olds = (structure.flatten_up_to(moment) for moment in (state.first, state.second))
        directions, firsts, seconds = zip(*map(step, leaves, *olds), strict=True)
        whole = structure.unflatten
        return whole(directions), BlockwiseState(count, whole(firsts), whole(seconds))

    return optax.GradientTransformation(init, update)
