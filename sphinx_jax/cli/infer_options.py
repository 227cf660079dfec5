"""The options of `infer.py`, checked before a model is loaded."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

import sharding
from sphinx_jax.cli.common import NO_PLAN, PlanOptions
from sphinx_jax.data.images import load_image
from sphinx_jax.errors import UserError
from sphinx_jax.inference import batch_file
from sphinx_jax.inference.engine import MAX_MODEL_LEN
from sphinx_jax.inference.generate import MAX_NUM_SEQS
from sphinx_jax.inference.sampling import GREEDY, SamplingParams


@dataclasses.dataclass(frozen=True)
class Options:
    checkpoint: Path | None = None
    """Directory of a trained run, of a published SPHINX-MoE, or of a Hugging Face Mixtral. Default: the newest run
    under ./runs, or else the small model that comes with the project."""
    image: Path | None = None
    """The image that is asked about."""
    prompt: str | None = None
    """The question. Without it, and without --batch, --image chats."""
    chat: bool = False
    """Chat; through a pipe, answer each line of standard input."""
    batch: Path | None = None
    """A file of questions, one JSON object a line."""
    out: Path | None = None
    """The file that the answers to --batch are added to."""
    max_num_seqs: int = MAX_NUM_SEQS
    """Sequences of --batch that run at the same time, or a few more, as many for each data-parallel group; the KV cache
    grows with it."""
    prefix_cache_mib: int | None = None
    """Memory on each device for the KV cache of prefixes that questions of --batch share, such as their images; 0 turns
    prefix reuse off. Default: as many prefixes as sequences."""
    logprobs: bool = False
    """Add to each answer of --batch the log-probability of each of its tokens."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = GREEDY
    max_model_len: int = MAX_MODEL_LEN
    """Positions that the image, the conversation and the answer may take together."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Number format of the weights. Default: as they are stored."""
    quantize: Literal["int8", "int4"] | None = None
    """Weight-only quantization of the decoder's matrices, experts included: half or a quarter of bfloat16's memory."""
    refuse_forged_turns: bool = False
    """Refuse questions that hold the mark that ends a turn ("###" on a new line), with which a user can write turns of
    the assistant. The original passes them on, as is done by default."""
    offload: bool = False
    """Keep the decoder's layers in host memory and copy each to the devices when it runs: slow, for a GPU on which
    nothing else fits."""
    mesh: sharding.MeshShape = dataclasses.field(default_factory=sharding.MeshShape)
    """Devices along each axis. By default all there are: on tensor as far as the key/value heads go, then expert."""
    simulate_devices: int | None = None
    """Pretend that this CPU is so many devices; with several processes, for each of them."""
    processes: Annotated[sharding.Processes, tyro.conf.arg(name="")] = sharding.NO_PROCESSES
    preset: str | None = None
    """With --plan, instead of a checkpoint: nano, mixtral-140m, sphinx-tiny, sphinx-mini, mixtral-8x7b,
    sphinx-moe or, by default, sphinx-moe-1k."""
    planning: Annotated[PlanOptions, tyro.conf.arg(name="")] = NO_PLAN


def check_options(options: Options) -> None:
    """Raises UserError on what is wrong, before a model is loaded, which may take minutes."""
    for name in ("max_num_seqs", "simulate_devices"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if options.prefix_cache_mib is not None and options.prefix_cache_mib < 0:
        raise UserError(f"--prefix-cache-mib must be 0 (no reuse) or more, got {options.prefix_cache_mib}")
    options.planning.check()
    options.processes.check()
    if options.planning.plan:
        return
    if options.preset:
        raise UserError("--preset belongs to --plan; give --checkpoint, the directory of a model, to ask it")
    if (options.batch is None) != (options.out is None):
        raise UserError("--batch and --out go together: a file of questions, and one for the answers")
    if options.batch and (options.image or options.prompt is not None or options.chat):
        raise UserError("--batch stands alone: --image, --prompt and --chat belong to one question or a chat")
    if options.prompt is not None and (options.chat or not options.prompt.strip()):
        raise UserError("--prompt asks one question: it must not be empty, and --chat goes without it")


def check_files(options: Options) -> None:
    """Raises UserError on an image or a file of questions that cannot be read, likewise before a model is loaded."""
    if options.image:
        load_image(options.image)
    if options.batch and options.out:
        batch_file.check_files(options.batch, options.out)
