"""The SwiGLU experts of a mixture: one function, its form chosen by platform and number of tokens.

Each form is dropless and exact; they differ in what they read and multiply. With E experts here, T tokens and
k experts a token:

- `chosen` reads one expert's weights for each of the T k assignments. For a few words, where reading weights is all
  the time there is.
- `every` multiplies all tokens by all experts, reading each weight once. For enough words that most experts are
  chosen by some word anyway, and few enough that E / k times the arithmetic still takes less time than the reading.
- `blocks` sorts the assignments by expert and multiplies block by block: the arithmetic of the chosen experts alone.
  Where XLA's products can read a matrix in its stack, they do; else each expert's are copied out of it once.
- `groups` does the same in kernels made for a Hopper GPU, of the chosen experts alone in what they read and multiply.
"""

import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import sharding
from sharding.log_once import log_once
from sphinx_jax.kernels.linear import gathered_matvec, matvec
from sphinx_jax.kernels.moe_grouped_matmul import groups_fit, moe_grouped_matmul
from sphinx_jax.kernels.moe_sorted_blocks import (
    Assigned,
    Factors,
    Tokens,
    Weights,
    WIn,
    WOut,
    block_sizes,
    moe_sorted_blocks,
)
from sphinx_jax.kernels.quantized import Quantized

log = logging.getLogger(__name__)

Form = Literal["chosen", "every", "blocks", "groups"]

EVERY_TOKENS = 128
"""Most tokens for `every` on a GPU. It does 2 x tokens operations for each weight, which in bfloat16 is 2 bytes: one
operation a byte and token. An H100 does 295 operations in the time it reads a byte (989 Tflop/s, 3.35 TB/s), an A100
153: at 128 tokens either is still waiting for memory."""

CPU_BLOCK, GPU_BLOCK = 128, 256
"""Most rows of a block. A product with 128 rows runs at 0.93 of a large one's speed on a CPU and its rows stay in
cache; on a GPU each block costs a round trip to the host as well."""

IN_PLACE_BLOCKS = 256, 128
"""Rows of the blocks that read matrices in place. Each reads them anew, in which time an A100 multiplies 153 rows (see
EVERY_TOKENS), an RTX 4090 164 and an L40S 419: fewer than 128 would take no less. An RTX 3090 multiplies 76."""

MOST_WRITTEN_OUT = 16
"""Most experts on a device for blocks that read matrices in place: each has loops of its own in the program. For eight,
a program that reads a prompt takes an eighth to two fifths longer to compile than with one loop for all."""


def moe_ffn(
    x: Tokens,
    experts: Assigned,
    weights: Weights,
    w_in: WIn,
    w_out: WOut,
    form: Form | None = None,
    factors: Factors = (),
) -> Tokens:
    """y[t] = sum over j of weights[t, j] x expert_{experts[t, j]}(x[t]), expert(x) = (silu(x gate) * (x up)) w_out.

    `w_in` holds gate and up side by side. An assignment to expert number `w_in.shape[0]`, one past the last, adds
    nothing. Differentiable in all but `experts`. `form` overrules the choice.

    `factors` are low-rank products beside the matrices (see `moe_sorted_blocks`), for training: always in blocks.
    """
    form = form or choose_implementation(sharding.platform(), *experts.shape, w_in.shape[0], has_kernels(x, w_in))
    if factors or (form == "every" and isinstance(w_in, Quantized)):
        # Which makes numbers of one expert's quantized weights at a time, not of all.
        form = "blocks"
    in_place = form == "blocks" and reads_in_place(x, w_in)
    place = ", matrices read in place" if in_place else ""
    log_once(log, f"experts of {x.shape[0]} tokens on {sharding.platform()}: {form}{place}")
    if form == "blocks":
        largest = CPU_BLOCK if sharding.platform() == "cpu" else GPU_BLOCK
        sizes = IN_PLACE_BLOCKS if in_place else block_sizes(experts.size, w_in.shape[0], largest)
        return moe_sorted_blocks(x, experts, weights, w_in, w_out, sizes, factors, in_place)
    return {"chosen": _chosen, "every": _every, "groups": moe_grouped_matmul}[form](x, experts, weights, w_in, w_out)


def has_kernels(x: Tokens, w_in: WIn) -> bool:
    """Whether `groups` can be chosen: what is compiled for is a Hopper GPU, and its kernels take these arrays."""
    return sharding.compute_capability() == "9.0" and not isinstance(w_in, Quantized) and groups_fit(x, w_in)


def reads_in_place(x: Tokens, w_in: WIn) -> bool:
    """Whether blocks leave matrices in their stack: not if those have to be made numbers of the tokens' kind first."""
    few = w_in.shape[0] <= MOST_WRITTEN_OUT
    return few and not isinstance(w_in, Quantized) and w_in.dtype == x.dtype and sharding.reads_slices_in_place()


def choose_implementation(platform: str, tokens: int, k: int, num_experts: int, kernels: bool = False) -> Form:
    """The form for `tokens` tokens that choose `k` experts each, where `num_experts` are on the device.

    `kernels` says that it may be `groups`.
    """
    if kernels:
        return "every" if num_experts <= tokens * k and 1 < tokens <= EVERY_TOKENS else "groups"
    if tokens * k < num_experts:
        return "chosen"
    # A CPU's arithmetic is too slow for more than needs be.
    return "every" if tokens <= EVERY_TOKENS and platform != "cpu" else "blocks"


def _swiglu(gate_up: Float[Array, "*rows 2 hidden"]) -> Float[Array, "*rows hidden"]:
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


def _chosen(x: Tokens, experts: Assigned, weights: Weights, w_in: WIn, w_out: WOut) -> Tokens:
    """Assignment by assignment, each with its own expert's matrices."""
    tokens, k = experts.shape
    elsewhere = experts == w_in.shape[0]
    # Some matrix has to be read for an assignment to another device's expert: one that is read anyway.
    nearest = jnp.where(elsewhere, jnp.max(jnp.where(elsewhere, 0, experts)), experts).reshape(-1)
    rows = range(tokens * k)
    gate_up = jnp.stack([gathered_matvec(x[row // k], w_in, nearest[row]) for row in rows])
    hidden = _swiglu(gate_up)
    parts = jnp.stack([gathered_matvec(hidden[row], w_out, nearest[row]) for row in rows])
    return _weighted_sum(parts.reshape(tokens, k, -1), jnp.where(elsewhere, 0, weights))


def _every(x: Tokens, experts: Assigned, weights: Weights, w_in: WIn, w_out: WOut) -> Tokens:
    """All experts on all tokens; a token is zero before an expert that it did not choose, and so stays zero."""
    share = jnp.sum(weights[..., None] * jax.nn.one_hot(experts, w_in.shape[0], dtype=weights.dtype), axis=1)
    if len(x) == 1:
        # A batch of products with one row each would be laid out anew by XLA, the weights with it.
        hidden = _swiglu(jnp.stack([matvec(x[0], w) for w in w_in]))
        parts = jnp.stack([matvec(h, w) for h, w in zip(hidden, w_out, strict=True)])
        return _weighted_sum(parts[None], share)
    chosen = jnp.any(experts[..., None] == jnp.arange(w_in.shape[0]), axis=1)
    # Masked here and not later: else XLA takes the product for one of [tokens, dim] by [dim, experts x hidden].
    rows = jnp.where(chosen.T[..., None], x, 0)
    hidden = _swiglu(jnp.einsum("etd,edgh->etgh", rows, w_in))
    parts = jnp.einsum("eth,ehd->etd", hidden, w_out)
    return _weighted_sum(parts.swapaxes(0, 1), share)


def _weighted_sum(parts: Float[Array, "tokens n dim"], weights: Float[Array, "tokens n"]) -> Tokens:
    return jnp.sum(parts * weights[..., None], axis=1)
