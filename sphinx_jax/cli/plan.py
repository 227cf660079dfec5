"""`--plan` on the command line: the meshes to plan for, and the report."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.text import Text

from sharding import LayoutError, MeshShape
from sphinx_jax.cli.common import PlanOptions
from sphinx_jax.config import LoraConfig, SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.hardware import find_gpu
from sphinx_jax.inference.capacity import NumSeqs
from sphinx_jax.kernels.quantized import QuantizedDtype
from sphinx_jax.memory_plan.aot import GPUS_PER_HOST
from sphinx_jax.memory_plan.inference import inference_plan, largest_plan
from sphinx_jax.memory_plan.mesh_sweep import inference_meshes, training_meshes
from sphinx_jax.memory_plan.report import Plan, mesh_text, print_json, print_plan, print_sweep
from sphinx_jax.memory_plan.training import BatchShapes, sort_key, training_plan, training_sweep
from sphinx_jax.training.step import AuxiliaryLoss
from sphinx_jax.training.train_config import TrainConfig


def plan_inference(
    options: PlanOptions,
    name: str,
    config: SphinxConfig,
    mesh: MeshShape,
    *,
    dtype: str,
    quantize: QuantizedDtype | None,
    offload: bool,
    max_num_seqs: NumSeqs,
    max_model_len: int,
    lora: LoraConfig | None,
) -> int:
    """Print the plan for `max_num_seqs` sequences of up to `max_model_len` tokens, or with "auto" for as many as fit;
    the exit code: 0 if it fits, else 1. `lora` is the size of all adapters together.

    Raises UserError or LayoutError on an unknown GPU, or a mesh that does not divide the model.
    """
    gpu = find_gpu(options.gpu_name)
    shapes = _meshes(options, mesh, lambda num_gpus: inference_meshes(config, num_gpus))
    plan = functools.partial(inference_plan, max_num_seqs=max_num_seqs) if max_num_seqs != "auto" else largest_plan
    plans = (
        plan(
            name,
            config,
            gpu,
            shape,
            dtype=dtype,
            quantize=quantize,
            offload=offload,
            max_model_len=max_model_len,
            lora=lora,
        )
        for shape in shapes
    )
    return _report(plans, options)


def plan_training(
    options: PlanOptions,
    name: str,
    config: SphinxConfig,
    mesh: MeshShape,
    train_config: TrainConfig,
    batch: Callable[[TrainConfig], BatchShapes],
    auxiliary_loss: AuxiliaryLoss | None = None,
) -> int:
    """The same for one step of `train_config`; `batch` returns the shapes of a batch for a train config."""
    gpu = find_gpu(options.gpu_name)
    shapes = _meshes(options, mesh, lambda num_gpus: training_meshes(config, num_gpus))

    def plan(shape: MeshShape, train_config: TrainConfig) -> Plan:
        return training_plan(name, config, gpu, shape, train_config, batch(train_config), auxiliary_loss)

    if options.sweep:
        return _report(training_sweep(plan, shapes, train_config), options)
    return _report((plan(shape, train_config) for shape in shapes), options)


def _meshes(
    options: PlanOptions, given: MeshShape, candidates: Callable[[int], Sequence[MeshShape]]
) -> list[MeshShape]:
    """The user's mesh; or else the first of the candidates for --num-gpus; or with --sweep, all candidates.

    Raises LayoutError if the size of the user's mesh is not --num-gpus.
    """
    if given == MeshShape():
        shapes = list(candidates(options.num_gpus or 1))
        return shapes if options.sweep else shapes[:1]
    if options.sweep:
        raise UserError("--sweep tries all meshes: leave out either the --mesh options or --sweep")
    if options.num_gpus not in (None, given.size):
        raise LayoutError(
            f"the mesh {mesh_text(dataclasses.asdict(given))} has {given.size} devices and --num-gpus is "
            f"{options.num_gpus}; leave one of them out"
        )
    return [given]


def _report(plans: Iterable[Plan], options: PlanOptions) -> int:
    """Compile and print the plan, or of a sweep all plans; the exit code: 0 if the (best) one fits, else 1."""
    compiled = []
    with Console(stderr=True).status("compiling for absent GPUs") as status:
        for plan in plans:
            compiled.append(dataclasses.replace(plan, gpus_per_host=options.gpus_per_host or GPUS_PER_HOST))
            status.update(Text(f"{len(compiled)} compiled, the last: {mesh_text(plan.mesh)}"))
    compiled.sort(key=sort_key)
    if options.json:
        print_json(compiled, options.sweep)
    elif options.sweep:
        print_sweep(compiled)
    else:
        print_plan(compiled[0])
    return 0 if compiled[0].fits else 1
