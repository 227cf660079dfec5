"""The train step of a train config: the function to compile, with the abstract value of each of its arguments.

The trainer compiles it for arrays and `memory_plan` for abstract arrays, so that a plan is of the program that runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

import sharding
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.images import CLIP_MEAN, CLIP_STD
from sphinx_jax.lora_params import split
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training.auxiliary_probe import Probe, abstract_probe
from sphinx_jax.training.optimizer import adamw, is_trainable, map_with_path, trainable_only
from sphinx_jax.training.step import Batch, Metrics, Params, TrainState, make_loss, make_train_step
from sphinx_jax.training.train_config import TrainConfig, schedule
from sphinx_jax.training.train_state import abstract_state


class TrainProgram(NamedTuple):
    """`step` maps (state, batch, frozen_params) to (state, metrics); the state may be donated."""

    graph: nnx.GraphDef
    params: Params
    """Abstract: "model", "aux_probe", and with LoRA "adapters"."""
    trainable: Params
    """Mask of `params`."""
    optimizer: optax.GradientTransformation
    state: TrainState
    """Abstract."""
    frozen_params: Params
    """Those of `params` outside the state: the model, with LoRA."""
    rules: sharding.Rules
    """The axis rules to trace `step` with."""
    step: Callable[[TrainState, Batch, Params], tuple[TrainState, Metrics]]


def train_program(config: SphinxConfig, train_config: TrainConfig, mesh: Mesh) -> TrainProgram:
    """The train step of `train_config` on `mesh`. Nothing is allocated. Raises LayoutError if the mesh does not fit.

    Trainable parameters are float32; the others are stored in the compute dtype.
    """
    graph, params = sharding.abstract_params(lambda rngs: SphinxMoE(config, lora=train_config.lora, rngs=rngs), mesh)
    model, adapters = split(params)
    trainable = map_with_path(lambda path, _: is_trainable(path, train_config.stage), model)

    def stored(p: jax.ShapeDtypeStruct, is_trainable: bool) -> jax.ShapeDtypeStruct:
        return p if is_trainable else jax.ShapeDtypeStruct(p.shape, train_config.dtype, sharding=p.sharding)

    probe: Probe = abstract_probe(config.language.dim, mesh) if train_config.aux_loss_weight else {}
    params = {"model": jax.tree.map(stored, model, trainable), "aux_probe": probe}
    all_trainable = {"model": trainable, "aux_probe": dict.fromkeys(probe, True)}
    if train_config.lora:
        params["adapters"], all_trainable["adapters"] = adapters, jax.tree.map(lambda _: True, adapters)
    frozen_params = {"model": params["model"]} if train_config.lora else {}
    in_state = {name: tree for name, tree in params.items() if name not in frozen_params}
    full_optimizer = adamw(
        schedule(train_config),
        weight_decay=train_config.weight_decay,
        clip_norm=train_config.clip_norm,
        moments=train_config.moments,
    )
    optimizer = trainable_only(full_optimizer, {name: all_trainable[name] for name in in_state})
    loss = make_loss(
        graph,
        config,
        trainable=None if train_config.lora else trainable,
        aux_loss_weight=train_config.aux_loss_weight,
        remat=train_config.remat,
        dtype=jnp.dtype(train_config.dtype),
    )

    def loss_of_uint8(params: Params, batch: Batch) -> tuple[Array, Metrics]:
        return loss(params, normalise_images(batch))

    step = make_train_step(loss_of_uint8, optimizer, sharding.shardings_of(in_state), train_config.grad_accum_steps)
    rules = sharding.SEQUENCE_PARALLEL_RULES if train_config.sequence_parallel else sharding.DEFAULT_RULES
    state = abstract_state(in_state, optimizer, mesh)
    return TrainProgram(graph, params, all_trainable, optimizer, state, frozen_params, rules, step)


def normalise_images(batch: Batch) -> Batch:
    """The batch with its uint8 images as float32, normalised with CLIP's statistics, on the device."""
    if "images" not in batch:
        return batch
    pixels = batch["images"].astype(jnp.float32) / 255
    return batch | {"images": (pixels - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)}
