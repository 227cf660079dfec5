"""The options of `infer.py`, checked before a model is loaded."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from sphinx_jax.cli.model_options import AnsweringOptions
from sphinx_jax.data.images import load_image
from sphinx_jax.errors import UserError
from sphinx_jax.inference import batch_file
from sphinx_jax.inference.sampling import GREEDY, SamplingParams


@dataclasses.dataclass(frozen=True)
class Options(AnsweringOptions):
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
    adapter: str | None = None
    """Name of the one of --adapters that answers; with --batch, the questions that name no model. Default: the base."""
    logprobs: bool = False
    """Add to each answer of --batch the log-probability of each of its tokens."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = GREEDY


def check_options(options: Options) -> None:
    """Raises UserError on what is wrong, before a model is loaded, which may take minutes."""
    options.check_model_options()
    options.planning.check()
    options.check_adapters()
    if options.adapter is not None and options.adapter not in options.named_adapters:
        raise UserError(f"--adapter {options.adapter}: none has this name; give --adapters {options.adapter}=DIR")
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
