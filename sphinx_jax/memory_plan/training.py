"""The plan of training: one optimizer step of a train config, for batches of given shapes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import sharding
from sharding import MeshShape, bytes_per_device
from sphinx_jax.config import SphinxConfig
from sphinx_jax.costs import fraction_of_parameters
from sphinx_jax.errors import UserError
from sphinx_jax.hardware import Gpu
from sphinx_jax.memory_plan.aot import planning_mesh
from sphinx_jax.memory_plan.jobs import Job, compile_jobs
from sphinx_jax.memory_plan.mesh_sweep import mesh_flags
from sphinx_jax.memory_plan.report import Plan
from sphinx_jax.training.moments import MOMENTS
from sphinx_jax.training.program import TrainProgram, train_program
from sphinx_jax.training.step import AuxiliaryLoss
from sphinx_jax.training.train_config import Remat, TrainConfig
from sphinx_jax.training.utilisation import step_flops

BatchShapes = dict[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype of each array of a batch."""

REMATS: tuple[Remat, ...] = ("none", "dots", "block")


def training_batch(config: SphinxConfig, train_config: TrainConfig, length: int) -> BatchShapes:
    """A batch of sequences of `length` tokens, image tokens included. Raises UserError if no room for text is left."""
    text_len = length - config.num_image_tokens
    if text_len < 2:
        raise UserError(
            f"--max-length {length} is too short: an image alone takes {config.num_image_tokens} tokens; "
            f"give {config.num_image_tokens + 2} or more"
        )
    ids = (train_config.batch_size, text_len), jnp.int32
    shapes: BatchShapes = {"tokens": ids, "labels": ids}
    if config.vision:
        size = config.vision.image_size
        shapes["images"] = ((train_config.batch_size, size, size, 3), jnp.uint8)
    return shapes


def shapes_of(batch: Mapping[str, np.ndarray]) -> BatchShapes:
    """Shapes and dtypes of the step's inputs in a host batch: all arrays except the example indices."""
    return {name: (array.shape, array.dtype) for name, array in batch.items() if name != "examples"}


def training_plan(
    name: str,
    config: SphinxConfig,
    gpu: Gpu,
    shape: MeshShape,
    train_config: TrainConfig,
    batch_shapes: BatchShapes,
    auxiliary_loss: AuxiliaryLoss | None = None,
) -> Plan:
    """The plan of one optimizer step of `train.py`. Raises UserError or LayoutError if that is impossible."""
    mesh, compiler = planning_mesh(gpu, shape)
    program = train_program(config, train_config, mesh, auxiliary_loss)
    batch = abstract_batch(batch_shapes, mesh)
    (compiled,) = compile_jobs(
        [Job("training step", program.step, (program.state, batch, program.frozen_params))], mesh
    )

    # Gradients are temporaries of the step; they are reported on their own as far as temporaries go.
    gradients = _gradient_bytes(program)
    temporaries = compiled.memory.temporaries + compiled.memory.results
    text_len, has_images = batch_shapes["tokens"][0][1], "images" in batch_shapes
    length = text_len + config.num_image_tokens * has_images
    flops = step_flops(program, text_len, has_images, include_remat=True)
    model = program.params["model"]
    parts = model | ({"adapters": program.params["adapters"]} if train_config.lora else {})
    seconds = flops.per_device_max / gpu.bf16_flops
    tokens = train_config.batch_size * length
    return Plan(
        job=_job_text(name, train_config, length),
        gpu=gpu,
        mesh=dict(mesh.shape),
        compiler=compiler,
        parameters={part: bytes_per_device(tree) for part, tree in parts.items()},
        optimizer=bytes_per_device(program.state.opt_state),
        gradients=min(gradients, temporaries),
        kv_cache=0,
        inputs=bytes_per_device(batch),
        temporaries=temporaries - min(gradients, temporaries),
        share={"parameters": fraction_of_parameters(model), "flops": flops.per_device_max / flops.total},
        roofline={"step_seconds_at_least": seconds, "tokens_per_second_at_most": tokens / seconds},
        programs=(compiled,),
        main_program="training step",
        tokens_per_second=tokens / seconds,
        command=_training_command(name, train_config, shape, None if auxiliary_loss else length),
        notes=(f"Trainable parameters are float32. AdamW stores {MOMENTS[train_config.moments]}.",),
    )


def abstract_batch(batch_shapes: BatchShapes, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch on `mesh`: dimension 0 over the "batch" axes, all others replicated."""

    def abstract(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        placed = sharding.named_sharding(("batch", *[None] * (len(dims) - 1)), dims, mesh)
        return jax.ShapeDtypeStruct(dims, dtype, sharding=placed)

    return {key: abstract(*shape) for key, shape in batch_shapes.items()}


def _gradient_bytes(program: TrainProgram) -> int:
    """Bytes of the gradients on each device: of one batch in the compute dtype, accumulated in float32."""
    pairs = zip(*map(jax.tree.leaves, (program.params, program.trainable)), strict=True)
    train_config = program.train_config
    dtype = jnp.dtype(train_config.dtype if train_config.grad_accum_steps == 1 else "float32")
    return bytes_per_device(
        [jax.ShapeDtypeStruct(p.shape, dtype, sharding=p.sharding) for p, is_trainable in pairs if is_trainable]
    )


def _job_text(name: str, train_config: TrainConfig, length: int) -> str:
    lora = train_config.lora
    adapters = f" of rank {lora.rank} on {lora.target_modules}" if lora else ""
    base = f", {train_config.quantize} base" if train_config.quantize else ""
    microbatches = f" in {train_config.grad_accum_steps} microbatches" if train_config.grad_accum_steps > 1 else ""
    return (
        f"{name}, {train_config.stage}{adapters}{base}: batch {train_config.batch_size} × {length:,} tokens"
        f"{microbatches}, "
        f"{train_config.dtype}, remat {train_config.remat}, {train_config.moments} moments"
        f"{', sequence parallel' * train_config.sequence_parallel}"
    )


def training_sweep(
    plan: Callable[[MeshShape, TrainConfig], Plan], meshes: list[MeshShape], train_config: TrainConfig
) -> Iterator[Plan]:
    """Plans for all meshes, then for the two best of them with other rematerialisation and larger batches."""
    plans: dict[MeshShape, Plan] = {}
    for shape in meshes:
        if train_config.batch_size % (shape.fsdp * shape.data * train_config.grad_accum_steps) == 0:
            plans[shape] = plan(shape, train_config)
            yield plans[shape]
    if not plans:
        raise UserError(
            f"--batch-size {train_config.batch_size} is divisible over none of the meshes; give a multiple of "
            f"{min(shape.fsdp for shape in meshes) * train_config.grad_accum_steps}"
        )
    for shape in sorted(plans, key=lambda shape: sort_key(plans[shape]))[:2]:
        for remat in REMATS:
            if remat != train_config.remat:
                yield plan(shape, dataclasses.replace(train_config, remat=remat))
        for factor in (2, 4):
            larger = plan(shape, dataclasses.replace(train_config, batch_size=train_config.batch_size * factor))
            yield larger
            if not larger.fits:
                break


def sort_key(plan: Plan) -> tuple:
    """Sorts plans best first: those that fit, then the fastest (to two digits), then the least communication time."""
    return (not plan.fits, -float(f"{plan.tokens_per_second:.2g}"), plan.communication_seconds, -plan.headroom)


def _training_command(name: str, train_config: TrainConfig, shape: MeshShape, max_length: int | None) -> str:
    """The command line of the planned run; `max_length` None: on easy-vqa."""
    lora = train_config.lora
    options: dict[str, object] = {"preset": name}
    if lora:
        # Adapters belong to a checkpoint.
        options = {"init": name.upper(), "lora-rank": lora.rank, "lora-target-modules": lora.target_modules}
    if max_length is not None:
        options |= {"data": "DATA.yaml", "max-length": max_length}
    options |= {
        "batch-size": train_config.batch_size,
        "grad-accum-steps": train_config.grad_accum_steps,
        "stage": train_config.stage,
        "dtype": train_config.dtype,
        "remat": train_config.remat,
        "moments": train_config.moments,
    }
    if train_config.quantize:
        options["quantize"] = train_config.quantize
    flags = [f"--{option} {value}" for option, value in options.items()]
    flags += ["--sequence-parallel"] * train_config.sequence_parallel
    return f"python train.py {' '.join(flags)} {mesh_flags(shape)}"
