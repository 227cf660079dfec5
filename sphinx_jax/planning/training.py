"""What training takes: the step of a recipe, for batches of a given shape."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from sharding import MeshShape, Program, bytes_per_device
from sharding.plan import Gpu, Plan, planning_mesh
from sphinx_jax.config import SphinxConfig
from sphinx_jax.costs import share_of_parameters
from sphinx_jax.errors import UserError
from sphinx_jax.planning.jobs import Job, compile_jobs
from sphinx_jax.planning.meshes import mesh_flags
from sphinx_jax.training.moments import MOMENTS
from sphinx_jax.training.program import train_program
from sphinx_jax.training.recipe import Recipe, check_batch
from sphinx_jax.training.utilisation import step_flops

BatchShapes = dict[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype of each array of a batch."""


def training_batch(config: SphinxConfig, recipe: Recipe, length: int) -> BatchShapes:
    """A batch of sequences of `length` positions, the picture included. Raises UserError if it leaves no text."""
    text = length - config.image_words
    if text < 2:
        raise UserError(
            f"--max-length {length} is too short: the picture alone takes {config.image_words} positions; "
            f"give {config.image_words + 2} or more"
        )
    ids = (recipe.batch_size, text), jnp.int32
    shapes: BatchShapes = {"tokens": ids, "labels": ids}
    if config.vision:
        size = config.vision.image_size
        shapes["images"] = ((recipe.batch_size, size, size, 3), jnp.uint8)
    return shapes


def shapes_of(batch: Mapping[str, np.ndarray]) -> BatchShapes:
    """The shapes of what the step sees of a batch in memory: all but the numbers of its examples."""
    return {name: (array.shape, array.dtype) for name, array in batch.items() if name != "examples"}


def training_plan(
    name: str,
    config: SphinxConfig,
    gpu: Gpu,
    shape: MeshShape,
    recipe: Recipe,
    batch_shapes: BatchShapes,
) -> Plan:
    """What `train.py` takes for one optimizer step. Raises UserError or LayoutError where that cannot be."""
    mesh, compiler = planning_mesh(gpu, shape)
    check_batch(recipe, mesh)
    program = train_program(config, recipe, mesh)
    names = lambda dims: ("batch", *[None] * (len(dims) - 1))
    batch = {
        key: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding.place(names(dims), dims, mesh))
        for key, (dims, dtype) in batch_shapes.items()
    }
    step = Program(program.step, (0,), rules=program.rules, slices_in_place=True)
    job = Job("training step", step, (program.state, batch, program.frozen))
    (compiled,) = compile_jobs([job], mesh)

    learning = [
        leaf for leaf, learns in zip(*map(jax.tree.leaves, (program.params, program.learns)), strict=True) if learns
    ]
    # A whole batch at once is differentiated in the dtype that is computed in; parts are added up in float32.
    width = jnp.dtype(recipe.dtype if recipe.accumulate == 1 else "float32")
    gradients = bytes_per_device([jax.ShapeDtypeStruct(p.shape, width, sharding=p.sharding) for p in learning])
    made = compiled.memory.temporaries + compiled.memory.results
    text, pictures = batch_shapes["tokens"][0][1], "images" in batch_shapes
    flops = step_flops(config, program, mesh, recipe, text, pictures, recomputed=True)
    length = text + config.image_words * pictures
    model = program.params["model"]
    parts = model | ({"adapters": program.params["adapters"]} if recipe.lora else {})
    seconds = flops.busiest / gpu.bf16_flops
    tokens = recipe.batch_size * length
    adapted = f" of rank {recipe.lora.rank} on {recipe.lora.target_modules}" if recipe.lora else ""
    return Plan(
        job=(
            f"{name}, {recipe.stage}{adapted}: batch {recipe.batch_size} × {length:,} positions, {recipe.dtype}, "
            f"remat {recipe.remat}, {recipe.moments} moments{', residual sharded' * recipe.shard_residual}"
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
        share={"parameters": share_of_parameters(model), "flops": flops.busiest / flops.total},
        roofline={"step_seconds_at_least": seconds, "tokens_per_second_at_most": tokens / seconds},
        programs=(compiled,),
        main_program="training step",
        speed=tokens / seconds,
        command=_training_command(name, recipe, shape, length),
        notes=(f"Weights that learn are float32. AdamW keeps {MOMENTS[recipe.moments]}.",),
    )


def training_sweep(
    plan: Callable[[MeshShape, Recipe], Plan], meshes: list[MeshShape], recipe: Recipe
) -> Iterator[Plan]:
    """Plans for all meshes, then for the two best ones with less recomputed and with larger batches."""
    tried = {}
    for shape in meshes:
        if recipe.batch_size % (shape.fsdp * shape.data * recipe.accumulate) == 0:
            tried[shape] = plan(shape, recipe)
            yield tried[shape]
    if not tried:
        raise UserError(
            f"--batch-size {recipe.batch_size} divides over none of the meshes; give a multiple of "
            f"{min(shape.fsdp for shape in meshes) * recipe.accumulate}"
        )
    best = sorted(tried, key=lambda shape: order(tried[shape]))[:2]
    for shape in best:
        for remat in ("none", "dots", "block"):
            if remat != recipe.remat:
                yield plan(shape, dataclasses.replace(recipe, remat=remat))
        for factor in (2, 4):
            larger = plan(shape, dataclasses.replace(recipe, batch_size=recipe.batch_size * factor))
            yield larger
            if not larger.fits:
                break


def order(plan: Plan) -> tuple:
    """Sorts plans, best first: what fits, then the fastest to a hundredth, then the least exchanged."""
    exchanged = sum(collective.bytes for collective in plan.collectives)
    return (not plan.fits, -float(f"{plan.speed:.2g}"), exchanged, -plan.headroom)


def _training_command(name: str, recipe: Recipe, shape: MeshShape, length: int) -> str:
    lora = recipe.lora and {"lora-rank": recipe.lora.rank, "lora-target-modules": recipe.lora.target_modules}
    options = {
        # Adapters belong to a checkpoint.
        **({"init": name.upper(), **lora} if lora else {"preset": name}),
        **({} if recipe.attribute_weight else {"data": "DATA.yaml", "max-length": length}),
        "batch-size": recipe.batch_size,
        "accumulate": recipe.accumulate,
        "stage": recipe.stage,
        "dtype": recipe.dtype,
        "remat": recipe.remat,
        "moments": recipe.moments,
    }
    said = [f"--{key} {value}" for key, value in options.items()] + ["--shard-residual"] * recipe.shard_residual
    return f"python train.py {' '.join(said)} {mesh_flags(shape)}"
