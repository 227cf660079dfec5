"""Which meshes of so many devices divide a model, the likeliest choice first."""

import dataclasses

from sharding import LayoutError, MeshShape
from sphinx_jax.config import SphinxConfig


def inference_meshes(config: SphinxConfig, num_gpus: int) -> list[MeshShape]:
    """Meshes that split the model into `num_gpus` parts, the default first.

    Raises LayoutError if there is none, with the nearest numbers that work.
    """
    shapes = _splits(config, num_gpus)
    if not shapes:
        fits = [n for n in range(1, 4 * num_gpus + 64) if _splits(config, n)]
        below, above = (max((n for n in fits if n < num_gpus), default=None), min(n for n in fits if n > num_gpus))
        near = " or ".join(str(n) for n in (below, above) if n)
        raise LayoutError(
            f"no mesh of this model divides its {config.language.num_kv_heads} key/value heads, "
            f"{config.language.num_experts} experts and hidden dimension {config.language.hidden_dim} over {num_gpus} "
            f"devices; {near} would do, or copies of the model with --mesh.data"
        )
    return shapes


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


def training_meshes(config: SphinxConfig, num_gpus: int) -> list[MeshShape]:
    """Meshes for training on `num_gpus`: parts of the model times fsdp, the most model-parallel first."""
    found = []
    for model in (n for n in range(num_gpus, 0, -1) if num_gpus % n == 0):
        rest = num_gpus // model
        if config.language.dim % rest == 0:
            found += [dataclasses.replace(shape, fsdp=rest) for shape in _splits(config, model)]
    # Past the key/value heads, more of `expert` costs exchanges that fsdp does without.
    return sorted(found, key=lambda shape: (shape.expert, -shape.tensor))


def mesh_flags(shape: MeshShape) -> str:
    """The mesh as command-line options."""
    return " ".join(f"--mesh.{axis} {size}" for axis, size in dataclasses.asdict(shape).items() if size > 1)
