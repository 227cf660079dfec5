"""Mixtral directories: Hugging Face's safetensors, and Mistral's own consolidated files.

Both hold the language model alone. Tensors are not sharded: a set of several files assigns each tensor to one file.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sharding import is_primary_process
from sphinx_jax.checkpoints import reader
from sphinx_jax.checkpoints.assets import HF_CONFIG, Assets, as_assets, extra_tokens_entry, read_hf_config, write_assets
from sphinx_jax.checkpoints.formats.config_files import ConfigFile, check_decoder, head_dim_override
from sphinx_jax.checkpoints.io import safetensors_files, torch_files
from sphinx_jax.checkpoints.io.mapped_file import MappedFile
from sphinx_jax.checkpoints.io.names import shorten
from sphinx_jax.checkpoints.loaded_model import Loaded, Params
from sphinx_jax.checkpoints.mapping.language import Style, language_mappings
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.checkpoints.source import CheckpointSource, read_json
from sphinx_jax.checkpoints.writer import (
    InMemoryParams,
    ParamReader,
    by_param,
    new_directory,
    write_json,
    write_tensors,
)
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.errors import UserError

log = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHTS = ((_SINGLE, _INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""The single file, and the index of several, of each kind of weights."""
_CONSOLIDATED = re.compile(r"consolidated(\.\d+|-\d+-of-\d+)?\.(pth|pt|safetensors)")
_NUMBERED = re.compile(r"consolidated-\d+-of-(\d+)\.safetensors")
_MAX_FILES = 10_000

# The released model's coefficient; Mistral's own config has none.
_BALANCE_WEIGHT = 0.02

_FILE_BYTES = 5e9

# The values of transformers' MixtralConfig for keys that a config.json leaves out.
_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.001,
}
_DEFAULT_ROPE_THETA = 1e6

# Keys of a model's own config.json that an export writes anew, or that do not describe what it writes.
_NOT_KEPT = frozenset(
    (
        *("rope_scaling", "rope_parameters", "dtype", "num_experts", "attention_bias", "auto_map", "_name_or_path"),
        *("transformers_version", "tokenizer_vocab_size"),
    )
)

# Of Mixtral-8x7B's tokenizer: BOS before a text, no EOS after it.
_TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "legacy": True,
    "clean_up_tokenization_spaces": False,
}

# Never parameters of transformers' Mixtral, which ignores them: biases of attention, and buffers of older versions.
_BIAS = re.compile(r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.bias")
_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def is_mixtral(path: Path) -> bool:
    """Whether a directory holds files of either layout."""
    return _is_hugging_face(path) or any(_CONSOLIDATED.fullmatch(file.name) for file in path.iterdir())


def _is_hugging_face(path: Path) -> bool:
    return any(_is_present(path / name) for names in _WEIGHTS for name in names)


def load(
    path: str | os.PathLike, mesh: Mesh | None = None, dtype: str | None = None, unstacked: bool = False
) -> Loaded:
    """The model of a Mixtral directory on `mesh` (None: all devices), in `dtype` (None: as stored).

    Raises UserError that names everything missing, unexpected, mis-shaped or damaged.
    """
    return reader.load(open_directory(Path(path)), mesh, dtype, unstacked)


def open_directory(path: Path) -> CheckpointSource:
    """The directory's config and files. Raises UserError; no weight is read."""
    return _open_hugging_face(path) if _is_hugging_face(path) else _open_mistral(path)


def _open_hugging_face(path: Path) -> CheckpointSource:
    language, balance_weight = _hugging_face_config(path / "config.json")
    files = [_read_file(file) for file in _hugging_face_files(path)]
    tensors = _canonical_names(_merge(files))
    is_fused = any(name.endswith(".experts.gate_up_proj") for name in tensors)
    style: Style = "hugging_face_fused" if is_fused else "hugging_face"
    config = ConfigFile(path / "config.json", read_json(path / "config.json"))
    renamed = _tied_names(tensors, config.values)
    _warn_of_biases(path, tensors)

    def mappings(unstacked: bool) -> list[ParamMapping]:
        untied = language_mappings(language, style, unstacked=unstacked)
        return [dataclasses.replace(m, name=renamed.get(m.name, m.name)) for m in untied]

    return CheckpointSource(
        format="mixtral (Hugging Face)",
        path=path,
        config=SphinxConfig(language, vision=None, balance_weight=balance_weight),
        shards=[tensors],
        mappings=mappings,
        is_ignored=lambda name: bool(_BIAS.fullmatch(name) or _BUFFER.fullmatch(name)),
        files=tuple(files),
        expected_tokens=config.count("tokenizer_vocab_size", language.vocab_size),
    )


def _open_mistral(path: Path) -> CheckpointSource:
    language = _mistral_config(path / "params.json")
    paths = sorted(file for file in path.iterdir() if _CONSOLIDATED.fullmatch(file.name))
    _check_complete(path, paths)
    files = [_read_file(file) for file in paths]
    tensors = _merge(files)
    style: Style = "mistral_sparse" if any(".block_sparse_moe." in name for name in tensors) else "base"
    return CheckpointSource(
        format="mixtral (Mistral consolidated)",
        path=path,
        config=SphinxConfig(language, vision=None, balance_weight=_BALANCE_WEIGHT),
        shards=[tensors],
        mappings=lambda unstacked: language_mappings(language, style, unstacked=unstacked),
        files=tuple(files),
        expected_tokens=language.vocab_size,
    )


def _check_complete(path: Path, files: list[Path]) -> None:
    """Raises UserError if a file of consolidated-0000X-of-0000Y.safetensors is missing."""
    found = {match[0]: int(match[1]) for file in files if (match := _NUMBERED.fullmatch(file.name))}
    for total in set(found.values()):
        expected = [f"consolidated-{i:05d}-of-{total:05d}.safetensors" for i in range(1, min(total, _MAX_FILES) + 1)]
        missing = [name for name in expected if name not in found]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing[:20])}; download every file of the set")


def _canonical_names(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Tensors under the names of one style: transformers 5 also reads experts that are not fused from `mlp`."""
    if any(".mlp.experts.0." in name for name in tensors):
        return {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in tensors.items()}
    return tensors


def _tied_names(tensors: Mapping[str, np.ndarray], config: dict[str, Any]) -> dict[str, str]:
    """The name to read instead of each missing one of embedding and output head, where the config ties them.

    As in transformers, tied tensors that are both in the files, and may differ, are read separately.
    """
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if config.get("tie_word_embeddings") is not True:
        return {}
    return {name: other for name, other in (names, names[::-1]) if name not in tensors and other in tensors}


def _warn_of_biases(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Log that attention biases are left out, as transformers does: Mixtral has none."""
    biases = [name for name, tensor in tensors.items() if _BIAS.fullmatch(name) and np.any(tensor)]
    if biases:
        log.warning(
            "%s holds %d biases of attention, %s and others, which Mixtral does not have: they are ignored, as "
            "transformers ignores them",
            path,
            len(biases),
            biases[0],
        )


def _hugging_face_files(path: Path) -> list[Path]:
    """The files of the weights: the single one, or those that an index names. Raises UserError if any is missing.

    Safetensors go before torch's files, and a single file before an index, as in transformers.
    """
    for single, index in _WEIGHTS:
        if _is_present(path / single):
            return [path / single]
        if _is_present(path / index):
            return _indexed_files(path, index)
    raise UserError(f"{path} holds no weights; download it again")


def _indexed_files(path: Path, index: str) -> list[Path]:
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{path / index} lacks 'weight_map', from the names of tensors to files; download it again")
    names = sorted(set(weight_map.values()))
    # A name with a directory in it could point anywhere, and some are no names of files.
    outside = [
        name
        for name in names
        if Path(name).name != name or name in ("", "..") or "\0" in name or len(name.encode()) > 255
    ]
    missing = [name for name in names if name not in outside and not _is_present(path / name)]
    if outside or missing:
        listed = ", ".join(map(shorten, (outside + missing)[:20]))
        raise UserError(f"{path} lacks {listed}, which {index} names; download every file")
    return [path / name for name in names]


def _is_present(file: Path) -> bool:
    """Whether there is a file of this name, be it a dangling link, of which its reader says more."""
    return file.exists() or file.is_symlink()


def _read_file(file: Path) -> MappedFile:
    return (safetensors_files if file.suffix == ".safetensors" else torch_files).read(file)


def _merge(files: list[MappedFile]) -> Mapping[str, np.ndarray]:
    """All tensors of the files. Raises UserError if two files hold one name."""
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        duplicates = sorted(tensors.keys() & file.tensors.keys())
        if duplicates:
            raise UserError(
                f"{file.path} holds {shorten(duplicates[0])}, which another file of the set holds too; remove one"
            )
        tensors |= file.tensors
    return tensors


def _hugging_face_config(path: Path) -> tuple[DecoderConfig, float]:
    """The decoder's config, and the weight of the router's balance loss. Raises UserError."""
    values = read_json(path)
    if values.get("model_type") != "mixtral":
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}; only 'mixtral' can be loaded")
    if "num_experts" in values:
        values.setdefault("num_local_experts", values["num_experts"])
    file = ConfigFile(path, _DEFAULTS | values)
    file.check_unsupported("quantization_config")
    file.check_unsupported("hidden_act", "silu", "swish")
    heads, dim = file.count("num_attention_heads"), file.count("hidden_size")
    config = DecoderConfig(
        dim=dim,
        hidden_dim=file.count("intermediate_size"),
        num_layers=file.count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=file.count("num_key_value_heads", heads),
        num_experts=file.count("num_local_experts"),
        experts_per_token=file.count("num_experts_per_tok"),
        vocab_size=file.count("vocab_size"),
        norm_eps=file.number("rms_norm_eps", 1e-5),
        rope_theta=_rope_theta(file),
        head_dim_override=head_dim_override(file.optional_count("head_dim"), dim, heads),
        sliding_window=file.optional_count("sliding_window"),
    )
    return check_decoder(path, config), file.number("router_aux_loss_coef", 0.0)


def _rope_theta(file: ConfigFile) -> float:
    """The base of the rotary frequencies, found where transformers finds it. Raises UserError on a scaled rotary."""
    # `rope_scaling`, the name before transformers 5, replaces `rope_parameters`; a theta inside precedes the top one.
    name = next((name for name in ("rope_scaling", "rope_parameters") if file.values.get(name)), None)
    rope = file.section(name) if name else ConfigFile(file.file, {})
    if "rope_type" not in rope.values and "type" in rope.values:
        rope.values["rope_type"] = rope.values["type"]
    rope.check_unsupported("rope_type", "default")
    for partial in (rope, file):
        partial.check_unsupported("partial_rotary_factor", 1)
    theta = file.number("rope_theta", _DEFAULT_ROPE_THETA)
    theta = rope.number("rope_theta", theta)
    if theta == 0:
        raise UserError(f"{file.file}: 'rope_theta' must be above 0")
    return theta


def _mistral_config(path: Path) -> DecoderConfig:
    file = ConfigFile(path, read_json(path))
    file.check_unsupported("rope_scaling")
    return file.mistral_decoder()


def save(
    path: str | os.PathLike,
    config: SphinxConfig,
    params: Params,
    tokenizer: bytes | Assets | None = None,
    shards: int | None = None,
) -> None:
    """Write the language part of a model in memory; see `write`."""
    write(Path(path), config, InMemoryParams(params), as_assets(tokenizer), shards)


def write(path: Path, config: SphinxConfig, params: ParamReader, assets: Assets, shards: int | None = None) -> None:
    """The language part as a Hugging Face directory of `shards` files (None: of about 5 GB each).

    Raises UserError if `path` exists and is not empty.
    """
    mappings = by_param(language_mappings(config.language, "hugging_face", unstacked=params.unstacked))
    declared = {mapping.name: (mapping.shape, params.dtype(mapping.path)) for mapping in mappings}
    file_of = _assign_files(declared, shards)
    with new_directory(path) as partial, contextlib.ExitStack() as stack:
        writers: dict[str, safetensors_files.Writer] = {}
        if is_primary_process():
            write_json(partial / "config.json", _hugging_face_values(config, declared["lm_head.weight"][1], assets))
            write_assets(partial, _tokenizer_assets(assets))
            if _SINGLE not in file_of.values():
                total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in declared.values())
                write_json(partial / _INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})
            for name in sorted(set(file_of.values())):
                in_file = {tensor: declared[tensor] for tensor in declared if file_of[tensor] == name}
                writers[name] = stack.enter_context(safetensors_files.Writer(partial / name, in_file))
        write_tensors(mappings, params, 1, lambda _, name, chunks: writers[file_of[name]].write(name, chunks))


def _assign_files(declared: Mapping[str, tuple[tuple[int, ...], np.dtype]], shards: int | None) -> dict[str, str]:
    """The file name of each tensor: contiguous runs of about equal bytes."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in declared.values()]
    total = sum(sizes)
    count = min(shards or math.ceil(total / _FILE_BYTES), len(sizes))
    midpoints = [end - size / 2 for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
    numbers = [int(midpoint * count / total) for midpoint in midpoints]
    used = sorted(set(numbers))
    if len(used) == 1:
        return dict.fromkeys(declared, _SINGLE)
    names = {n: f"model-{i:05d}-of-{len(used):05d}.safetensors" for i, n in enumerate(used, 1)}
    return {tensor: names[n] for tensor, n in zip(declared, numbers, strict=True)}


def _tokenizer_assets(assets: Assets) -> dict[str, bytes]:
    """The files of a Hugging Face directory. A SentencePiece file alone gets the settings of Mixtral's tokenizer."""
    written = {name: data for name, data in assets.items() if name != HF_CONFIG}
    if set(written) == {"tokenizer.model"}:
        written["tokenizer_config.json"] = (json.dumps(_TOKENIZER_CONFIG, indent=2) + "\n").encode()
    return written


def _hugging_face_values(config: SphinxConfig, dtype: np.dtype, assets: Assets) -> dict[str, Any]:
    """config.json: what the model's own one had, with the sizes and settings of `config`."""
    language = config.language
    kept = {key: value for key, value in read_hf_config(assets).items() if key not in _NOT_KEPT}
    return (
        {"bos_token_id": 1, "eos_token_id": 2}
        | kept
        | extra_tokens_entry(assets, language.vocab_size)
        | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": language.dim,
            "intermediate_size": language.hidden_dim,
            "num_hidden_layers": language.num_layers,
            "num_attention_heads": language.num_heads,
            "num_key_value_heads": language.num_kv_heads,
            "num_local_experts": language.num_experts,
            "num_experts_per_tok": language.experts_per_token,
            "head_dim": language.head_dim,
            "vocab_size": language.vocab_size,
            "rms_norm_eps": language.norm_eps,
            "rope_theta": language.rope_theta,
            "router_aux_loss_coef": config.balance_weight,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "sliding_window": language.sliding_window,
            "torch_dtype": dtype.name,
        }
    )
