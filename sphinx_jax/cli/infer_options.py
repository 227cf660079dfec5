"""The options of `infer.py`, checked before a model is loaded."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import sharding
from sphinx_jax.cli.common import NO_PLAN, PlanOptions
from sphinx_jax.data.images import open_image
from sphinx_jax.errors import UserError
from sphinx_jax.inference import batch_file, requests, sampling, stop_strings


@dataclasses.dataclass(frozen=True)
class Options:
    checkpoint: Path | None = None
    """Directory of a trained run, of a published SPHINX-MoE, or of a Hugging Face Mixtral. Default: the newest run
    under ./runs, or else the small model that comes with the project."""
    image: Path | None = None
    """The picture that is asked about."""
    prompt: str | None = None
    """The question. Without it, and without --batch, --image chats."""
    chat: bool = False
    """Chat; through a pipe, answer each line of standard input."""
    batch: Path | None = None
    """A file of questions, one JSON object a line."""
    out: Path | None = None
    """The file that the answers to --batch are added to."""
    max_num_seqs: int = 64
    """Questions of --batch answered at the same time, or a few more, as replicas answer equally many; the cache grows
    with it."""
    logprobs: bool = False
    """Add to each answer of --batch the log-probability of each of its tokens."""
    max_new_tokens: int = 512
    """Tokens in an answer at most."""
    temperature: float = 0.0
    """0 takes the most probable token; higher is more varied."""
    top_p: float = 0.95
    """Draw from the most probable tokens that together reach this probability."""
    top_k: int = 0
    """Draw from so many most probable tokens at most; 0 is no limit."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were used before become less probable."""
    seed: int = 0
    """With a temperature, the same seed gives the same text, on every mesh."""
    stop: tuple[str, ...] = ()
    """End the answer before any of these texts."""
    max_model_len: int = 4096
    """Positions that the picture, the conversation and the answer may take together."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Number format of the weights. Default: as they are stored."""
    quantize: Literal["int8", "int4"] | None = None
    """Keep the decoder's matrices, the experts included, in so few bits: half or a quarter of bfloat16's memory."""
    offload: bool = False
    """Keep the decoder's layers in host memory and copy each to the devices when it is its turn: slow, for a card on
    which nothing else fits."""
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
    sampling.SamplingParams(options.temperature, options.top_p, options.top_k, options.repetition_penalty)
    stop_strings.check_stops(options.stop)
    requests.Request((), None, options.max_new_tokens, options.seed)
    for name in ("max_num_seqs", "simulate_devices"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
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
    """Raises UserError on a picture or a file of questions that cannot be read, likewise before a model is loaded."""
    if options.image:
        open_image(options.image)
    if options.batch:
        batch_file.read_questions(options.batch)


def choice(options: Options) -> dict[str, Any]:
    """How the words of an answer are chosen, and when it ends."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")
    return {name: getattr(options, name) for name in names}
