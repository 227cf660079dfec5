"""The meshes of a number of GPUs that divide a model, the best default first."""

import dataclasses
from collections.abc import Callable
from typing import NoReturn

from sharding import LayoutError, MeshShape
from sphinx_jax.config import SphinxConfig


def inference_meshes(config: SphinxConfig, num_gpus: int) -> list[MeshShape]:
    """Meshes of model parallel degree `num_gpus`, the default first.

    Raises LayoutError if there is none, with the nearest numbers of GPUs that work.
    """
    return _model_parallel_meshes(config, num_gpus) or _raise_no_mesh(config, num_gpus, _model_parallel_meshes)


def training_meshes(config: SphinxConfig, num_gpus: int) -> list[MeshShape]:
    """Meshes for training on `num_gpus`: model parallelism times fsdp, the highest tensor parallelism first.

    Raises LayoutError if there is none, with the nearest numbers of GPUs that work.
    """
    return _fsdp_meshes(config, num_gpus) or _raise_no_mesh(config, num_gpus, _fsdp_meshes)


def _model_parallel_meshes(config: SphinxConfig, num_gpus: int) -> list[MeshShape]:
    """Meshes of tensor × expert = `num_gpus` that divide the model, the highest tensor parallelism first."""
    language = config.language

    def divides(tensor: int, expert: int) -> bool:
        return (
            language.num_kv_heads % tensor == 0
            and language.hidden_dim % tensor == 0
            and language.num_experts % expert == 0
            and language.dim % (tensor * expert) == 0
            and language.padded_vocab_size % (tensor * expert) == 0
        )

    pairs = [(t, num_gpus // t) for t in range(num_gpus, 0, -1) if num_gpus % t == 0]
    return [MeshShape(tensor=t, expert=e) for t, e in pairs if divides(t, e)]


def _fsdp_meshes(config: SphinxConfig, num_gpus: int) -> list[MeshShape]:
    """Meshes of tensor × expert × fsdp = `num_gpus`."""
    found = []
    for model_parallel in (n for n in range(num_gpus, 0, -1) if num_gpus % n == 0):
        fsdp = num_gpus // model_parallel
        if config.language.dim % fsdp == 0:
            found += [dataclasses.replace(shape, fsdp=fsdp) for shape in _model_parallel_meshes(config, model_parallel)]
    # Past the KV heads, a larger `expert` axis adds collectives that fsdp does not need.
    return sorted(found, key=lambda shape: (shape.expert, -shape.tensor))


def _raise_no_mesh(
    config: SphinxConfig, num_gpus: int, meshes: Callable[[SphinxConfig, int], list[MeshShape]]
) -> NoReturn:
    language = config.language
    fits = [n for n in range(1, 2 * num_gpus + 1) if meshes(config, n)]
    below, above = max(n for n in fits if n < num_gpus), [n for n in fits if n > num_gpus][:1]
    raise LayoutError(
        f"no mesh divides the {language.num_kv_heads} KV heads, {language.num_experts} experts and dimensions "
        f"{language.dim} and {language.hidden_dim} of this model over {num_gpus} devices; use "
        f"{' or '.join(map(str, [below, *above]))} devices, or replicate the model with --mesh.data"
    )


def mesh_flags(shape: MeshShape) -> str:
    """The mesh as command-line options."""
    return " ".join(f"--mesh.{axis} {size}" for axis, size in dataclasses.asdict(shape).items() if size > 1)
