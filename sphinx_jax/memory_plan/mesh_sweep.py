"""Which meshes of so many devices divide a model, the likeliest choice first."""

import dataclasses
from collections.abc import Callable
from typing import NoReturn

from sharding import LayoutError, MeshShape
from sphinx_jax.config import SphinxConfig


def inference_meshes(config: SphinxConfig, num_gpus: int) -> list[MeshShape]:
    """Meshes that split the model into `num_gpus` parts, the default first.

    Raises LayoutError if there is none, with the nearest numbers that work.
    """
    return _splits(config, num_gpus) or _refuse(config, num_gpus, _splits)


def training_meshes(config: SphinxConfig, num_gpus: int) -> list[MeshShape]:
    """Meshes for training on `num_gpus`: parts of the model times fsdp, the most model-parallel first.

    Raises LayoutError if there is none, with the nearest numbers that work.
    """
    return _splits_and_fsdp(config, num_gpus) or _refuse(config, num_gpus, _splits_and_fsdp)


def _splits(config: SphinxConfig, devices: int) -> list[MeshShape]:
    """Meshes of tensor x expert = `devices` that divide the model, most of it on tensor first."""
    language = config.language
    pairs = [(t, devices // t) for t in range(devices, 0, -1) if devices % t == 0]
    fits = lambda t, e: (
        language.num_kv_heads % t == 0
        and language.hidden_dim % t == 0
        and language.num_experts % e == 0
        and language.dim % (t * e) == 0
        and language.vocab_size % (t * e) == 0
    )
    return [MeshShape(tensor=t, expert=e) for t, e in pairs if fits(t, e)]


def _splits_and_fsdp(config: SphinxConfig, devices: int) -> list[MeshShape]:
    """Meshes of tensor x expert x fsdp = `devices`."""
    found = []
    for model in (n for n in range(devices, 0, -1) if devices % n == 0):
        rest = devices // model
        if config.language.dim % rest == 0:
            found += [dataclasses.replace(shape, fsdp=rest) for shape in _splits(config, model)]
    # Past the key/value heads, more of `expert` costs exchanges that fsdp does without.
    return sorted(found, key=lambda shape: (shape.expert, -shape.tensor))


def _refuse(config: SphinxConfig, devices: int, meshes: Callable[[SphinxConfig, int], list[MeshShape]]) -> NoReturn:
    language = config.language
    fits = [n for n in range(1, 2 * devices + 1) if meshes(config, n)]
    near = " or ".join(map(str, [max(n for n in fits if n < devices), *[n for n in fits if n > devices][:1]]))
    raise LayoutError(
        f"no mesh of this model divides its {language.num_kv_heads} key/value heads, {language.num_experts} experts "
        f"and dimensions {language.dim} and {language.hidden_dim} over {devices} devices; {near} "
        "would do, or copies of the model with --mesh.data"
    )


def mesh_flags(shape: MeshShape) -> str:
    """The mesh as command-line options."""
    return " ".join(f"--mesh.{axis} {size}" for axis, size in dataclasses.asdict(shape).items() if size > 1)
