"""What decides the answers of an evaluation, and what else is worth knowing about its run."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sphinx_jax.errors import UserError
from sphinx_jax.inference.answers_file import check_settings, write_whole
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.sphinx import Sphinx

_FILE = "run.json"


def model_settings(model: Sphinx, params: SamplingParams) -> dict[str, Any]:
    """What decides the answers of all tasks. A checkpoint is known by the digest of its files, wherever it is."""
    own = {name: value for name, value in model.settings().items() if name != "checkpoint"}
    return own | {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "seed")}


def prepare_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of an evaluation, and record the settings in it.

    Raises UserError if it cannot be written, or holds answers that were made with other settings.
    """
    file = out / _FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file.exists() and any(out.glob("*.jsonl")):
            check_settings(json.loads(file.read_bytes()), settings, f"--out {out}")
        write_whole(file, (json.dumps(settings, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); choose another --out, or remove this folder") from error


def run_description(model: Sphinx) -> dict[str, Any]:
    """Checkpoint, devices and versions, for the entry "run" of results.json."""
    return {
        "checkpoint": None if model.path is None else str(model.path),
        "mesh": {name: int(size) for name, size in model.mesh.shape.items()},
        "device": model.mesh.devices.flat[0].device_kind,
        "processes": jax.process_count(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Of the libraries that determine the answers."""
    names = ("jax", "jaxlib", "flax", "numpy", "pillow", "sentencepiece")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def options_used(options: Any) -> dict[str, Any]:
    """The options of a command, without those at their defaults."""
    fields = [field for field in dataclasses.fields(options) if getattr(options, field.name) != _default(field)]
    return json.loads(json.dumps({f.name: getattr(options, f.name) for f in fields}, default=_as_json))


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default  # pyright: ignore[reportCallIssue]


def _as_json(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
