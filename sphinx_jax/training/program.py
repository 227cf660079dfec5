"""The training step of a recipe: the function that is compiled, and where each of its arguments lies.

The loop compiles it for arrays, `planning` for shapes alone, so that what is planned is what runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import sharding
from sphinx_jax.adapters import split
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.images import CLIP_MEAN, CLIP_STD
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training.attributes import Probe, abstract_probe
from sphinx_jax.training.optimizer import adamw, learns, map_with_path, only
from sphinx_jax.training.recipe import Recipe, schedule
from sphinx_jax.training.state import abstract_state
from sphinx_jax.training.step import Batch, Metrics, Params, TrainState, make_loss, make_train_step


class TrainProgram(NamedTuple):
    """`step` maps (state, batch, frozen) to (state, metrics) and may take the state over."""

    graph: nnx.GraphDef
    params: Params
    """Abstract: "model", "attributes", and "adapters" where these learn."""
    learns: Params
    """Which of them learn."""
    optimizer: optax.GradientTransformation
    state: TrainState
    """Abstract."""
    frozen: Params
    """Those of `params` that are no part of the state: the model, where only adapters learn."""
    rules: sharding.Rules
    """What `step` must be traced with."""
    step: Callable[[TrainState, Batch, Params], tuple[TrainState, Metrics]]


def train_program(config: SphinxConfig, recipe: Recipe, mesh: Mesh) -> TrainProgram:
    """The step of `recipe` on `mesh`. Nothing is allocated. Raises LayoutError where the mesh does not fit.

    Parameters that learn are float32; the others are kept in the dtype that the model computes in.
    """
    graph, whole = sharding.abstract_params(lambda rngs: SphinxMoE(config, lora=recipe.lora, rngs=rngs), mesh)
    model, adapters = split(whole)
    flags = map_with_path(lambda path, _: learns(path, recipe.stage), model)
    narrow = lambda p, learns: p if learns else jax.ShapeDtypeStruct(p.shape, recipe.dtype, sharding=p.sharding)
    probe: Probe = abstract_probe(config.language.dim, mesh) if recipe.attribute_weight else {}
    params = {"model": jax.tree.map(narrow, model, flags), "attributes": probe}
    all_flags = {"model": flags, "attributes": dict.fromkeys(probe, True)}
    if recipe.lora:
        params["adapters"], all_flags["adapters"] = adapters, jax.tree.map(lambda _: True, adapters)
    frozen = {"model": params["model"]} if recipe.lora else {}
    in_state = {name: tree for name, tree in params.items() if name not in frozen}
    inner = adamw(
        schedule(recipe), weight_decay=recipe.weight_decay, clip_norm=recipe.clip_norm, moments=recipe.moments
    )
    optimizer = only(inner, {name: all_flags[name] for name in in_state})
    loss = make_loss(
        graph,
        config,
        flags=None if recipe.lora else flags,
        attribute_weight=recipe.attribute_weight,
        remat=recipe.remat,
        dtype=jnp.dtype(recipe.dtype),
    )
    prepared: Any = lambda params, batch: loss(params, normalised(batch))
    step = make_train_step(prepared, optimizer, sharding.shardings_of(in_state), recipe.accumulate)
    rules = sharding.SEQUENCE_PARALLEL_RULES if recipe.shard_residual else sharding.DEFAULT_RULES
    state = abstract_state(in_state, optimizer, mesh)
    return TrainProgram(graph, params, all_flags, optimizer, state, frozen, rules, step)


def normalised(batch: Batch) -> Batch:
    """The batch with uint8 pictures turned to float32 with CLIP's statistics, on the device."""
    if "images" not in batch:
        return batch
    pixels = batch["images"].astype(jnp.float32) / 255
    return batch | {"images": (pixels - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)}
