"""What training takes: the step of a recipe, for batches of a given shape."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from sharding import MeshShape, Program, bytes_per_device
from sphinx_jax.config import SphinxConfig
from sphinx_jax.costs import fraction_of_parameters
from sphinx_jax.errors import UserError
from sphinx_jax.hardware import Gpu
from sphinx_jax.memory_plan.aot import planning_mesh
from sphinx_jax.memory_plan.jobs import Job, compile_jobs
from sphinx_jax.memory_plan.mesh_sweep import mesh_flags
from sphinx_jax.memory_plan.report import Plan
from sphinx_jax.training.moments import MOMENTS
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import TrainConfig, check_batch
from sphinx_jax.training.utilisation import step_flops

BatchShapes = dict[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype of each array of a batch."""


def training_batch(config: SphinxConfig, train_config: TrainConfig, length: int) -> BatchShapes:
    """A batch of sequences of `length` positions, the picture included. Raises UserError if it leaves no text."""
    text = length - config.num_image_tokens
    if text < 2:
        raise UserError(
            f"--max-length {length} is too short: the picture alone takes {config.num_image_tokens} positions; "
            f"give {config.num_image_tokens + 2} or more"
        )
    ids = (train_config.batch_size, text), jnp.int32
    shapes: BatchShapes = {"tokens": ids, "labels": ids}
    if config.vision:
        size = config.vision.image_size
        shapes["images"] = ((train_config.batch_size, size, size, 3), jnp.uint8)
    return shapes


def shapes_of(batch: Mapping[str, np.ndarray]) -> BatchShapes:
    """The shapes of what the step sees of a batch in memory: all but the numbers of its examples."""
    return {name: (array.shape, array.dtype) for name, array in batch.items() if name != "examples"}


def training_plan(
    name: str,
    config: SphinxConfig,
    gpu: Gpu,
    shape: MeshShape,
    train_config: TrainConfig,
    batch_shapes: BatchShapes,
) -> Plan:
    """What `train.py` takes for one optimizer step. Raises UserError or LayoutError where that cannot be."""
    mesh, compiler = planning_mesh(gpu, shape)
    check_batch(train_config, mesh)
    program = train_program(config, train_config, mesh)
    names = lambda dims: ("batch", *[None] * (len(dims) - 1))
    batch = {
        key: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding.named_sharding(names(dims), dims, mesh))
        for key, (dims, dtype) in batch_shapes.items()
    }
    step = Program(program.step, (0,), rules=program.rules, slices_in_place=True)
    job = Job("training step", step, (program.state, batch, program.frozen))
    (compiled,) = compile_jobs([job], mesh)

    learning = [
        leaf
        for leaf, is_trainable in zip(*map(jax.tree.leaves, (program.params, program.is_trainable)), strict=True)
        if is_trainable
    ]
    # A whole batch at once is differentiated in the dtype that is computed in; parts are added up in float32.
    width = jnp.dtype(train_config.dtype if train_config.grad_accum_steps == 1 else "float32")
    gradients = bytes_per_device([jax.ShapeDtypeStruct(p.shape, width, sharding=p.sharding) for p in learning])
    made = compiled.memory.temporaries + compiled.memory.results
    text, pictures = batch_shapes["tokens"][0][1], "images" in batch_shapes
    flops = step_flops(config, program, mesh, train_config, text, pictures, recomputed=True)
    length = text + config.num_image_tokens * pictures
    model = program.params["model"]
    parts = model | ({"adapters": program.params["adapters"]} if train_config.lora else {})
    seconds = flops.busiest / gpu.bf16_flops
    tokens = train_config.batch_size * length
    adapted = f" of rank {train_config.lora.rank} on {train_config.lora.target_modules}" if train_config.lora else ""
    return Plan(
        job=(
            f"{name}, {train_config.stage}{adapted}: batch {train_config.batch_size} × {length:,} positions, {train_config.dtype}, "
            f"remat {train_config.remat}, {train_config.moments} moments{', residual sharded' * train_config.sequence_parallel}"
        ),
        gpu=gpu,
        mesh=dict(mesh.shape),
        compiler=compiler,
        parameters={part: bytes_per_device(tree) for part, tree in parts.items()},
        optimizer=bytes_per_device(program.state.optimizer),
        gradients=min(gradients, made),
        kv_cache=0,
        inputs=bytes_per_device(batch),
        temporaries=made - min(gradients, made),
        share={"parameters": fraction_of_parameters(model), "flops": flops.busiest / flops.total},
        roofline={"step_seconds_at_least": seconds, "tokens_per_second_at_most": tokens / seconds},
        programs=(compiled,),
        main_program="training step",
        speed=tokens / seconds,
        command=_training_command(name, train_config, shape, length),
        notes=(f"Weights that learn are float32. AdamW keeps {MOMENTS[train_config.moments]}.",),
    )


def training_sweep(
    plan: Callable[[MeshShape, TrainConfig], Plan], meshes: list[MeshShape], train_config: TrainConfig
) -> Iterator[Plan]:
    """Plans for all meshes, then for the two best ones with less recomputed and with larger batches."""
    tried = {}
    for shape in meshes:
        if train_config.batch_size % (shape.fsdp * shape.data * train_config.grad_accum_steps) == 0:
            tried[shape] = plan(shape, train_config)
            yield tried[shape]
    if not tried:
        raise UserError(
            f"--batch-size {train_config.batch_size} divides over none of the meshes; give a multiple of "
            f"{min(shape.fsdp for shape in meshes) * train_config.grad_accum_steps}"
        )
    best = sorted(tried, key=lambda shape: order(tried[shape]))[:2]
    for shape in best:
        for remat in ("none", "dots", "block"):
            if remat != train_config.remat:
                yield plan(shape, dataclasses.replace(train_config, remat=remat))
        for factor in (2, 4):
            larger = plan(shape, dataclasses.replace(train_config, batch_size=train_config.batch_size * factor))
            yield larger
            if not larger.fits:
                break


def order(plan: Plan) -> tuple:
    """Sorts plans, best first: what fits, then the fastest to a hundredth, then the least exchanged."""
    exchanged = sum(collective.bytes for collective in plan.collectives)
    return (not plan.fits, -float(f"{plan.speed:.2g}"), exchanged, -plan.headroom)


def _training_command(name: str, train_config: TrainConfig, shape: MeshShape, length: int) -> str:
    lora = train_config.lora and {
        "lora-rank": train_config.lora.rank,
        "lora-target-modules": train_config.lora.target_modules,
    }
    options = {
        # Adapters belong to a checkpoint.
        **({"init": name.upper(), **lora} if lora else {"preset": name}),
        **({} if train_config.aux_loss_weight else {"data": "DATA.yaml", "max-length": length}),
        "batch-size": train_config.batch_size,
        "grad-accum-steps": train_config.grad_accum_steps,
        "stage": train_config.stage,
        "dtype": train_config.dtype,
        "remat": train_config.remat,
        "moments": train_config.moments,
    }
    said = [f"--{key} {value}" for key, value in options.items()] + [
        "--sequence-parallel"
    ] * train_config.sequence_parallel
    return f"python train.py {' '.join(said)} {mesh_flags(shape)}"
