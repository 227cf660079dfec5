"""Matrix-vector products for one CPU in C++ (`native_matvec.h`)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sphinx_jax.kernels.native_library import has_native_kernels
from sphinx_jax.kernels.quantized import Quantized, Weight

MIN_BYTES = 2**17
"""Of a matrix. Of smaller ones, as most of `nano`, XLA's loops read each in less time than a call takes."""

_STORED_DTYPES = jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8
"""Of weights, of int8 values and of packed int4 values."""


def runs_natively(x: Array, w: Weight) -> bool:
    """Whether `native_matvecs` takes these, with w[n, in, *out]: on one CPU with its library, and large matrices."""
    values = w.values if isinstance(w, Quantized) else w
    is_large = values.nbytes >= MIN_BYTES * len(values)
    known = x.dtype in (jnp.float32, jnp.bfloat16) and values.dtype in _STORED_DTYPES
    return is_large and known and has_native_kernels()


def native_matvecs(x: Float[Array, "rows in"], w: Weight, index: Int[Array, "rows"]) -> Float[Array, "rows *out"]:
    """x[r] @ w[index[r]] for each row, with w[n, in, *out], accumulated in float32; the stored weights are read."""
    quantization = (w.scales, w.steps, w.zeros) if isinstance(w, Quantized) else ()
    values = w.values if isinstance(w, Quantized) else w
    arrays = [array.reshape(*array.shape[:2], -1) for array in (values, *quantization) if array is not None]
    packed = 2 if isinstance(w, Quantized) and w.dtype == "int4" else 1
    result = jax.ShapeDtypeStruct((len(x), packed * arrays[0].shape[2]), jnp.float32)
    call = jax.ffi.ffi_call("sphinx_matvec", result, vmap_method="sequential")
    y = call(x.astype(jnp.float32), arrays[0], index.astype(jnp.int32), *arrays[1:])
    return y.reshape(len(x), *w.shape[2:]).astype(x.dtype)
