"""Checked values of config files: a bad one is a UserError that names the file."""

import dataclasses
from pathlib import Path
from typing import Any

from sphinx_jax.config import DecoderConfig, VisionConfig
from sphinx_jax.errors import UserError

# Of layers and of experts. A larger number is a mistake, and listing its tensors would fill memory.
_MAX_COUNT = 1000


class ConfigFile:
    """The values of a JSON config with their types checked; every error names the file."""

    def __init__(self, file: Path, values: dict[str, Any]):
        self.file = file
        self.values = values

    def count(self, key: str, default: int | None = None) -> int:
        """An integer, 1 or more."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.file} lacks {key!r}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.file}: {key!r} must be an integer, 1 or more, not {value!r}")
        return value

    def optional_count(self, key: str) -> int | None:
        """An integer, 1 or more; None if it is missing or null."""
        return None if self.values.get(key) is None else self.count(key)

    def number(self, key: str, default: float) -> float:
        """A number, 0 or more."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise UserError(f"{self.file}: {key!r} must be a number, 0 or more, not {value!r}")
        return float(value)

    def section(self, key: str) -> "ConfigFile":
        """A nested object."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise UserError(f"{self.file} lacks {key!r}, an object")
        return ConfigFile(self.file, value)

    def check_unsupported(self, key: str, *allowed: Any) -> None:
        """Raises UserError if a key that changes the computation has a value that this model does not support."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise UserError(f"{self.file}: {key!r} is {value!r}, which this model does not support")

    def mistral_decoder(self) -> DecoderConfig:
        """The config under the names of Mistral and LLaMA2-Accessory. Raises UserError."""
        moe, heads, dim = self.section("moe"), self.count("n_heads"), self.count("dim")
        window = self.optional_count("sliding_window")
        return check_decoder(
            self.file,
            DecoderConfig(
                dim=dim,
                hidden_dim=self.count("hidden_dim"),
                num_layers=self.count("n_layers"),
                num_heads=heads,
                num_kv_heads=self.count("n_kv_heads", heads),
                num_experts=moe.count("num_experts"),
                experts_per_token=moe.count("num_experts_per_tok"),
                vocab_size=self.count("vocab_size"),
                norm_eps=self.number("norm_eps", 1e-5),
                # Mistral's program takes 1e4 for models with a sliding window.
                rope_theta=self.number("rope_theta", 1e6 if window is None else 1e4),
                head_dim_override=head_dim_override(self.optional_count("head_dim"), dim, heads),
                sliding_window=window,
            ),
        )


def head_dim_override(head_dim: int | None, dim: int, heads: int) -> int | None:
    """`head_dim`, None if it is dim / heads."""
    return None if head_dim is None or head_dim * heads == dim else head_dim


def mistral_values(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of `ConfigFile.mistral_decoder`."""
    return {
        "dim": config.dim,
        "hidden_dim": config.hidden_dim,
        "head_dim": config.head_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **({} if config.sliding_window is None else {"sliding_window": config.sliding_window}),
        "moe": {"num_experts_per_tok": config.experts_per_token, "num_experts": config.num_experts},
    }


def check_decoder(file: Path, config: DecoderConfig) -> DecoderConfig:
    """`config` itself. Raises UserError that names `file` if its sizes are inconsistent."""
    divides = config.head_dim_override is not None or config.dim % config.num_heads == 0
    if not divides or config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise UserError(
            f"{file}: width {config.dim}, {config.num_heads} heads of {config.head_dim} and {config.num_kv_heads} "
            "key/value heads are inconsistent: the width must be an even multiple of the heads, these of the key/value "
            "heads"
        )
    if max(config.num_layers, config.num_experts) > _MAX_COUNT:
        raise UserError(
            f"{file}: {config.num_layers} layers of {config.num_experts} experts are too many; correct the config"
        )
    if config.experts_per_token > config.num_experts:
        raise UserError(
            f"{file}: {config.experts_per_token} experts per token of {config.num_experts} in all; correct the config"
        )
    return config


def check_vision(file: Path, config: VisionConfig) -> VisionConfig:
    """`config` itself. Raises UserError that names `file` if its sizes are inconsistent."""
    heads = []
    for encoder in (config.clip, config.dino, config.qformer):
        heads += [(encoder.width, encoder.num_heads)] if encoder else []
    if config.qformer:
        heads.append((config.qformer.vision_width, config.qformer.vision_heads))
    if any(width % count for width, count in heads):
        raise UserError(f"{file}: an encoder's width must be a multiple of its heads; (width, heads) are {heads}")
    if config.convnext and len(config.convnext.depths) != len(config.convnext.dims):
        raise UserError(f"{file}: ConvNeXt needs a depth for each of its widths, not {config.convnext}")
    if config.num_crops not in (1, 5):
        raise UserError(f"{file}: crops must be 1 or 5, not {config.num_crops}")
    try:
        _ = config.num_patch_tokens
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    return config


def check_types(file: Path, section: str, published: Any, values: Any) -> None:
    """Check that the values of a config, and of those nested in it, have the types of the `published` config's.

    Keys that are missing or unknown are left to others. Raises UserError that names the file and the value.
    """
    if not isinstance(values, dict):
        raise UserError(f"{file}: {section} must be an object, not {values!r:.60}")
    for field in dataclasses.fields(published):
        if field.name not in values:
            continue
        value, default = values[field.name], getattr(published, field.name)
        if dataclasses.is_dataclass(default):
            if value is not None:
                check_types(file, f"{section}.{field.name}", default, value)
            continue
        if isinstance(default, tuple):
            is_list = isinstance(value, list | tuple) and len(value) > 0
            is_valid = is_list and all(type(v) is int and v > 0 for v in value)
        elif default is None:
            is_valid = value is None or (type(value) is int and value > 0)
        elif isinstance(default, int):
            is_valid = type(value) is int and value > 0
        elif isinstance(default, float):
            is_valid = type(value) in (int, float) and 0 <= value < float("inf")
        else:
            is_valid = value in ("gelu", "quick_gelu")
        if not is_valid:
            raise UserError(
                f"{file}: {field.name!r} of {section} cannot be {value!r:.60}; a published one is {default!r}"
            )
