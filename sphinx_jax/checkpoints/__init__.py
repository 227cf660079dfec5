"""Checkpoints of every format: native, LLaMA2-Accessory, Mixtral of Hugging Face and of Mistral; and LoRA adapters.

    loaded = checkpoints.load("SPHINX-MoE", mesh)      # the format is detected from the files
    checkpoints.save("out", config, params, tokenizer_bytes, format="mixtral")

`python -m sphinx_jax.checkpoints --help` converts and inspects.
"""

import os
import re
from pathlib import Path

import jax
from jax.sharding import Mesh

from sharding import make_mesh
from sphinx_jax.checkpoints import adapters, lora, reader
from sphinx_jax.checkpoints.assets import Assets, as_assets, has_tokenizer
from sphinx_jax.checkpoints.formats import accessory, mixtral, native, peft
from sphinx_jax.checkpoints.io.directory_digest import directory_digest
from sphinx_jax.checkpoints.loaded_model import Loaded, Params, abstract_model
from sphinx_jax.checkpoints.source import CheckpointSource, match
from sphinx_jax.checkpoints.writer import check_destination
from sphinx_jax.config import SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.kernels.quantized import QuantizedDtype, Weight
from sphinx_jax.quantization import quantized, quantized_dtype

__all__ = ["FORMATS", "CheckpointSource", "Loaded", "check_destination", "convert", "digest", "load", "open", "save"]

_FOREIGN_FORMATS = {"accessory": accessory, "mixtral": mixtral}
FORMATS = ("native", *_FOREIGN_FORMATS)
"""The formats that can be written. "mixtral" is Hugging Face's layout and holds the language part alone."""


_RECOGNISED = [
    (re.compile(pattern), advice)
    for pattern, advice in (
        (r"adapter_model\..*", "adapters of PEFT, and lacks their adapter_config.json: download it too"),
        (r".*\.gguf", "a model of llama.cpp: download the model's safetensors instead"),
        (r"(tf_model|.*\.h5|flax_model\.msgpack).*", "weights of another framework: download the safetensors instead"),
        (r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)", "and lacks the index of its files: download it too"),
    )
]
"""Files of checkpoints that are not read, by their names, and what to do instead."""


def open(path: str | os.PathLike) -> CheckpointSource:
    """The checkpoint in a directory, of any format. Reads no weights.

    Raises UserError if there is none, or if the files are visibly damaged.
    """
    path = Path(path).absolute()
    try:
        if not path.is_dir():
            raise UserError(f"{path} is not a directory; give the one that holds the checkpoint's files")
        return _open(path)
    except OSError as error:
        raise UserError(
            f"cannot read {str(path)!r:.300}: {error.strerror}; make it readable, or give another"
        ) from error


def _open(path: Path) -> CheckpointSource:
    if lora.is_lora(path):
        return lora.open_directory(path, open)
    if native.is_native(path):
        return native.open_directory(path)
    if accessory.is_accessory(path):
        return accessory.open_directory(path)
    if mixtral.is_mixtral(path):
        return mixtral.open_directory(path)
    if peft.is_peft(path):
        return adapters.with_adapters(open(peft.base_path(path)), path)
    names = sorted(file.name for file in path.iterdir())
    for pattern, advice in _RECOGNISED:
        for name in names:
            if pattern.fullmatch(name):
                raise UserError(f"{path} holds {name}, {advice}")
    raise UserError(
        f"{path} holds no known checkpoint: no params folder (native), consolidated.XX-of-YY.model.pth (Accessory), "
        "model.safetensors, pytorch_model.bin or an index of either (Hugging Face), or consolidated.* (Mistral); give "
        "the directory that has them"
    )


def digest(path: str | os.PathLike) -> str:
    """16 hexadecimal digits that tell a checkpoint from another one at its path; of copies, the same.

    Reads 128 KiB of a file at most. Raises UserError if one cannot be read.
    """
    try:
        return directory_digest(Path(path))
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}; make it readable") from error


def load(
    path: str | os.PathLike | CheckpointSource,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    unstacked: bool = True,
    transform: reader.Transform | None = None,
    on_abstract_model: reader.AbstractModelCallback | None = None,
) -> Loaded:
    """The model of a checkpoint of any format, or of one opened before, on `mesh` (None: all devices).

    `dtype` is "bfloat16", "float32", or None for as stored. `unstacked` makes the decoder's layers a list, for
    decoding, instead of stacked, for training. `transform(path, parameter)` replaces each parameter as soon as it is
    read. `on_abstract_model` is called in a thread while weights are read, with the model before any `transform`
    and with abstract parameters. Raises UserError that lists everything missing, unexpected, mis-shaped or damaged;
    then nothing is loaded.
    """
    source = path if isinstance(path, CheckpointSource) else open(path)
    return reader.load(source, mesh, dtype, unstacked, transform, on_abstract_model)


def save(
    path: str | os.PathLike,
    config: SphinxConfig,
    params: Params,
    tokenizer: bytes | Assets | None = None,
    format: str = "native",
    shards: int | None = None,
) -> None:
    """Write a model in memory. `tokenizer` is a SentencePiece file, or a checkpoint's `assets`.

    `shards`: the number of files of a published format (None: as few as usual).

    Raises UserError if `path` exists and is not empty, or the format cannot hold the model.
    """
    assets = as_assets(tokenizer)
    _check_options(format, shards, assets)
    _check_quantized(format, quantized_dtype(params))
    if format == "native":
        native.save(path, config, params, assets)
    else:
        _FOREIGN_FORMATS[format].save(path, config, params, assets, shards)


def _check_quantized(format: str, quantized: QuantizedDtype | None) -> None:
    if quantized and format != "native":
        raise UserError(
            f"{format} cannot hold weights quantized to {quantized}; write native, or load the unquantized checkpoint"
        )


def _check_options(format: str, shards: int | None, assets: Assets) -> None:
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    if shards is not None and (format == "native" or shards < 1):
        raise UserError(f"--shards {shards} does not go with format {format}; leave it out or give another number")
    if format == "native" and not has_tokenizer(assets):
        raise UserError("a native checkpoint needs a tokenizer; copy the model's tokenizer.model next to its weights")


def convert(
    source: str | os.PathLike,
    path: str | os.PathLike,
    format: str,
    shards: int | None = None,
    dtype: str | None = None,
    quantize: QuantizedDtype | None = None,
) -> None:
    """Write a checkpoint of any format in another one, in `dtype` (None: as stored), the decoder's matrices quantized
    with `quantize`.

    Checkpoints are written parameter by parameter, so that memory holds the largest one, not the model. Raises
    UserError as `load` and `save` do.
    """
    check_destination(Path(path))
    opened = open(source)
    assets = opened.assets
    _check_options(format, shards, assets)
    if opened.quantized and quantize not in (None, opened.quantized):
        raise UserError(f"{source} is quantized to {opened.quantized} already; convert the checkpoint it was made from")
    _check_quantized(format, quantize := quantize or opened.quantized)
    if format == "native" and jax.process_count() > 1:

        def transform(path: reader.ParamPath, param: Weight) -> Weight:
            return quantized(path, param, quantize)

        loaded = reader.load(opened, None, dtype, unstacked=bool(quantize), transform=transform)
        native.save(path, loaded.config, loaded.params, assets)
        return
    matched = match(opened, unstacked=True)
    _, abstract = abstract_model(opened.config, make_mesh(), dtype, unstacked=True, quantized=opened.quantized)
    with reader.CheckpointReader(opened, matched, abstract, dtype) as params:
        if format == "native":
            native.write(Path(path), opened.config, params, params.targets, assets, quantize)
        else:
            _FOREIGN_FORMATS[format].write(Path(path), opened.config, params, assets, shards)
