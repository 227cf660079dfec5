"""Attention of decode steps for one CPU in C++ (`native_attention.h`)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sphinx_jax.kernels.native_library import has_native_kernels


def attends_natively(q: Array, k: Array) -> bool:
    """Whether `native_decode_attention` takes these: on one CPU with its library."""
    return q.dtype == k.dtype and k.dtype in (jnp.float32, jnp.bfloat16) and has_native_kernels()


def native_decode_attention(
    q: Float[Array, "batch kv_heads group head_dim"],
    k: Float[Array, "batch cache_len kv_heads head_dim"],
    v: Float[Array, "batch cache_len kv_heads head_dim"],
    lengths: Int[Array, "batch"],
) -> Float[Array, "batch kv_heads group head_dim"]:
    """softmax(q k' / sqrt(head_dim)) v over the first `lengths` positions of each sequence, at least one of them.

    Later positions are not read. Accumulated in float32. There is no gradient: decode steps need none.
    """
    result = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    call = jax.ffi.ffi_call("sphinx_decode_attention", result, vmap_method="sequential")
    return call(q.astype(jnp.float32), k, v, lengths.astype(jnp.int32)).astype(q.dtype)
