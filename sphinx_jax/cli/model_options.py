"""Which model runs and how it is placed: options and loading, the same for every command that runs one."""

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from jax.sharding import Mesh
from rich.console import Console

import sharding
import sphinx_jax
from sharding import is_primary_process
from sphinx_jax import Sphinx, UserError, checkpoints
from sphinx_jax.checkpoints.adapters import read_adapters
from sphinx_jax.checkpoints.formats import native
from sphinx_jax.cli import common
from sphinx_jax.cli.common import NO_PLAN, PlanOptions
from sphinx_jax.cli.plan import plan_inference
from sphinx_jax.cli.startup import keep_freed_memory
from sphinx_jax.config import preset
from sphinx_jax.inference import pinned_memory
from sphinx_jax.inference.adapters import served_lora
from sphinx_jax.inference.capacity import NumSeqs
from sphinx_jax.inference.engine import MAX_MODEL_LEN
from sphinx_jax.inference.generate import MAX_NUM_SEQS


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    checkpoint: Path | None = None
    """Directory of a trained run, of a published SPHINX-MoE, or of a Hugging Face Mixtral. Default: the newest run
    under ./runs, or else the small model that comes with the project."""
    max_num_seqs: NumSeqs = MAX_NUM_SEQS
    """Sequences that run at the same time, or a few more, as many for each data-parallel group; the KV cache grows with
    it. "auto": as many as fit into the memory that the parameters and the programs leave, on a CPU into a quarter of
    the host's."""
    prefix_cache_mib: int | None = None
    """Memory on each device for the KV cache of prefixes that questions share, such as their images; 0 turns prefix
    reuse off. Default: as many prefixes as sequences."""
    max_model_len: int = MAX_MODEL_LEN
    """Positions that the image, the conversation and the answer may take together."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Number format of the weights. Default: as they are stored."""
    quantize: Literal["int8", "int4"] | None = None
    """Weight-only quantization of the decoder's matrices, experts included: half or a third of bfloat16's memory. A
    checkpoint that is stored quantized needs no flag."""
    offload: bool = False
    """Keep the experts in host memory, and those used last on the devices as far as these have room. Others are copied
    when the router selects them: for a GPU that does not hold the model."""
    mesh: sharding.MeshShape = dataclasses.field(default_factory=sharding.MeshShape)
    """Devices along each axis. By default all there are: on tensor as far as the key/value heads go, then expert."""
    simulate_devices: int | None = None
    """Pretend that this CPU is so many devices; with several processes, for each of them."""
    processes: Annotated[sharding.Processes, tyro.conf.arg(name="")] = sharding.NO_PROCESSES

    @property
    def prefix_bytes(self) -> int | None:
        """--prefix-cache-mib in bytes."""
        return None if self.prefix_cache_mib is None else self.prefix_cache_mib << 20

    def check_model_options(self) -> None:
        """Raises UserError or LayoutError on a value outside its range."""
        for name in ("max_num_seqs", "simulate_devices"):
            if (value := getattr(self, name)) not in (None, "auto") and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        if self.prefix_cache_mib is not None and self.prefix_cache_mib < 0:
            raise UserError(f"--prefix-cache-mib must be 0 (no reuse) or more, got {self.prefix_cache_mib}")
        self.processes.check()


@dataclasses.dataclass(frozen=True)
class AnsweringOptions(ModelOptions):
    """Options of the commands that answer users."""

    adapters: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Adapters on the checkpoint, NAME=DIR ...: runs of train.py --stage lora, or directories of PEFT. Each request
    chooses one by its name, or the base."""
    refuse_forged_turns: bool = False
    """Refuse questions that hold the mark that ends a turn ("###" on a new line), with which a user can write turns of
    the assistant. The original passes them on, as is done by default."""
    preset: str | None = None
    """With --plan, instead of a checkpoint: nano, mixtral-140m, sphinx-tiny, sphinx-mini, mixtral-8x7b,
    sphinx-moe or, by default, sphinx-moe-1k."""
    planning: Annotated[PlanOptions, tyro.conf.arg(name="")] = NO_PLAN

    @property
    def named_adapters(self) -> dict[str, Path]:
        """--adapters by name. Raises UserError on one that is not NAME=DIR, a name twice, a DIR that is none."""
        named: dict[str, Path] = {}
        for given in itertools.chain.from_iterable(self.adapters):
            name, equals, directory = given.partition("=")
            if not (name.strip() and equals and directory):
                raise UserError(f"--adapters {given}: give NAME=DIR, a name and the directory of its adapters")
            if name in named:
                raise UserError(f"--adapters {given}: the name is given twice; choose another")
            if not Path(directory).is_dir():
                raise UserError(f"--adapters {given}: {directory} is not a directory; give the one with the adapters")
            named[name] = Path(directory)
        return named

    def check_adapters(self) -> None:
        """Raises UserError on --adapters that cannot be used, before a model is loaded."""
        if self.named_adapters and self.offload:
            raise UserError("--adapters do not go with --offload: merge them with sphinx-jax convert, or leave one out")
        if self.named_adapters and self.planning.plan and not self.checkpoint:
            raise UserError("--adapters adapt a checkpoint: give it with --checkpoint")


def plan(options: AnsweringOptions, max_num_seqs: NumSeqs) -> int:
    """Print whether it would fit on the GPUs that --gpu and --num-gpus name; 0 if it does, 1 if not."""
    source = checkpoints.open(options.checkpoint) if options.checkpoint else None
    adapters = {name: read_adapters(path, source) for name, path in options.named_adapters.items()} if source else {}
    name = options.preset or "sphinx-moe-1k"
    return plan_inference(
        options.planning,
        str(options.checkpoint or name),
        source.config if source else preset(name),
        options.mesh,
        dtype=options.dtype or (source.dtype if source else "bfloat16"),
        quantize=options.quantize or (source.quantized if source else None),
        offload=options.offload,
        max_num_seqs=max_num_seqs,
        max_model_len=options.max_model_len,
        lora=served_lora(adapters) if adapters else None,
    )


def start_process(options: ModelOptions) -> int:
    """Join the other processes and set what jax's devices need; returns the number of processes.

    Call it before jax's devices are used."""
    processes = sharding.start_processes(options.processes, catch_sigterm=False)
    if processes > 1:
        common.divert_native_stdout()
    common.enable_compilation_cache()
    if options.simulate_devices:
        sharding.simulate_devices(options.simulate_devices)
    if options.offload:
        checkpoint = options.checkpoint or default_checkpoint()
        quantize = None if native.holds_quantized(checkpoint) else options.quantize
        pinned_memory.set_host_limit(checkpoint, options.dtype, quantize, options.mesh.data)
    return processes


def load_model(options: ModelOptions, **more: Any) -> Sphinx:
    """The model that the options name, on their mesh; `more` are arguments of `sphinx_jax.load`."""
    checkpoint = chosen_checkpoint(options)
    model = sphinx_jax.load(
        checkpoint,
        chosen_mesh(options),
        options.dtype,
        max_model_len=options.max_model_len,
        quantize=options.quantize,
        offload=options.offload,
        **more,
    )
    sharding.check_processes(model.mesh)
    keep_freed_memory()
    remark(f"{checkpoint} on {model.mesh.size} device{'s' * (model.mesh.size > 1)}")
    return model


def chosen_checkpoint(options: ModelOptions) -> Path:
    """--checkpoint, or the default of process 0."""
    return options.checkpoint or sharding.broadcast_from_primary(default_checkpoint)


def chosen_mesh(options: ModelOptions) -> Mesh | None:
    """The mesh of the --mesh options; None: none was given."""
    return None if options.mesh == sharding.MeshShape() else sharding.make_mesh(**dataclasses.asdict(options.mesh))


def default_checkpoint() -> Path:
    """The newest run under ./runs, or else the checkpoint that comes with the project."""
    runs = sorted(Path("runs").glob("*/summary.json"), key=lambda file: file.stat().st_mtime)
    if not runs and not sphinx_jax.SHIPPED.is_dir():
        raise UserError(f"no run under ./runs and nothing in {sphinx_jax.SHIPPED}: run train.py, or give --checkpoint")
    return runs[-1].parent if runs else sphinx_jax.SHIPPED


def remark(text: str) -> None:
    """A remark that is no answer: dim, on standard error, of the primary process."""
    console = Console(stderr=True, highlight=False, emoji=False, quiet=not is_primary_process())
    console.print(text, style="dim", markup=False, soft_wrap=True)
