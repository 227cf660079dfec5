"""The small files next to the weights: tokenizer, generation config, chat template. Read whole, written unchanged."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from sphinx_jax.checkpoints.io.placeholders import check_real_file
from sphinx_jax.errors import UserError

Assets = Mapping[str, bytes]
"""File names to contents."""

HF_CONFIG = "hugging_face_config.json"
"""The name under which other formats keep config.json of a Hugging Face directory, so that an export has it again."""

_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    HF_CONFIG,
)
_VERSIONED = re.compile(r"tokenizer\.model\.v(\d+)")
_MAX_BYTES = 1 << 27


def read_assets(path: Path) -> dict[str, bytes]:
    """The assets in a directory. Raises UserError if one cannot be read or is a placeholder for the real file.

    tokenizer.model.v3, as Mistral calls a newer tokenizer, is tokenizer.model where there is no such file.
    """
    files = {name: path / name for name in _NAMES if (path / name).is_file()}
    if "tokenizer.model" not in files:
        versions = {int(m[1]): file for file in path.iterdir() if (m := _VERSIONED.fullmatch(file.name))}
        if versions:
            files["tokenizer.model"] = versions[max(versions)]
    assets = {name: _read(file) for name, file in files.items()}
    if HF_CONFIG not in assets and is_hf_config(path / "config.json"):
        assets[HF_CONFIG] = _read(path / "config.json")
    return assets


def is_hf_config(file: Path) -> bool:
    """Whether a file is the config.json of a Hugging Face directory."""
    return file.is_file() and file.stat().st_size <= _MAX_BYTES and b'"model_type"' in file.read_bytes()


def has_tokenizer(assets: Assets) -> bool:
    return "tokenizer.model" in assets or "tokenizer.json" in assets


def as_assets(tokenizer: bytes | Assets | None) -> Assets:
    """Assets themselves, or those of a SentencePiece file alone."""
    if tokenizer is None:
        return {}
    return {"tokenizer.model": tokenizer} if isinstance(tokenizer, bytes) else tokenizer


def write_assets(directory: Path, assets: Assets) -> None:
    for name, data in assets.items():
        (directory / name).write_bytes(data)


def extra_tokens_entry(assets: Assets, vocab_size: int) -> dict[str, int]:
    """What config.json has to say of a tokenizer that has fewer tokens than the model, as small data sets make them."""
    data = assets.get("tokenizer.model")
    pieces = _count_pieces(data) if data is not None and set(assets) <= {"tokenizer.model", HF_CONFIG} else None
    return {} if pieces is None or pieces >= vocab_size else {"tokenizer_vocab_size": pieces}


def _read(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > _MAX_BYTES:
            raise UserError(f"{file} has {size:,} bytes, too many for a file of its name; copy the model's own")
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; copy it again or make it readable") from error
    check_real_file(file, data[:1024])
    return data


def _count_pieces(model: bytes) -> int | None:
    """Pieces of a SentencePiece model: the fields 1 of its protocol buffer; None if it is none."""
    count, at = 0, 0
    while at < len(model):
        tag, at = _varint(model, at)
        if tag & 7 != 2:
            return None
        size, at = _varint(model, at)
        count, at = count + (tag >> 3 == 1), at + size
    return count if at == len(model) else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while at < len(data) and shift < 63:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            break
    return value, at


def read_hf_config(assets: Assets) -> dict:
    """The values of the Hugging Face config that the model once came with, empty if there is none."""
    try:
        values = json.loads(assets[HF_CONFIG].decode("utf-8-sig")) if HF_CONFIG in assets else {}
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
