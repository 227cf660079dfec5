"""How much of its devices' arithmetic a training step uses."""

import jax
from jax.sharding import Mesh

from sharding.plan import gpu_of_device
from sphinx_jax.config import SphinxConfig
from sphinx_jax.costs import Cost, Work, forward_flops
from sphinx_jax.training.program import TrainProgram
from sphinx_jax.training.recipe import Recipe


def step_flops(
    config: SphinxConfig,
    program: TrainProgram,
    mesh: Mesh,
    recipe: Recipe,
    text: int,
    pictures: bool,
    *,
    recomputed: bool = False,
) -> Cost:
    """Operations of one optimizer step on sequences of `text` tokens, each with a picture or none.

    What is done a second time to save memory counts only if `recomputed`: model FLOPs utilisation (MFU) leaves it
    out (PaLM, https://arxiv.org/abs/2204.02311, appendix B).
    """
    length = text + config.image_words * pictures
    work = Work(recipe.batch_size, length, length, text, recipe.batch_size * pictures)
    forward = forward_flops(config, program.params["model"], mesh, work)
    # Backwards costs twice a forward pass: once for what came in, once for the weights.
    again = recomputed and recipe.remat == "block"
    learns = any(jax.tree.leaves(program.learns["model"]["language"]))
    passes = {"language": (3 if learns else 2) + again, "vision": 3 + again if recipe.stage == "everything" else 1}
    return sum((cost * passes[part] for part, cost in forward.items()), Cost(0.0, 0.0))


def peak_flops(mesh: Mesh, recipe: Recipe) -> float | None:
    """Operations a second that all devices could do at most; None where that is not known.

    Known are the cards of `sharding.plan.gpus`, computing in bfloat16.
    """
    gpu = gpu_of_device(mesh.devices.flat[0].device_kind)
    return gpu.bf16_flops * mesh.size if gpu and recipe.dtype == "bfloat16" else None
