"""FLOPs of a training step, and the peak FLOP/s of its devices, for model FLOPs utilisation (MFU)."""

import jax

from sphinx_jax.costs import Cost, Workload, forward_flops
from sphinx_jax.hardware import gpu_of_device
from sphinx_jax.training.program import TrainProgram
from sphinx_jax.training.train_config import ComputeDtype


def step_flops(program: TrainProgram, text_len: int, has_images: bool, *, include_remat: bool = False) -> Cost:
    """FLOPs of one optimizer step on sequences of `text_len` tokens, with one image each if `has_images`.

    Rematerialisation counts only if `include_remat`: MFU excludes it (PaLM, https://arxiv.org/abs/2204.02311,
    appendix B).
    """
    config, train_config = program.config, program.train_config
    length = text_len + config.num_image_tokens * has_images
    work = Workload(train_config.batch_size, length, length, text_len, train_config.batch_size * has_images)
    forward = forward_flops(config, program.params["model"], program.mesh, work)
    # The backward pass costs two forward passes: the gradients of the activations and those of the weights.
    remat_passes = include_remat and train_config.remat == "block"
    decoder_trainable = any(jax.tree.leaves(program.trainable["model"]["language"]))
    passes = {
        "language": (3.0 if decoder_trainable else 2.0) + remat_passes,
        "vision": 3.0 + remat_passes if train_config.stage == "all" else 1.0,
    }
    return sum((cost * passes[part] for part, cost in forward.items()), Cost(0.0, 0.0))


def peak_flops(device_kind: str, num_devices: int, dtype: ComputeDtype) -> float | None:
    """Peak FLOP/s of all devices together: known for the GPUs of `sphinx_jax.hardware` in bfloat16, else None."""
    gpu = gpu_of_device(device_kind)
    return gpu.bf16_flops * num_devices if gpu and dtype == "bfloat16" else None
