"""LLaMA2-Accessory directories: `consolidated.XX-of-YY.model.pth`, config.json, meta.json, vision.json.

SPHINX-MoE is published in this layout. The weights are sharded over any number of files; meta.json names the
model of the original program.
"""

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from sharding import is_primary_process
from sphinx_jax.checkpoints import reader
from sphinx_jax.checkpoints.assets import Assets, as_assets, extra_tokens_entry, write_assets
from sphinx_jax.checkpoints.formats.config_files import ConfigFile, check_types, check_vision, mistral_values
from sphinx_jax.checkpoints.io import torch_files
from sphinx_jax.checkpoints.io.mapped_file import MappedFile
from sphinx_jax.checkpoints.loaded_model import Loaded, Params
from sphinx_jax.checkpoints.mapping.language import Style, language_mappings
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.checkpoints.mapping.vision import is_ignored_vision_name, vision_mappings
from sphinx_jax.checkpoints.source import CheckpointSource, ignore_none, read_json
from sphinx_jax.checkpoints.writer import (
    InMemoryParams,
    ParamReader,
    by_param,
    new_directory,
    write_json,
    write_tensors,
)
from sphinx_jax.config import SphinxConfig, VisionConfig
from sphinx_jax.errors import UserError

_PREFIX = "llma."
_SHARD = re.compile(r"consolidated\.(\d+)-of-(\d+)\.model\.pth")

# The original program's names of its models, with image size and number of crops.
_CROPS: dict[str, tuple[int, Literal[1, 5]] | None] = {
    "mixtral": None,
    "mixtral_sparse": None,
    "mixtral_sparse_ens": (512, 1),
    "mixtral_sparse_ens5": (1024, 5),
}

# The sections of vision.json, each under its field of VisionConfig, with the name of each size in the file.
_VISION_FILE: dict[str, tuple[str, dict[str, str]]] = {
    "clip": (
        "clip_vit",
        {"width": "width", "layers": "num_layers", "heads": "num_heads", "activation": "activation"},
    ),
    "convnext": ("convnext", {"depths": "depths", "dims": "dims"}),
    "dino": ("dinov2", {"width": "width", "layers": "num_layers", "heads": "num_heads"}),
    "qformer": (
        "qformer",
        {
            "vision_width": "vision_width",
            "vision_layers": "vision_layers",
            "vision_heads": "vision_heads",
            "vision_mlp": "vision_mlp",
            "width": "width",
            "layers": "num_layers",
            "heads": "num_heads",
            "mlp": "mlp",
            "queries": "num_queries",
        },
    ),
}


def is_accessory(path: Path) -> bool:
    """Whether a directory holds files of this layout."""
    return any(_SHARD.fullmatch(file.name) for file in path.iterdir())


def load(
    path: str | os.PathLike, mesh: Mesh | None = None, dtype: str | None = None, unstacked: bool = False
) -> Loaded:
    """The model of an Accessory directory on `mesh` (None: all devices), in `dtype` (None: as stored).

    Raises UserError that names everything missing, unexpected, mis-shaped or damaged.
    """
    return reader.load(open_directory(Path(path)), mesh, dtype, unstacked)


def open_directory(path: Path) -> CheckpointSource:
    """The directory's config and files. Raises UserError; no weight is read."""
    llama_type = read_json(path / "meta.json").get("llama_type")
    if llama_type not in _CROPS:
        raise UserError(f"{path / 'meta.json'}: unknown llama_type {llama_type!r}; known are {', '.join(_CROPS)}")
    files = [torch_files.read(file) for file in _shard_files(path)]
    config, expected_tokens = _read_config(path, llama_type, files[0])

    style: Style = "base" if llama_type == "mixtral" else "sparse"
    return CheckpointSource(
        format=f"accessory ({llama_type})",
        path=path,
        config=config,
        shards=[file.tensors for file in files],
        mappings=lambda unstacked: _param_mappings(config, style, unstacked),
        is_ignored=is_ignored_vision_name if config.vision else ignore_none,
        files=tuple(files),
        expected_tokens=expected_tokens,
    )


def _param_mappings(config: SphinxConfig, style: Style, unstacked: bool) -> list[ParamMapping]:
    language = language_mappings(config.language, style, unstacked=unstacked, prefix=_PREFIX)
    return language + (vision_mappings(config.vision, config.language.dim) if config.vision else [])


def _shard_files(path: Path) -> list[Path]:
    """The files of the one set in the directory, in order. Raises UserError if the set is incomplete."""
    found = {file.name: match for file in path.iterdir() if (match := _SHARD.fullmatch(file.name))}
    totals = {int(match[2]) for match in found.values()}
    if len(totals) != 1:
        raise UserError(
            f"{path} must hold one set of consolidated.XX-of-YY.model.pth, and has {sorted(found)}; remove the others"
        )
    count = totals.pop()
    by_number = {int(match[1]): path / name for name, match in found.items()}
    missing = [f"consolidated.{i:02d}-of-{count:02d}.model.pth" for i in range(count) if i not in by_number]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; download every shard of the set")
    if len(found) != count:
        raise UserError(f"{path} must hold {count} files of one set, and has {', '.join(sorted(found))}")
    return [by_number[i] for i in range(count)]


def _read_config(path: Path, llama_type: str, first: MappedFile) -> tuple[SphinxConfig, int]:
    file = ConfigFile(path / "config.json", read_json(path / "config.json"))
    file.check_unsupported("rope_scaling")
    embedding = first.tensors.get(f"{_PREFIX}tok_embeddings.weight")
    # The original takes the vocabulary from the tokenizer and may leave -1, or nothing, in the file.
    if file.values.get("vocab_size") in (None, -1) and embedding is not None:
        file.values["vocab_size"] = embedding.shape[0]
    # The original program ignores these: heads have dim / n_heads channels and attend to the whole sequence.
    for ignored in ("head_dim", "sliding_window"):
        file.values.pop(ignored, None)
    language = file.mistral_decoder()
    views = _CROPS[llama_type]
    vision = None if views is None else _read_vision(path / "vision.json", *views)
    config = SphinxConfig(language, vision, balance_weight=file.number("load_balancing_weight", 0.1))
    return config, file.count("tokenizer_vocab_size", language.vocab_size)


def _read_vision(file: Path, image_size: int, num_crops: Literal[1, 5]) -> VisionConfig:
    published = VisionConfig(image_size=image_size, num_crops=num_crops)
    if not file.exists():
        return published
    values = read_json(file)
    known = dict(_VISION_FILE.values())
    for section, given in values.items():
        if section not in known or not isinstance(given, dict) or given.keys() - known[section].keys():
            raise UserError(f"{file}: {section!r} is not an encoder, or has sizes that no encoder of that name has")
    for field, (section, names) in _VISION_FILE.items():
        sizes = {names[key]: value for key, value in values.get(section, {}).items()}
        check_types(file, f"vision.{field}", getattr(VisionConfig(), field), sizes)
    config = _vision_config(values, published)
    return check_vision(file, config)


def _vision_config(values: dict[str, Any], published: VisionConfig) -> VisionConfig:
    """The encoders of vision.json; sizes that it does not give are the published ones."""
    encoders = {}
    for field, (section, names) in _VISION_FILE.items():
        given = values.get(section, {})
        sizes = {names[key]: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        encoders[field] = dataclasses.replace(getattr(VisionConfig(), field), **sizes)
    return VisionConfig(published.image_size, published.num_crops, **encoders)


def save(
    path: str | os.PathLike,
    config: SphinxConfig,
    params: Params,
    tokenizer: bytes | Assets | None = None,
    shards: int | None = None,
) -> None:
    """Write a model in memory; see `write`."""
    write(Path(path), config, InMemoryParams(params), as_assets(tokenizer), shards)


def write(path: Path, config: SphinxConfig, params: ParamReader, assets: Assets, shards: int | None = None) -> None:
    """The sparse layout in `shards` files (None: 1), without the tensors that no forward pass uses.

    Raises UserError if the layout cannot express `config`, if `shards` does not divide the key/value heads,
    the experts' hidden size and the vocabulary, or if `path` exists and is not empty.
    """
    shards = shards or 1
    llama_type, language = _llama_type(config), config.language
    sharded_sizes = {
        "key/value heads": language.num_kv_heads,
        "hidden size": language.hidden_dim,
        "vocabulary": language.vocab_size,
    }
    for name, size in sharded_sizes.items():
        if size % shards:
            raise UserError(f"--shards {shards} does not divide the {name}, {size}; choose a number that does")
    mappings = by_param(_param_mappings(config, "sparse", params.unstacked))
    declared = {mapping.name: (mapping.shard_shape(shards), params.dtype(mapping.path)) for mapping in mappings}
    with new_directory(path) as partial, contextlib.ExitStack() as stack:
        writers = []
        if is_primary_process():
            extra = extra_tokens_entry(assets, language.vocab_size)
            balance = {"load_balancing_weight": config.balance_weight, "rope_scaling": None}
            write_json(partial / "config.json", mistral_values(language) | balance | extra)
            write_json(partial / "meta.json", {"llama_type": llama_type})
            if config.vision:
                write_json(partial / "vision.json", _vision_values(config.vision))
            write_assets(partial, assets)
            for i in range(shards):
                file = partial / f"consolidated.{i:02d}-of-{shards:02d}.model.pth"
                writers.append(stack.enter_context(torch_files.Writer(file, declared)))
        write_tensors(mappings, params, shards, lambda shard, name, chunks: writers[shard].write(name, chunks))


def _llama_type(config: SphinxConfig) -> str:
    """The original's name of this model. Raises UserError if it has none."""
    vision = config.vision
    if config.language.head_dim_override is not None or config.language.sliding_window is not None:
        raise UserError(
            "the Accessory layout cannot describe this model's head_dim or sliding window; choose --format native"
        )
    views = vision and (vision.image_size, vision.num_crops)
    expressible = vision is None or _vision_config(_vision_values(vision), vision) == vision
    for llama_type, published_views in _CROPS.items():
        if expressible and published_views == views and llama_type != "mixtral":
            return llama_type
    raise UserError("the Accessory layout knows SPHINX-MoE's and SPHINX-MoE-1k's encoders only; choose --format native")


def _vision_values(config: VisionConfig) -> dict[str, Any]:
    return {
        section: {key: getattr(getattr(config, field), attribute) for key, attribute in names.items()}
        for field, (section, names) in _VISION_FILE.items()
        if getattr(config, field) is not None
    }
