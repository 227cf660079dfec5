"""The host memory that `offload` may pin, counted and checked before weights are read."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

import sharding
from sharding import bytes_per_device
from sphinx_jax import allocator
from sphinx_jax.config import SphinxConfig
from sphinx_jax.kernels.quantized import QuantizedDtype
from sphinx_jax.language.moe import SINGLE_EXPERT
from sphinx_jax.model import SphinxMoE
from sphinx_jax.quantization import abstract_quantized_params

QUANTIZED_FRACTION: dict[QuantizedDtype, float] = {"int8": 0.6, "int4": 0.4}
"""At most, of SPHINX-MoE in bfloat16, with encoders and all else that is not quantized, in bfloat16 or float32."""


def pinned_bytes(
    config: SphinxConfig, mesh: Mesh | AbstractMesh, dtype: str, quantize: QuantizedDtype | None = None
) -> int:
    """Bytes for each device of `mesh`: the experts, and the vision encoders, which may be moved there as well."""
    _, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs), mesh, dtype=jnp.dtype(dtype)
    )
    params = abstract_quantized_params(params, quantize) if quantize else params
    layers: dict[Any, Any] = params["language"]["layers"]
    experts = [layer["ffn"][name] for layer in layers.values() for name in SINGLE_EXPERT]
    return bytes_per_device(jax.tree.leaves([experts, params.get("vision", {})]))


def set_host_limit(checkpoint: Path, dtype: str | None, quantize: QuantizedDtype | None, copies: int) -> None:
    """Let XLA pin what `offload` of a checkpoint needs at most, for `copies` of the model on this host. `quantize`:
    what stored weights become that are not quantized.

    XLA reads the limit when jax makes its first backend, as opening a checkpoint may do: so it follows from the size of
    the files.
    """
    stored = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    # Files in float32 that are read in bfloat16 or quantized need less than this.
    fraction = QUANTIZED_FRACTION[quantize] if quantize else 2 if dtype == "float32" else 1
    allocator.set_host_limit(int(copies * fraction * stored))


def check(config: SphinxConfig, mesh: Mesh, dtype: str, quantize: QuantizedDtype | None) -> None:
    """Raises UserError if the host of this process has no room for the experts of its devices."""
    total = len(mesh.local_devices) * pinned_bytes(config, mesh, dtype, quantize)
    allocator.check_pinned_memory(total, mesh.devices.flat[0].platform)
