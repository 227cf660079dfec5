"""Linear, norm and embedding with named axes, and the loop over like layers.

Every parameter is made by `param`, which writes the logical name of each dimension beside it;
`sharding.axis_rules` turns those names into places on a mesh. Modules compute in the dtype of their
input: mixed precision is a cast of the parameters, done once by the caller.
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

# Placing parameters is the business of sharding.init, from abstract shapes; with eager sharding
# Flax refuses a named parameter made outside a mesh.
nnx.use_eager_sharding(False)

Initializer = Callable[[Array, tuple[int, ...], Any], Array]


def fan_in_normal(fan_in: int) -> Initializer:
    """Normal with variance 1 / fan_in, so that a product keeps the scale of its input."""
    return nnx.initializers.normal(1 / math.sqrt(fan_in))


def param(rngs: nnx.Rngs, shape: tuple[int, ...], names: tuple[str | None, ...], init: Initializer) -> nnx.Param:
    """A float32 parameter whose dimensions carry logical axis names (None: never sharded)."""
    if len(shape) != len(names):
        raise ValueError(f"{len(shape)} dimensions but {len(names)} axis names: {shape}, {names}")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=names)


class Linear(nnx.Module):
    """y = x W + b with W[in, out]; `names` are the logical names of (in, out)."""

    def __init__(
        self, in_dim: int, out_dim: int, names: tuple[str | None, str | None], *, bias: bool = True, rngs: nnx.Rngs
    ):
        self.kernel = param(rngs, (in_dim, out_dim), names, fan_in_normal(in_dim))
        self.bias = param(rngs, (out_dim,), names[1:], nnx.initializers.zeros) if bias else None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = matmul(x, self.kernel[...].astype(x.dtype))
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
    """A table looked up by token id.

    The channels are what is sharded over the model-parallel devices, not the vocabulary: looking up
    a token then needs no copy of the table, only a gather of the few channels of the result.
    """

    def __init__(self, vocab_size: int, dim: int, *, rngs: nnx.Rngs):
        self.table = param(rngs, (vocab_size, dim), ("vocab_rows", "channels"), nnx.initializers.normal(0.02))

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        return jnp.take(self.table[...], tokens, axis=0)


class LowRank(nnx.Module):
    """LoRA (https://arxiv.org/abs/2106.09685): x a b x alpha / rank, added to the product with a frozen matrix.

    The matrix is W[*stack, *in, *out], `inputs` the number of dimensions of its input. `a[*stack, *in, rank]` is
    split over a mesh as the matrix's input is, `b[*stack, rank, *out]` as its output. b starts as zeros.
    """

    def __init__(self, matrix: nnx.Param, lora: LoraConfig, *, stack: int = 0, inputs: int = 1, rngs: nnx.Rngs):
        shape, names, end = matrix.shape, matrix.get_metadata()["out_sharding"], stack + inputs
        into, out_of = (*shape[:end], lora.rank), (*shape[:stack], lora.rank, *shape[end:])
        self.a = param(rngs, into, (*names[:end], None), fan_in_normal(math.prod(shape[stack:end])))
        self.b = param(rngs, out_of, (*names[:stack], None, *names[end:]), nnx.initializers.zeros)
        self.scale = lora.scale

    def factors(self, dtype: Any) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """a, and b scaled, in `dtype`."""
        return self.a[...].astype(dtype), (self.b[...] * self.scale).astype(dtype)

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "..."]:
        """What is added to x W of a single matrix, the dimensions of its input as one."""
        a, b = self.factors(x.dtype)
        return matmul(matmul(x, a.reshape(-1, a.shape[-1])), b)


def make_layers(
    make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs, unstacked: bool = False
) -> nnx.Module:
    """`count` like layers: one module whose arrays are stacked along a leading "layers" axis, or a list.

    Stacked layers run as one scan and compile once, which training wants. Held apart, no layer's
    weights are copied out of a stack, which decoding wants.
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
    """carry, output_i = body(layer_i, carry, per_layer_i) for each layer in turn.

    `per_layer` and the returned outputs have a leading layer axis when the layers are stacked, and
    are lists when they are held apart. `remat` names what a stacked layer keeps for its gradient:
    "none" recomputes nothing, "block" everything but the layer's input, "dots" everything but that
    and the matrix products.
    """
    if isinstance(layers, nnx.List):
        outputs = []
        for i, layer in enumerate(layers):
            carry, output = body(layer, carry, None if per_layer is None else per_layer[i])
            outputs.append(output)
        return carry, outputs

    graph, state = nnx.split(layers)

    def step(carry, inputs):
        layer_state, extra = inputs
        return body(nnx.merge(graph, layer_state), carry, extra)

    if REMAT_POLICIES[remat] is not None:
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (state, per_layer))
