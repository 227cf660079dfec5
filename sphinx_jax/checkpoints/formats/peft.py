"""Adapters as the library PEFT saves them: adapter_config.json and adapter_model.safetensors.

They adapt transformers' Mixtral, the language part of the model (https://huggingface.co/docs/peft). A matrix [out, in]
has the factors lora_A [rank, in] and lora_B [out, rank]. transformers 5 holds the experts of a layer in one array, and
PEFT their factors in two matrices: lora_A [experts x rank, in], and lora_B [out, rank x experts] with the expert as the
faster index. Before, each expert's matrices were modules of their own; both are read, and the newer is written.

Queries, keys and values are one matrix here, and so are gate and up projection, with one `a` each. Where PEFT's A of
them differ, the factors have the sum of their ranks.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sharding import is_primary_process
from sphinx_jax.checkpoints.io import safetensors_files, torch_files
from sphinx_jax.checkpoints.io.names import shorten
from sphinx_jax.checkpoints.mapping.language import language_mappings
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.checkpoints.source import Adapters, read_json
from sphinx_jax.checkpoints.writer import new_directory, write_json
from sphinx_jax.config import DecoderConfig
from sphinx_jax.errors import UserError

_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_ATTENTION, _EXPERTS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_up_proj", "down_proj")

_FROM_HEADS = "o_proj", "down_proj"
"""Matrices whose inputs, not their outputs, are the heads or the hidden dimension."""

_PARTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("language", "layers", "attention", "wqkv"): ("q_proj", "k_proj", "v_proj"),
    ("language", "layers", "attention", "wo"): ("o_proj",),
    ("language", "layers", "ffn", "w_in"): ("gate_up_proj",),
    ("language", "layers", "ffn", "w_out"): ("down_proj",),
}
"""The published matrices that each adapted parameter consists of."""

_TENSOR = re.compile(
    r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?:self_attn\.(?P<projection>[qkvo]_proj)"
    r"|(?:mlp|block_sparse_moe)\.experts(?:\.(?P<expert>\d+)\.(?P<matrix>w[123])|(?P<inner>\.base_layer)?))"
    r"\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight"
)

# Settings that change what the factors mean, and the value with which they do not.
_UNSUPPORTED = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layer_replication": None,
}

_Factors = tuple[np.ndarray, np.ndarray]
"""A [..., rank, in] and B [..., out, rank] of one layer; the experts lead."""


def is_peft(path: Path) -> bool:
    """Whether a directory holds adapters of PEFT."""
    return (path / _CONFIG).is_file()


def base_path(path: Path) -> Path:
    """The directory of the model that the adapters in `path` were trained on. Raises UserError if it is not here."""
    name = read_json(path / _CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not Path(name).is_dir():
        raise UserError(
            f"{path} holds adapters of {name!r:.200}, which is not a directory here: give the base as the checkpoint "
            f"and --adapters NAME={path}, or write the base's directory into {path / _CONFIG}"
        )
    return Path(name)


def read(path: Path, config: DecoderConfig) -> Adapters:
    """The adapters in a PEFT directory, of a decoder of this config, in float32.

    Raises UserError if they are of another model, or adapt what this program has no adapters for.
    """
    settings = read_json(path / _CONFIG)
    _check_settings(path / _CONFIG, settings)
    file = next((path / name for name in _FILES if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"{path} lacks {_FILES[0]}; download it again")
    tensors = (safetensors_files if file.suffix == ".safetensors" else torch_files).read(file).tensors
    layers = _Reader(file, config, settings).layers(tensors)
    scale = _scale(settings, _rank(settings), _alpha(settings, ""))
    factors = {
        param: _joined(config, parts, present)
        for param, parts in _PARTS.items()
        if any(present := [{part: layer[part] for part in parts if part in layer} for layer in layers])
    }
    if not factors:
        raise UserError(f"{file} holds no adapters; download it again")
    return Adapters(scale, factors)


def _check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError on adapters that are not LoRA's plain product."""
    for name, plain in _UNSUPPORTED.items():
        if (value := settings.get(name, plain)) != plain and value:
            raise UserError(
                f"{file}: {name} is {value!r:.100}, which is not supported; merge the adapters into their base with "
                "peft's merge_and_unload"
            )
    try:
        patterns = dict(settings.get("alpha_pattern") or {})
        numbers = [settings.get("r", 8), settings.get("lora_alpha", 8), *patterns.values()]
        are_numbers = all(0 < number < math.inf for number in numbers)
        list(map(re.compile, patterns))
    except (TypeError, ValueError, re.error):
        are_numbers = False
    if not are_numbers:
        raise UserError(f"{file}: r, lora_alpha and those of alpha_pattern must be above 0; download it again")


def _rank(settings: Mapping[str, Any]) -> int:
    return settings.get("r", 8)


def _alpha(settings: Mapping[str, Any], module: str) -> float:
    """lora_alpha of a module, by the first of alpha_pattern that its name matches, as in PEFT."""
    patterns = settings.get("alpha_pattern") or {}
    found = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, settings.get("lora_alpha", 8))


def _scale(settings: Mapping[str, Any], rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


class _Reader:
    """The tensors of one file as factors by layer and published matrix; the experts of a layer in one array."""

    def __init__(self, file: Path, config: DecoderConfig, settings: Mapping[str, Any]):
        self._file, self._config, self._settings = file, config, settings

    def layers(self, tensors: Mapping[str, np.ndarray]) -> list[dict[str, _Factors]]:
        """The factors of each adapted matrix, by layer. Raises UserError on other tensors."""
        found: dict[tuple[int, str], dict[str, np.ndarray]] = {}
        for name, tensor in tensors.items():
            match = _TENSOR.fullmatch(name)
            if match is None:
                raise UserError(
                    f"{self._file} holds {shorten(name)}, and only attention and experts can have adapters here; merge "
                    "them into their base with peft's merge_and_unload"
                )
            expert = f"{match['expert']}.{match['matrix']}" if match["expert"] else f"experts{match['inner'] or ''}"
            module = match["projection"] or expert
            found.setdefault((int(match["layer"]), module), {})[match["factor"]] = tensor
        layers: list[dict[str, _Factors]] = [{} for _ in range(self._config.num_layers)]
        experts: list[dict[str, _Factors]] = [{} for _ in range(self._config.num_layers)]
        for (layer, module), pair in found.items():
            if layer >= len(layers) or pair.keys() != {"A", "B"}:
                raise self._mismatch(f"layer {layer}, {module}")
            a, b = (np.asarray(pair[factor], np.float32) for factor in "AB")
            if a.ndim != 2 or b.ndim != 2 or not a.size:
                raise self._mismatch(f"layer {layer}, {module} has factors of shapes {a.shape} and {b.shape}")
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise UserError(f"{self._file} is damaged: layer {layer}, {module} holds NaNs; download it again")
            if module in _ATTENTION:
                layers[layer][module] = a, b * self._relative_scale(f"model.layers.{layer}.self_attn.{module}", len(a))
            elif module.startswith("experts"):
                part = self._fused_part(layer, a, b)
                a, b = self._by_expert(a, b)
                scale = self._relative_scale(f"model.layers.{layer}.mlp.experts.{part}", a.shape[1])
                layers[layer][part] = a, b * scale
            else:
                scale = self._relative_scale(f"model.layers.{layer}.block_sparse_moe.experts.{module}", len(a))
                experts[layer][module] = a, b * scale
        for layer, by_module in enumerate(experts):
            layers[layer] |= dict(self._fused(by_module))
        for layer, parts in enumerate(layers):
            for part, (a, b) in parts.items():
                self._check_shapes(layer, part, a, b)
        return layers

    def _mismatch(self, what: str) -> UserError:
        return UserError(f"{self._file} does not fit the model: {what}; give the base that it was trained on")

    def _fused_part(self, layer: int, a: np.ndarray, b: np.ndarray) -> str:
        """Which of the two arrays of experts the factors belong to: PEFT names them by the order of its targets."""
        dim, hidden = self._config.dim, self._config.hidden_dim
        sizes = {"gate_up_proj": (dim, 2 * hidden), "down_proj": (hidden, dim)}
        for part, size in sizes.items():
            if a.ndim == b.ndim == 2 and (a.shape[1], b.shape[0]) == size:
                return part
        raise self._mismatch(f"layer {layer} has experts' factors of shapes {a.shape} and {b.shape}")

    def _by_expert(self, a: np.ndarray, b: np.ndarray) -> _Factors:
        """[experts, rank, in] and [experts, out, rank]."""
        experts = self._config.num_experts
        if a.shape[0] % experts or b.shape[1] != a.shape[0]:
            raise self._mismatch(f"factors of shapes {a.shape} and {b.shape} are not of {experts} experts")
        return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)

    def _fused(self, by_module: dict[str, _Factors]) -> Iterator[tuple[str, _Factors]]:
        """The factors of modules of single experts as those of the arrays of all of them; zero where there are none."""
        experts, dim, hidden = self._config.num_experts, self._config.dim, self._config.hidden_dim
        stacked: dict[str, _Factors] = {}
        for matrix, in_dim, out_dim in (("w1", dim, hidden), ("w3", dim, hidden), ("w2", hidden, dim)):
            pairs = {e: by_module[f"{e}.{matrix}"] for e in range(experts) if f"{e}.{matrix}" in by_module}
            if not pairs:
                continue
            rank = max(a.shape[0] for a, _ in pairs.values())
            a, b = np.zeros((experts, rank, in_dim), np.float32), np.zeros((experts, out_dim, rank), np.float32)
            for e, (expert_a, expert_b) in pairs.items():
                if expert_a.shape[1:] != (in_dim,) or expert_b.shape != (out_dim, len(expert_a)):
                    raise self._mismatch(f"{e}.{matrix} has factors of shapes {expert_a.shape} and {expert_b.shape}")
                a[e, : len(expert_a)], b[e, :, : len(expert_a)] = expert_a, expert_b
            stacked[matrix] = a, b
        if len(by_module) != sum(f"{e}.{matrix}" in by_module for e in range(experts) for matrix in stacked):
            raise self._mismatch(f"it has factors of more than {experts} experts")
        if "w2" in stacked:
            yield "down_proj", stacked.pop("w2")
        if stacked:
            yield "gate_up_proj", self._gate_up(stacked)

    @staticmethod
    def _gate_up(stacked: dict[str, _Factors]) -> _Factors:
        """The factors of w1 and w3 as those of one matrix with the outputs of both, one of which may have none."""
        (any_a, any_b), *_ = stacked.values()
        a1, b1 = stacked.get("w1", (any_a[:, :0], any_b[..., :0]))
        a3, b3 = stacked.get("w3", (any_a[:, :0], any_b[..., :0]))
        if np.array_equal(a1, a3):
            return a1, np.concatenate([b1, b3], axis=1)
        outputs = [np.pad(b1, ((0, 0), (0, 0), (0, a3.shape[1]))), np.pad(b3, ((0, 0), (0, 0), (a1.shape[1], 0)))]
        return np.concatenate([a1, a3], axis=1), np.concatenate(outputs, axis=1)

    def _relative_scale(self, module: str, rank: int) -> np.float32:
        """The scale of one module's product over that of the settings."""
        of_settings = _scale(self._settings, _rank(self._settings), _alpha(self._settings, ""))
        return np.float32(_scale(self._settings, rank, _alpha(self._settings, module)) / of_settings)

    def _check_shapes(self, layer: int, part: str, a: np.ndarray, b: np.ndarray) -> None:
        """Raises UserError on factors of another model's matrix."""
        rank, dim = a.shape[-2], self._config.dim
        (mapped, other), transposed = ((a, b), (dim, rank)) if part in _FROM_HEADS else ((b, a), (rank, dim))
        if mapped.shape != _mappings(self._config, rank)[part].shape or other.shape[-2:] != transposed:
            raise self._mismatch(f"layer {layer}, {part} has factors of shapes {a.shape} and {b.shape}")


@functools.lru_cache(maxsize=64)
def _mappings(config: DecoderConfig, rank: int) -> dict[str, ParamMapping]:
    """Of each published matrix, the mapping of the factor that has its heads or hidden dimension.

    That factor is the matrix with the rank in place of the embedding dimension. The other is a plain transpose.
    """
    factor = dataclasses.replace(config, dim=rank, num_layers=1, head_dim_override=config.head_dim)
    mappings = language_mappings(factor, "hugging_face_fused", unstacked=True)
    by_name = {mapping.name.removesuffix(".weight").rsplit(".", 1)[-1]: mapping for mapping in mappings}
    return {part: by_name[part] for part in (*_ATTENTION, *_EXPERTS)}


def _joined(config: DecoderConfig, parts: tuple[str, ...], layers: list[dict[str, _Factors]]) -> _Factors:
    """(a, b) of one parameter from the factors of its parts, layers stacked; zero where a layer or part has none."""
    ranks = {part: max((layer[part][0].shape[-2] for layer in layers if part in layer), default=0) for part in parts}
    shares_a = all(
        np.array_equal(first, other)
        for layer in layers
        for (first, _), (other, _) in [(next(iter(layer.values())), pair) for pair in layer.values()]
    )
    starts = {part: 0 if shares_a else sum(list(ranks.values())[:i]) for i, part in enumerate(parts)}
    rank = max(ranks.values()) if shares_a else sum(ranks.values())
    stack = (config.num_experts,) if parts[0] in _EXPERTS else ()
    into, out_of = _shapes(config, parts)
    a = np.zeros((len(layers), *stack, *into, rank), np.float32)
    b = np.zeros((len(layers), *stack, rank, *out_of), np.float32)
    for i, layer in enumerate(layers):
        for part, (part_a, part_b) in layer.items():
            mapping = _mappings(config, part_a.shape[-2])[part]
            ranks_of_part = slice(starts[part], starts[part] + part_a.shape[-2])
            target_a = a[i][..., ranks_of_part]
            target_b = b[i][(*[slice(None)] * len(stack), ranks_of_part)]
            if part in _FROM_HEADS:
                target_a[...], target_b[...] = mapping.to_param(part_a), np.swapaxes(part_b, -1, -2)
            else:
                target_a[...], target_b[mapping.index or ...] = np.swapaxes(part_a, -1, -2), mapping.to_param(part_b)
    return a, b


def _shapes(config: DecoderConfig, parts: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input and output dimensions of a parameter's matrix."""
    kv, group, width = config.num_kv_heads, config.queries_per_kv, config.head_dim
    return {
        "q_proj": ((config.dim,), (kv, group + 2, width)),
        "o_proj": ((kv, group, width), (config.dim,)),
        "gate_up_proj": ((config.dim,), (2, config.hidden_dim)),
        "down_proj": ((config.hidden_dim,), (config.dim,)),
    }[parts[0]]


def write(path: Path, config: DecoderConfig, adapters: Adapters, base: Path, dtype: str | None = None) -> None:
    """A PEFT directory of adapters on `base`, in `dtype` (None: float32). Memory holds it once more.

    Raises UserError if `path` exists and is not empty.
    """
    tensors = dict(_published(config, adapters, np.dtype(dtype or "float32")))
    parts = [part for param, own in _PARTS.items() if param in adapters.factors for part in own]
    (rank,) = {a.shape[-1] for a, _ in adapters.factors.values()}
    alpha = adapters.scale * rank
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": [part for part in parts if part in _ATTENTION],
        # PEFT wraps the first of them first: the names of their tensors depend on the order.
        "target_parameters": [f"mlp.experts.{part}" for part in parts if part in _EXPERTS] or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    declared = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with new_directory(path) as partial:
        if is_primary_process():
            write_json(partial / _CONFIG, settings)
            with safetensors_files.Writer(partial / _FILES[0], declared) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, [tensor])


def _published(config: DecoderConfig, adapters: Adapters, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the factors by PEFT's names."""
    for layer in range(config.num_layers):
        for param, parts in _PARTS.items():
            if param not in adapters.factors:
                continue
            a, b = (factor[layer] for factor in adapters.factors[param])
            for part in parts:
                mapping = _mappings(config, a.shape[-1])[part]
                if part in _FROM_HEADS:
                    pair = mapping.to_published(a), np.swapaxes(b, -1, -2)
                else:
                    pair = np.swapaxes(a, -1, -2), mapping.to_published(b[mapping.index or ...])
                for factor, tensor in zip("AB", _flat(pair) if part in _EXPERTS else pair, strict=True):
                    yield f"{_module(layer, part)}.lora_{factor}.weight", np.ascontiguousarray(tensor, dtype)


def _module(layer: int, part: str) -> str:
    stem = f"base_model.model.model.layers.{layer}."
    if part in _ATTENTION:
        return f"{stem}self_attn.{part}"
    return f"{stem}mlp.experts{'.base_layer' if part == 'gate_up_proj' else ''}"


def _flat(pair: _Factors) -> _Factors:
    """[experts, rank, in] and [experts, out, rank] as PEFT's two matrices."""
    a, b = pair
    return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)
