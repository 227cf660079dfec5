"""The options of `serve.py`, checked before a model is loaded."""

import dataclasses
import os
from pathlib import Path

from sphinx_jax.cli.model_options import AnsweringOptions, default_checkpoint
from sphinx_jax.errors import UserError
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.server.settings import Settings

KEY_VARIABLE = "SPHINX_JAX_API_KEY"

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclasses.dataclass(frozen=True)
class Options(AnsweringOptions):
    host: str = "127.0.0.1"
    """Address to listen at. The default is reachable from this machine only; 0.0.0.0 from everywhere."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    api_key: str | None = None
    """Key that clients must send, as Authorization: Bearer KEY. Others see it in the list of processes: prefer
    --api-key-file, or the environment variable SPHINX_JAX_API_KEY."""
    api_key_file: Path | None = None
    """File whose first line is the key."""
    model_name: tuple[str, ...] = ()
    """Names that clients may use for the model; answers bear the first. Default: the name of its directory."""
    temperature: float = 0.0
    """Used where a request names none; 0 takes the most probable token."""
    top_p: float = 0.95
    """Used where a request names none."""
    queue: int | None = None
    """Requests that may wait for a batch slot before others are turned away. Default: four for each slot."""
    max_body_mib: int = 32
    """Size of a request at most, in MiB: images in base64 are a third larger than their files."""
    allowed_media_root: Path | None = None
    """Folder below which requests may name images by file: URLs. Default: they may not."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the server is reached, besides localhost; "*" for any. Default with --host 0.0.0.0: any."""
    public_metrics: bool = False
    """/metrics needs no key."""
    drain_seconds: float = 30.0
    """How long running requests may go on after SIGTERM."""


def check_options(options: Options) -> None:
    """Raises UserError on what is wrong, before a model is loaded, which may take minutes."""
    options.check_model_options()
    options.planning.check()
    options.check_adapters()
    SamplingParams(temperature=options.temperature, top_p=options.top_p)
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port must be from 0 (a free one) to {2**16 - 1}, got {options.port}")
    for name, least in (("queue", 0), ("max_body_mib", 1), ("drain_seconds", 0)):
        if (value := getattr(options, name)) is not None and not least <= value < 1e6:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    if options.allowed_media_root is not None and not options.allowed_media_root.is_dir():
        raise UserError(f"--allowed-media-root {options.allowed_media_root}: is no directory; create it first")
    if options.preset and not options.planning.plan:
        raise UserError("--preset belongs to --plan; give --checkpoint, the directory of a model, to serve it")


def settings(options: Options) -> Settings:
    """What the server needs to know. Raises UserError on a key that cannot be used."""
    names = options.model_name or ((options.checkpoint or default_checkpoint()).resolve().name,)
    for name in options.named_adapters:
        if name in names:
            raise UserError(f"--adapters {name}=...: this is the name of the model itself; choose another")
    return Settings(
        model_names=names,
        temperature=options.temperature,
        top_p=options.top_p,
        queue=options.queue,
        api_key=api_key(options),
        hosts=_hosts(options),
        public_metrics=options.public_metrics,
        max_body_bytes=options.max_body_mib << 20,
        image_root=options.allowed_media_root,
        drain_seconds=options.drain_seconds,
        adapters=tuple(options.named_adapters),
    )


def api_key(options: Options) -> str | None:
    """The key of --api-key, of --api-key-file or of the environment. Raises UserError if there is none in it."""
    if options.api_key is not None and options.api_key_file is not None:
        raise UserError("--api-key and --api-key-file exclude each other; give one")
    key, where = options.api_key, "--api-key"
    if options.api_key_file is not None:
        where = f"--api-key-file {options.api_key_file}"
        try:
            key = options.api_key_file.read_text().partition("\n")[0].strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise UserError(f"{where}: cannot read the file ({reason})") from error
    elif key is None and (from_environment := os.environ.get(KEY_VARIABLE)) is not None:
        key, where = from_environment.strip(), KEY_VARIABLE
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{where}: a key is printable ASCII without spaces; make another")
    return key


def _hosts(options: Options) -> frozenset[str] | None:
    """The Host headers that are served; None: any."""
    if "*" in options.allowed_hosts:
        return None
    own = options.host if ":" not in options.host else f"[{options.host}]"
    if options.host in ("0.0.0.0", "::") and not options.allowed_hosts:
        return None
    return frozenset(name.lower() for name in (*LOOPBACK, own, *options.allowed_hosts))
