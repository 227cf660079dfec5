"""`--plan` on the command line: which meshes it looks at, and what it prints."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console

from sharding import LayoutError, MeshShape
from sphinx_jax.cli.common import PlanOptions
from sphinx_jax.config import SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.hardware import find_gpu
from sphinx_jax.kernels.quantized import Kind
from sphinx_jax.memory_plan.inference import inference_plan
from sphinx_jax.memory_plan.mesh_sweep import inference_meshes, training_meshes
from sphinx_jax.memory_plan.report import Plan, mesh_text, print_json, print_plan, print_sweep
from sphinx_jax.memory_plan.training import BatchShapes, order, training_plan, training_sweep
from sphinx_jax.training.train_config import TrainConfig


def plan_inference(
    options: PlanOptions,
    name: str,
    config: SphinxConfig,
    mesh: MeshShape,
    *,
    dtype: str,
    quantize: Kind | None,
    offload: bool,
    max_num_seqs: int,
    max_model_len: int,
) -> int:
    """Print whether `max_num_seqs` answers of up to `max_model_len` positions at a time would fit; the exit code says it too.

    Raises UserError or LayoutError on an unknown card, or a mesh that does not divide the model.
    """
    gpu = find_gpu(options.gpu)
    shapes = _meshes(options, mesh, lambda count: inference_meshes(config, count))
    size = {
        "dtype": dtype,
        "quantize": quantize,
        "offload": offload,
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
    }
    return _show((inference_plan(name, config, gpu, shape, **size) for shape in shapes), options)


def plan_training(
    options: PlanOptions,
    name: str,
    config: SphinxConfig,
    mesh: MeshShape,
    train_config: TrainConfig,
    batch: Callable[[TrainConfig], BatchShapes],
) -> int:
    """The same for one step of `train_config` on a batch of the shapes that `batch` gives for it."""
    gpu = find_gpu(options.gpu)
    shapes = _meshes(options, mesh, lambda count: training_meshes(config, count))

    def plan(shape: MeshShape, train_config: TrainConfig) -> Plan:
        return training_plan(name, config, gpu, shape, train_config, batch(train_config))

    plans = (
        training_sweep(plan, shapes, train_config) if options.sweep else (plan(shape, train_config) for shape in shapes)
    )
    return _show(plans, options)


def _meshes(
    options: PlanOptions, given: MeshShape, candidates: Callable[[int], Sequence[MeshShape]]
) -> list[MeshShape]:
    """The mesh that the user gave; or the first of the candidates for so many cards; or, to sweep, all of them.

    Raises LayoutError if the mesh given has another number of devices than --num-gpus.
    """
    if given == MeshShape():
        shapes = list(candidates(options.num_gpus or 1))
        return shapes if options.sweep else shapes[:1]
    if options.sweep:
        raise UserError("--sweep tries all meshes: leave the --mesh options out, or --sweep")
    if options.num_gpus not in (None, given.size):
        raise LayoutError(
            f"the mesh {mesh_text(dataclasses.asdict(given))} has {given.size} devices and --num-gpus is "
            f"{options.num_gpus}; leave one of them out"
        )
    return [given]


def _show(plans: Iterable[Plan], options: PlanOptions) -> int:
    """Print the plan, or of a sweep all plans as a table; the exit code says whether the (best) one fits."""
    waiting, made = Console(stderr=True), []
    with waiting.status("compiling for GPUs that are not here") as status:
        for plan in plans:
            made.append(plan)
            status.update(f"{len(made)} compiled, the last: {mesh_text(plan.mesh)}")
    made.sort(key=order)
    if options.json:
        print_json(made, options.sweep)
    elif options.sweep:
        print_sweep(made, Console())
    else:
        print_plan(made[0], Console())
    return 0 if made[0].fits else 1
