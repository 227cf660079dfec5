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
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.images import CLIP_MEAN, CLIP_STD
from sphinx_jax.lora_params import split
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training.auxiliary_probe import Probe, abstract_probe
from sphinx_jax.training.optimizer import adamw, is_trainable, map_with_path, only
from sphinx_jax.training.step import Batch, Metrics, Params, TrainState, make_loss, make_train_step
from sphinx_jax.training.train_config import TrainConfig, schedule
from sphinx_jax.training.train_state import abstract_state


class TrainProgram(NamedTuple):
    """`step` maps (state, batch, frozen) to (state, metrics) and may take the state over."""

    graph: nnx.GraphDef
    params: Params
    """Abstract: "model", "attributes", and "adapters" where these learn."""
    is_trainable: Params
    """Which of them learn."""
    optimizer: optax.GradientTransformation
    state: TrainState
    """Abstract."""
    frozen: Params
    """Those of `params` that are no part of the state: the model, where only adapters learn."""
    rules: sharding.Rules
    """What `step` must be traced with."""
    step: Callable[[TrainState, Batch, Params], tuple[TrainState, Metrics]]


def train_program(config: SphinxConfig, train_config: TrainConfig, mesh: Mesh) -> TrainProgram:
    """The step of `train_config` on `mesh`. Nothing is allocated. Raises LayoutError where the mesh does not fit.

    Parameters that learn are float32; the others are kept in the dtype that the model computes in.
    """
    graph, whole = sharding.abstract_params(lambda rngs: SphinxMoE(config, lora=train_config.lora, rngs=rngs), mesh)
    model, adapters = split(whole)
    flags = map_with_path(lambda path, _: is_trainable(path, train_config.stage), model)
    narrow = lambda p, is_trainable: (
        p if is_trainable else jax.ShapeDtypeStruct(p.shape, train_config.dtype, sharding=p.sharding)
    )
    probe: Probe = abstract_probe(config.language.dim, mesh) if train_config.aux_loss_weight else {}
    params = {"model": jax.tree.map(narrow, model, flags), "attributes": probe}
    all_flags = {"model": flags, "attributes": dict.fromkeys(probe, True)}
    if train_config.lora:
        params["adapters"], all_flags["adapters"] = adapters, jax.tree.map(lambda _: True, adapters)
    frozen = {"model": params["model"]} if train_config.lora else {}
    in_state = {name: tree for name, tree in params.items() if name not in frozen}
    inner = adamw(
        schedule(train_config),
        weight_decay=train_config.weight_decay,
        clip_norm=train_config.clip_norm,
        moments=train_config.moments,
    )
    optimizer = only(inner, {name: all_flags[name] for name in in_state})
    loss = make_loss(
        graph,
        config,
        flags=None if train_config.lora else flags,
        aux_loss_weight=train_config.aux_loss_weight,
        remat=train_config.remat,
        dtype=jnp.dtype(train_config.dtype),
    )
    prepared: Any = lambda params, batch: loss(params, normalised(batch))
    step = make_train_step(prepared, optimizer, sharding.shardings_of(in_state), train_config.grad_accum_steps)
    rules = sharding.SEQUENCE_PARALLEL_RULES if train_config.sequence_parallel else sharding.DEFAULT_RULES
    state = abstract_state(in_state, optimizer, mesh)
    return TrainProgram(graph, params, all_flags, optimizer, state, frozen, rules, step)


def normalised(batch: Batch) -> Batch:
    """The batch with uint8 pictures turned to float32 with CLIP's statistics, on the device."""
    if "images" not in batch:
        return batch
    pixels = batch["images"].astype(jnp.float32) / 255
    return batch | {"images": (pixels - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)}
