"""How much of its devices' arithmetic a training step uses."""

import jax
from jax.sharding import Mesh

from sphinx_jax.config import SphinxConfig
from sphinx_jax.costs import Cost, Work, forward_flops
from sphinx_jax.hardware import gpu_of_device
from sphinx_jax.training.program import TrainProgram
from sphinx_jax.training.train_config import TrainConfig


def step_flops(
    config: SphinxConfig,
    program: TrainProgram,
    mesh: Mesh,
    train_config: TrainConfig,
    text: int,
    pictures: bool,
    *,
    recomputed: bool = False,
) -> Cost:
    """Operations of one optimizer step on sequences of `text` tokens, each with a picture or none.

    What is done a second time to save memory counts only if `recomputed`: model FLOPs utilisation (MFU) leaves it
    out (PaLM, https://arxiv.org/abs/2204.02311, appendix B).
    """
    length = text + config.num_image_tokens * pictures
    work = Work(train_config.batch_size, length, length, text, train_config.batch_size * pictures)
    forward = forward_flops(config, program.params["model"], mesh, work)
    # Backwards costs twice a forward pass: once for what came in, once for the weights.
    again = recomputed and train_config.remat == "block"
    is_trainable = any(jax.tree.leaves(program.is_trainable["model"]["language"]))
    passes = {
        "language": (3 if is_trainable else 2) + again,
        "vision": 3 + again if train_config.stage == "all" else 1,
    }
    return sum((cost * passes[part] for part, cost in forward.items()), Cost(0.0, 0.0))


def peak_flops(mesh: Mesh, train_config: TrainConfig) -> float | None:
    """Operations a second that all devices could do at most; None where that is not known.

    Known are the cards of `sphinx_jax.hardware`, computing in bfloat16.
    """
    gpu = gpu_of_device(mesh.devices.flat[0].device_kind)
    return gpu.bf16_flops * mesh.size if gpu and train_config.dtype == "bfloat16" else None
