"""Linear, norms, embedding and LoRA with named axes, and the loop over identical layers.

Every parameter is created by `param`, which records the logical axis of each dimension; `sharding.axis_rules` turns
these into shardings. Modules compute in the dtype of their input: mixed precision is a cast of the parameters, done
once by the caller.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sphinx_jax.config import LoraConfig
from sphinx_jax.kernels.linear import matmul

Initializer = Callable[[Array, tuple[int, ...], Any], Array]


def fan_in_normal(fan_in: int) -> Initializer:
    """Normal with variance 1 / fan_in, which preserves the scale of the input."""
    return nnx.initializers.normal(1 / math.sqrt(fan_in))


def param(rngs: nnx.Rngs, shape: tuple[int, ...], names: tuple[str | None, ...], init: Initializer) -> nnx.Param:
    """A float32 parameter with the logical axis of each dimension (None: never sharded).

    Raises ValueError if there is not one name per dimension.
    """
    if len(shape) != len(names):
        raise ValueError(f"{len(shape)} dimensions but {len(names)} axis names: {shape}, {names}")
    # sharding.init shards parameters from their abstract shapes; eagerly, Flax raises where there is no mesh. Said for
    # each parameter: Flax's own switch holds for one thread.
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=names, eager_sharding=False)


class Linear(nnx.Module):
    """y = x W + b with W[in, out]; `names` are the logical axes (in, out)."""

    def __init__(
        self, in_dim: int, out_dim: int, names: tuple[str | None, str | None], *, bias: bool = True, rngs: nnx.Rngs
    ):
        self.kernel = param(rngs, (in_dim, out_dim), names, fan_in_normal(in_dim))
        self.bias = param(rngs, (out_dim,), names[1:], nnx.initializers.zeros) if bias else None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = matmul(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, cast back, then scaled (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, eps: float, *, rngs: nnx.Rngs):
        self.scale = param(rngs, (dim,), ("norm",), nnx.initializers.ones)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std in float32, scaled and shifted, cast back (https://arxiv.org/abs/1607.06450)."""

    def __init__(self, dim: int, eps: float, *, rngs: nnx.Rngs):
        self.scale = param(rngs, (dim,), ("norm",), nnx.initializers.ones)
        self.bias = param(rngs, (dim,), ("norm",), nnx.initializers.zeros)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (normed * scale + bias).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of one vector per token id.

    The channels are sharded over the model-parallel devices, not the vocabulary: a lookup then needs no all-gather of
    the table, only of the resulting channels.
    """

    def __init__(self, vocab_size: int, dim: int, *, rngs: nnx.Rngs):
        self.table = param(rngs, (vocab_size, dim), ("vocab_rows", "channels"), nnx.initializers.normal(0.02))

    @jax.named_scope("embedding")
    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        return jnp.take(self.table[...], tokens, axis=0)


class LowRank(nnx.Module):
    """LoRA (https://arxiv.org/abs/2106.09685): x a b x alpha / rank, added to the product with a frozen matrix W.

    W is [*stack, *in, *out], with `stack` and `inputs` the numbers of dimensions of *stack and *in.
    `a[*stack, *in, rank]` is sharded like W's input dimensions, `b[*stack, rank, *out]` like its output dimensions. b
    is initialised to zeros.
    """

    def __init__(self, matrix: nnx.Param, lora: LoraConfig, *, stack: int = 0, inputs: int = 1, rngs: nnx.Rngs):
        shape, names, end = matrix.shape, matrix.get_metadata()["out_sharding"], stack + inputs
        into, out_of = (*shape[:end], lora.rank), (*shape[:stack], lora.rank, *shape[end:])
        self.a = param(rngs, into, (*names[:end], None), fan_in_normal(math.prod(shape[stack:end])))
        self.b = param(rngs, out_of, (*names[:stack], None, *names[end:]), nnx.initializers.zeros)
        self.scale = lora.scale

    def factors(self, dtype: Any) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(a, b x alpha / rank) in `dtype`."""
        return self.a[...].astype(dtype), (self.b[...] * self.scale).astype(dtype)

    def __call__(
        self, x: Float[Array, "batch length in"], rank_mask: Float[Array, "batch rank"] | None = None
    ) -> Float[Array, "..."]:
        """The LoRA term of x W for a single matrix; `x` has the dimensions *in flattened into one.

        `rank_mask` is 1 at the ranks that apply to a sequence, and 0 at the others: of several adapters next to each
        other, each sequence has its own.
        """
        a, b = self.factors(x.dtype)
        projected = matmul(x, a.reshape(-1, a.shape[-1]))
        return matmul(projected if rank_mask is None else projected * rank_mask[:, None], b)


def make_layers(
    make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs, unstacked: bool = False
) -> nnx.Module:
    """`count` identical layers: one module with arrays stacked along a leading "layers" axis, or a list of modules.

    Stacked layers run as one scan and compile once: for training. Unstacked layers need no slice of a stack, which
    would copy their weights: for decoding.
    """
    if unstacked:
        return nnx.List([make(rngs) for _ in range(count)])
    stacked = nnx.vmap(make, in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    return nnx.split_rngs(splits=count)(stacked)(rngs)


REMAT_POLICIES = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_layers(
    layers: nnx.Module,
    body: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    carry: Any,
    per_layer: Any = None,
    *,
    remat: str = "none",
) -> tuple[Any, Any]:
    """carry, output_i = body(layer_i, carry, per_layer_i) for each layer i in order; returns (carry, outputs).

    `per_layer` and the outputs have a leading layer axis if the layers are stacked, and are lists if they are
    unstacked. `remat` is the rematerialisation policy of stacked layers: "none" stores all activations for the backward
    pass, "block" only each layer's input, "dots" also the results of matrix products.
    """
    if isinstance(layers, nnx.List):
        outputs = []
        for i, layer in enumerate(layers):
            carry, output = body(layer, carry, None if per_layer is None else per_layer[i])
            outputs.append(output)
        return carry, outputs

    # A scan over the stacked parameters: `body` is traced once, with one layer's slice of every array.
    graph, state = nnx.split(layers)

    def step(carry, inputs):
        layer_state, layer_input = inputs
        return body(nnx.merge(graph, layer_state), carry, layer_input)

    if REMAT_POLICIES[remat] is not None:
        # Inside a scan XLA cannot merge the recomputation with the forward pass, so CSE need not be prevented.
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (state, per_layer))
