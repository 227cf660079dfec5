"""SwiGLU experts of a mixture-of-experts layer: one function, its implementation chosen by platform and token count.

All implementations are dropless and exact; they differ in what they read and multiply. With E local experts, T tokens
and k experts per token:

- `gather` reads one expert's weights for each of the T k assignments. For few tokens, where the time is that of reading
  weights; on a CPU with products in C++ for more of them (MAX_NATIVE_TOKENS).
- `dense` multiplies all tokens by all experts and reads each weight once, a quantized one as an integer. For enough
  tokens that most experts have some anyway, and few enough that E / k times the arithmetic still takes less time than
  reading.
- `sorted_blocks` sorts the assignments by expert and multiplies in blocks: the arithmetic of the chosen experts alone.
  Where XLA's products can read a matrix in its stack, they do; elsewhere each expert's matrices are copied once.
- `grouped_matmul` does the same in Pallas kernels for Hopper GPUs, and reads the chosen experts alone.
"""

import functools
import logging
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import sharding
from sharding.log_once import log_once
from sphinx_jax.kernels.linear import gathered_matrix, gathered_matvecs, matvec
from sphinx_jax.kernels.moe_grouped_matmul import moe_grouped_matmul, supports_grouped_matmul
from sphinx_jax.kernels.moe_sorted_blocks import (
    ExpertIds,
    LoraFactors,
    RankMask,
    RouterWeights,
    Tokens,
    WIn,
    WOut,
    block_sizes,
    moe_sorted_blocks,
)
from sphinx_jax.kernels.native_matvec import runs_natively
from sphinx_jax.kernels.quantized import Quantized, Weight
from sphinx_jax.kernels.quantized_matmul import fuses_dequantization, quantized_product

log = logging.getLogger(__name__)

Implementation = Literal["gather", "dense", "sorted_blocks", "grouped_matmul"]

MAX_DENSE_TOKENS = 128
"""For `dense` on a GPU. It does 2 x tokens operations per weight, which is 2 bytes in bfloat16: one operation per byte
and token. An H100 does 295 operations in the time it reads a byte (989 Tflop/s, 3.35 TB/s), an A100 153: with 128
tokens both are still limited by memory bandwidth."""

MAX_NATIVE_TOKENS = {"float32": 8, "bfloat16": 32, "int8": 32, "int4": 32}
"""For `gather` on a CPU with `native_matvec`, by the weights' dtype. With random routing 8 tokens take 0.12 to 0.37 of
the time of sorted blocks, 32 tokens 0.36 to 0.47, but in float32 16 tokens take 1.13 times it: XLA has fast products
for float32 alone, and other weights are written as float32 first."""

CPU_MAX_BLOCK_SIZE, GPU_MAX_BLOCK_SIZE = 128, 256
"""Rows of a block. On a CPU a product with 128 rows runs at 0.93 of a large product's speed, and its rows stay in
cache; on a GPU each block costs a round trip to the host as well."""

IN_PLACE_BLOCK_SIZES = 256, 128
"""Rows of blocks that read matrices in place. Each block reads them again, and in that time an A100 multiplies 153 rows
(see MAX_DENSE_TOKENS), an RTX 4090 164 and an L40S 419: blocks of fewer than 128 rows would take no less time. An RTX
3090 multiplies 76."""

MAX_UNROLLED_EXPERTS = 16
"""Local experts for which blocks read matrices in place: each has its own loops in the program. With eight experts,
prefill takes an eighth to two fifths longer to compile than with one loop for all."""


def moe_ffn(
    x: Tokens,
    experts: ExpertIds,
    weights: RouterWeights,
    w_in: WIn,
    w_out: WOut,
    implementation: Implementation | None = None,
    factors: LoraFactors = (),
    rank_mask: RankMask | None = None,
) -> Tokens:
    """y[t] = sum over j of weights[t, j] x expert_{experts[t, j]}(x[t]), expert(x) = (silu(x gate) * (x up)) w_out.

    `w_in` holds gate and up next to each other. An assignment to expert number `w_in.shape[0]`, one past the last,
    contributes zero. Differentiable in all arguments but `experts`. `implementation` overrides the choice.

    LoRA `factors` (see `moe_sorted_blocks`) without a `rank_mask` are for training, and imply `sorted_blocks`. With one
    they are several adapters next to each other, for inference: it is 1 at the ranks that apply to a token.
    """
    if implementation is None:
        (tokens, k), can_group = experts.shape, not factors and can_use_grouped_matmul(x, w_in)
        native = runs_natively(x, w_in) and runs_natively(x, w_out)
        max_native = MAX_NATIVE_TOKENS[str(w_in.dtype)] if native else 0
        implementation = choose_implementation(sharding.platform(), tokens, k, w_in.shape[0], can_group, max_native)
    if (factors and rank_mask is None) or (
        implementation == "dense" and isinstance(w_in, Quantized) and not fuses_dequantization(w_in)
    ):
        # Sorted blocks dequantize the weights of one expert at a time, dense would those of all.
        implementation = "sorted_blocks"
    in_place = implementation == "sorted_blocks" and reads_in_place(x, w_in)
    suffix = ", matrices read in place" if in_place else ""
    log_once(log, f"experts of {x.shape[0]} tokens on {sharding.platform()}: {implementation}{suffix}")
    if implementation == "sorted_blocks":
        max_size = CPU_MAX_BLOCK_SIZE if sharding.platform() == "cpu" else GPU_MAX_BLOCK_SIZE
        sizes = IN_PLACE_BLOCK_SIZES if in_place else block_sizes(experts.size, w_in.shape[0], max_size)
        return moe_sorted_blocks(x, experts, weights, w_in, w_out, sizes, factors, in_place, rank_mask)
    lora_in, lora_out = _lora_terms(factors, rank_mask)
    if implementation == "gather":
        return _moe_gather(x, experts, weights, w_in, w_out, lora_in, lora_out)
    if implementation == "dense":
        return _moe_dense(x, experts, weights, w_in, w_out, lora_in, lora_out)
    if isinstance(w_in, Quantized) or isinstance(w_out, Quantized):
        raise ValueError(f"{implementation} takes no quantized weights; choose gather, dense or sorted_blocks")
    return moe_grouped_matmul(x, experts, weights, w_in, w_out)


def can_use_grouped_matmul(x: Tokens, w_in: WIn) -> bool:
    """Whether the target is a Hopper GPU and its kernels take these arrays."""
    return sharding.compute_capability() == "9.0" and supports_grouped_matmul(x, w_in)


def reads_in_place(x: Tokens, w_in: WIn) -> bool:
    """Whether sorted blocks read matrices in their stack: not if these are converted to the dtype of `x` first."""
    if isinstance(w_in, Quantized) or w_in.dtype != x.dtype or w_in.shape[0] > MAX_UNROLLED_EXPERTS:
        return False
    return sharding.reads_slices_in_place()


def choose_implementation(
    platform: str, tokens: int, k: int, num_experts: int, can_group: bool = False, max_native_tokens: int = 0
) -> Implementation:
    """The implementation for `tokens` tokens with `k` experts each, of which `num_experts` are local.

    `can_group`: whether `grouped_matmul` is available. `max_native_tokens`: see MAX_NATIVE_TOKENS; 0 without them.
    """
    if can_group:
        is_dense = num_experts <= tokens * k and 1 < tokens <= MAX_DENSE_TOKENS
        return "dense" if is_dense else "grouped_matmul"
    if tokens * k < num_experts or tokens <= max_native_tokens:
        return "gather"
    # A CPU is limited by arithmetic, of which dense does E / k times as much.
    return "dense" if tokens <= MAX_DENSE_TOKENS and platform != "cpu" else "sorted_blocks"


def _swiglu(gate_up: Float[Array, "*rows 2 hidden"]) -> Float[Array, "*rows hidden"]:
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


class _LoraTerm(NamedTuple):
    """The adapters of one matrix of each expert."""

    a: Float[Array, "experts in rank"]
    b: Float[Array, "experts rank *out"]
    rank_mask: Float[Array, "*rows rank"]

    def add(self, y: Float[Array, "experts rows *out"], x: Float[Array, "experts rows in"]) -> Array:
        """y + x a b, of each row with the ranks of its token's adapter."""
        projected = jnp.einsum("eti,eir->etr", x, self.a) * self.rank_mask
        return y + jnp.einsum("etr,er...->et...", projected, self.b)

    def gather(self, experts: Int[Array, "n"], tokens: Int[Array, "n"]) -> "_LoraTerm":
        """The term of assignments: each has an expert of its own, and one row."""
        return _LoraTerm(self.a[experts], self.b[experts], self.rank_mask[tokens][:, None])


def _lora_terms(factors: LoraFactors, rank_mask: RankMask | None) -> tuple[_LoraTerm | None, _LoraTerm | None]:
    if not factors or rank_mask is None:
        return None, None
    a_in, b_in, a_out, b_out = factors
    return _LoraTerm(a_in, b_in, rank_mask), _LoraTerm(a_out, b_out, rank_mask)


def _moe_gather(
    x: Tokens,
    experts: ExpertIds,
    weights: RouterWeights,
    w_in: WIn,
    w_out: WOut,
    lora_in: _LoraTerm | None,
    lora_out: _LoraTerm | None,
) -> Tokens:
    """Matrix-vector products: each assignment with the matrices of its expert."""
    tokens, k = experts.shape
    elsewhere = experts == w_in.shape[0]
    # An assignment to an expert elsewhere reads some matrix too: that of a local expert which is read anyway.
    local = jnp.where(elsewhere, jnp.max(jnp.where(elsewhere, 0, experts)), experts).reshape(-1)
    inputs = jnp.repeat(x, k, axis=0)
    gate_up = gathered_matvecs(inputs, w_in, local)
    token = jnp.arange(tokens * k) // k
    if lora_in is not None:
        gate_up = lora_in.gather(local, token).add(gate_up[:, None], inputs[:, None])[:, 0]
    hidden = _swiglu(gate_up)
    outputs = gathered_matvecs(hidden, w_out, local)
    if lora_out is not None:
        outputs = lora_out.gather(local, token).add(outputs[:, None], hidden[:, None])[:, 0]
    return _weighted_sum(outputs.reshape(tokens, k, -1), jnp.where(elsewhere, 0, weights))


def _moe_dense(
    x: Tokens,
    experts: ExpertIds,
    weights: RouterWeights,
    w_in: WIn,
    w_out: WOut,
    lora_in: _LoraTerm | None,
    lora_out: _LoraTerm | None,
) -> Tokens:
    """All experts on all tokens; the input of an expert that a token did not choose is zero, and so is its output."""
    num_experts = w_in.shape[0]
    # [tokens, experts]: the router weight of each expert, zero if not chosen.
    expert_weights = jnp.sum(weights[..., None] * jax.nn.one_hot(experts, num_experts, dtype=weights.dtype), axis=1)
    if len(x) == 1:
        # For a batch of products with one row each, XLA would transpose the weights.
        matrices = [[gathered_matrix(w, e).astype(x.dtype) for e in range(num_experts)] for w in (w_in, w_out)]
        gate_up = jnp.stack([matvec(x[0], w) for w in matrices[0]])
        if lora_in is not None:
            gate_up = lora_in.add(gate_up[:, None], jnp.broadcast_to(x, (num_experts, *x.shape)))[:, 0]
        hidden = _swiglu(gate_up)
        outputs = jnp.stack([matvec(h, w) for h, w in zip(hidden, matrices[1], strict=True)])
        if lora_out is not None:
            outputs = lora_out.add(outputs[:, None], hidden[:, None])[:, 0]
        return _weighted_sum(outputs[None], expert_weights)
    chosen = jnp.any(experts[..., None] == jnp.arange(num_experts), axis=1)
    # The mask is on the input: without it XLA merges the products into one of [tokens, dim] by [dim, experts x hidden].
    inputs = jnp.where(chosen.T[..., None], x, 0)
    gate_up = _experts_dot(inputs, w_in)
    hidden = _swiglu(gate_up if lora_in is None else lora_in.add(gate_up, inputs))
    outputs = _experts_dot(hidden, w_out)
    if lora_out is not None:
        outputs = lora_out.add(outputs, hidden)
    return _weighted_sum(outputs.swapaxes(0, 1), expert_weights)


def _experts_dot(x: Float[Array, "experts tokens in"], w: Weight) -> Float[Array, "experts tokens *out"]:
    """x[e] @ w[e] with w[experts, in, *out]."""
    if not isinstance(w, Quantized):
        return jnp.einsum("eti,ei...->et...", x, w.astype(x.dtype))
    y = quantized_product(functools.partial(jnp.einsum, "eti,eio->eto"), x, w)
    return y.reshape(*x.shape[:2], *w.shape[2:])


def _weighted_sum(outputs: Float[Array, "tokens n dim"], weights: Float[Array, "tokens n"]) -> Tokens:
    return jnp.sum(outputs * weights[..., None], axis=1)
