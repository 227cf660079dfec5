"""The programs of a train config: the train step and the evaluation step, with the abstract value of each argument.

The trainer compiles them for arrays and `memory_plan` for abstract arrays, so that a plan is of the program that runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sharding
from sharding import Program
from sphinx_jax.config import SphinxConfig
from sphinx_jax.lora_params import split
from sphinx_jax.model import SphinxMoE
from sphinx_jax.quantization import abstract_quantized_params
from sphinx_jax.training.optimizer import adamw, is_trainable, map_with_path, trainable_only
from sphinx_jax.training.step import (
    AuxiliaryLoss,
    Params,
    TrainState,
    make_eval_step,
    make_loss,
    make_train_step,
    normalise_images,
)
from sphinx_jax.training.train_config import TrainConfig, check_batch, schedule
from sphinx_jax.training.train_state import abstract_state


class TrainProgram(NamedTuple):
    """What is trained, how, on which mesh; and the two steps."""

    config: SphinxConfig
    train_config: TrainConfig
    mesh: Mesh
    graph: nnx.GraphDef
    params: Params
    """Abstract: "model", with LoRA "adapters", with an auxiliary loss "aux_probe"."""
    trainable: Params
    """Mask of `params`."""
    optimizer: optax.GradientTransformation
    state: TrainState
    """Abstract."""
    frozen_params: Params
    """Those of `params` outside the state: the model, with LoRA."""
    step: Program
    """(state, batch, frozen_params) -> (state, metrics); the state is donated."""
    eval_step: Program
    """(params, batch) -> `answer_correctness` and the expert load of each layer, replicated."""


def make_model(config: SphinxConfig, train_config: TrainConfig) -> Callable[[nnx.Rngs], SphinxMoE]:
    """The model's constructor, with adapters where the train config has them."""
    return lambda rngs: SphinxMoE(config, lora=train_config.lora, rngs=rngs)


def train_program(
    config: SphinxConfig, train_config: TrainConfig, mesh: Mesh, auxiliary_loss: AuxiliaryLoss | None = None
) -> TrainProgram:
    """The programs of `train_config` on `mesh`. Nothing is allocated.

    Trainable parameters are float32; the others are stored in the compute dtype, or quantized. Raises LayoutError if
    the mesh does not fit the model, and UserError if it does not divide the batch or splits a quantized group.
    """
    check_batch(train_config, mesh)
    replicated, dtype = NamedSharding(mesh, PartitionSpec()), jnp.dtype(train_config.dtype)
    graph, all_params = sharding.abstract_params(make_model(config, train_config), mesh)
    model, adapters = split(all_params)
    model_trainable = map_with_path(lambda path, _: is_trainable(path, train_config.stage), model)

    def stored(p: jax.ShapeDtypeStruct, is_trainable: bool) -> jax.ShapeDtypeStruct:
        return p if is_trainable else jax.ShapeDtypeStruct(p.shape, dtype, sharding=p.sharding)

    params: Params = {"model": jax.tree.map(stored, model, model_trainable)}
    if train_config.quantize:
        params["model"] = abstract_quantized_params(params["model"], train_config.quantize)
    if train_config.lora:
        params["adapters"] = adapters
    if auxiliary_loss:
        params["aux_probe"] = {
            name: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=replicated)
            for name, p in auxiliary_loss.params.items()
        }
    trainable = jax.tree.map(lambda _: True, params) | {
        "model": jax.tree.map(lambda _: False, params["model"]) if train_config.lora else model_trainable
    }
    frozen_params = {"model": params["model"]} if train_config.lora else {}
    state_params = {name: tree for name, tree in params.items() if name not in frozen_params}

    adam = adamw(
        schedule(train_config),
        weight_decay=train_config.weight_decay,
        clip_norm=train_config.clip_norm,
        moments=train_config.moments,
    )
    optimizer = trainable_only(adam, {name: trainable[name] for name in state_params})
    loss = make_loss(
        graph,
        config,
        trainable=None if train_config.lora else model_trainable,
        auxiliary_loss=auxiliary_loss,
        remat=train_config.remat,
        dtype=dtype,
    )
    evaluate = make_eval_step(graph, dtype)
    step = make_train_step(
        lambda params, batch: loss(params, normalise_images(batch)),
        optimizer,
        sharding.shardings_of(state_params),
        train_config.grad_accum_steps,
    )
    state = abstract_state(state_params, optimizer, mesh)
    rules = sharding.SEQUENCE_PARALLEL_RULES if train_config.sequence_parallel else sharding.DEFAULT_RULES
    return TrainProgram(
        config=config,
        train_config=train_config,
        mesh=mesh,
        graph=graph,
        params=params,
        trainable=trainable,
        optimizer=optimizer,
        state=state,
        frozen_params=frozen_params,
        step=Program(
            step,
            (0,),
            (sharding.shardings_of(state), replicated),
            rules,
            slices_in_place=True,
            overlap_collectives=True,
        ),
        eval_step=Program(
            lambda params, batch: evaluate(params, normalise_images(batch)),
            out_shardings=replicated,
            rules=rules,
            slices_in_place=True,
        ),
    )
