"""Sizes of every part of the model, as frozen dataclasses, and the named presets.

A config holds the architecture only: no mesh, no files, no learning rates. Equal configs build models with the same
parameter tree.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from sphinx_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Mixtral decoder (https://arxiv.org/abs/2401.04088)."""

    dim: int = 4096
    hidden_dim: int = 14336
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    num_experts: int = 8
    experts_per_token: int = 2
    vocab_size: int = 32000
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    head_dim_override: int | None = None
    """Channels per head where they are not dim / num_heads."""
    sliding_window: int | None = None
    """The longest sequence that full attention computes exactly, for a model with sliding-window attention."""

    @property
    def head_dim(self) -> int:
        return self.head_dim_override or self.dim // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table and columns of the head: `vocab_size` rounded up to what meshes divide.

        The same for every mesh, so that a training state fits any. Padding has no token: its logits are masked, and
        files do not hold it.
        """
        multiple = 256 if self.vocab_size > 4096 else 8
        return -(-self.vocab_size // multiple) * multiple

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """CLIP's vision transformer as open_clip builds it; all tokens after `ln_post`, no projection."""

    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    patch: int = 14
    image_size: int = 224
    activation: Literal["gelu", "quick_gelu"] = "gelu"

    @property
    def channels(self) -> int:
        return self.width


@dataclasses.dataclass(frozen=True)
class ConvNextConfig:
    """The ConvNeXt trunk of OpenCLIP's ConvNeXt-XXL: the mean of the normed feature map, then the map itself."""

    depths: tuple[int, ...] = (3, 4, 30, 3)
    dims: tuple[int, ...] = (384, 768, 1536, 3072)
    kernel: int = 7
    image_size: int = 512

    @property
    def channels(self) -> int:
        return self.dims[-1]

    @property
    def grid(self) -> int:
        """The side of the last stage's feature map: the stem divides by 4, each later stage by 2."""
        return self.image_size // (4 * 2 ** (len(self.depths) - 1))


@dataclasses.dataclass(frozen=True)
class DinoConfig:
    """DINOv2 ViT-g/14: SwiGLU, layer scale, positions interpolated from `position_grid`."""

    width: int = 1536
    num_layers: int = 40
    num_heads: int = 24
    patch: int = 14
    image_size: int = 224
    position_grid: int = 37

    @property
    def channels(self) -> int:
        return self.width

    @property
    def hidden_dim(self) -> int:
        # Two thirds of 4 x width, rounded up to a multiple of 8: SwiGLU's three matrices then have as many parameters
        # as a plain MLP's two (https://arxiv.org/abs/2002.05202).
        return (int(4 * self.width * 2 / 3) + 7) // 8 * 8


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """BLIP-2's Q-Former over an EVA ViT-g (https://arxiv.org/abs/2301.12597)."""

    vision_width: int = 1408
    vision_layers: int = 39
    vision_heads: int = 16
    vision_mlp: int = 6144
    patch: int = 14
    image_size: int = 224
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp: int = 3072
    num_queries: int = 32
    cross_attention_every: int = 2

    @property
    def channels(self) -> int:
        return self.width


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision encoders, the image size and the number of crops per image.

    `image_size` is the side in pixels of the square input image. `num_crops` is 1 (the full image) or 5 (the full image
    and its four quarters). An encoder that is None is absent. CLIP, ConvNeXt and DINOv2 must give the same number of
    tokens, because their channels are concatenated.
    """

    image_size: int = 512
    num_crops: Literal[1, 5] = 1
    clip: ClipConfig | None = ClipConfig()
    convnext: ConvNextConfig | None = ConvNextConfig()
    dino: DinoConfig | None = DinoConfig()
    qformer: QFormerConfig | None = QFormerConfig()

    @property
    def ensemble_channels(self) -> int:
        return sum(e.channels for e in (self.clip, self.convnext, self.dino) if e is not None)

    @property
    def num_patch_tokens(self) -> int:
        """Tokens per crop of the concatenated encoders: one class token, then a square grid of patches.

        Raises ValueError if the encoders' grids differ.
        """
        grids = {
            name: side
            for name, side in (
                ("clip", self.clip and self.clip.image_size // self.clip.patch),
                ("convnext", self.convnext and self.convnext.grid),
                ("dino", self.dino and self.dino.image_size // self.dino.patch),
            )
            if side
        }
        if len(set(grids.values())) > 1:
            raise ValueError(f"CLIP, ConvNeXt and DINOv2 must give the same grid of tokens, got {grids}")
        return max(grids.values()) ** 2 + 1 if grids else 0

    @property
    def tokens_per_crop(self) -> int:
        """Tokens of one crop, without the learned start and end vectors."""
        return self.num_patch_tokens + (self.qformer.num_queries if self.qformer else 0)

    @property
    def num_image_tokens(self) -> int:
        """Sequence positions of one image, start and end vectors included."""
        return self.num_crops * (self.tokens_per_crop + 2)


@dataclasses.dataclass(frozen=True)
class SphinxConfig:
    """The full model. `balance_weight` scales the router's load-balancing loss in training."""

    language: DecoderConfig = DecoderConfig()
    vision: VisionConfig | None = VisionConfig()
    balance_weight: float = 0.1

    @property
    def num_image_tokens(self) -> int:
        return self.vision.num_image_tokens if self.vision else 0

    @property
    def image_size(self) -> int:
        """The side of the square input images in pixels; 0 for a text-only model."""
        return self.vision.image_size if self.vision else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as in `config.json` of a native checkpoint; optional sizes that are None are left out."""
        values = dataclasses.asdict(self)
        optional = {field.name for field in dataclasses.fields(DecoderConfig) if field.default is None}
        values["language"] = {k: v for k, v in values["language"].items() if v is not None or k not in optional}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SphinxConfig":
        """Inverse of `to_dict`. Raises UserError on a missing or unknown key."""
        return _build(cls, values, "config")


_NESTED: dict[str, type] = {
    "language": DecoderConfig,
    "vision": VisionConfig,
    "clip": ClipConfig,
    "convnext": ConvNextConfig,
    "dino": DinoConfig,
    "qformer": QFormerConfig,
}


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    optional = {name for name, default in defaults.items() if default is None}
    if not isinstance(values, dict) or set(values) | optional != known:
        got = set(values) if isinstance(values, dict) else {repr(values)}
        raise UserError(
            f"{where}: expected the keys {sorted(known)}; missing {sorted(known - got - optional)}, "
            f"unknown {sorted(got - known)}"
        )
    built = {}
    for name, value in values.items():
        if name in _NESTED and value is not None:
            value = _build(_NESTED[name], value, f"{where}.{name}")
        if isinstance(defaults.get(name), float) and type(value) is int:
            value = float(value)
        built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)


LoraTargets = Literal["attention", "all"]
"""The adapted modules: attention only, or attention and experts."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (https://arxiv.org/abs/2106.09685): W + alpha / rank x a b for every adapted matrix W."""

    rank: int
    alpha: float
    target_modules: LoraTargets = "all"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def sphinx_moe() -> SphinxConfig:
    """SPHINX-MoE as published: one crop of 512 pixels, 291 image tokens."""
    return SphinxConfig()


def sphinx_moe_1k() -> SphinxConfig:
    """SPHINX-MoE-1k as published: images of 1,024 pixels in five crops, 1,455 image tokens."""
    return SphinxConfig(vision=VisionConfig(image_size=1024, num_crops=5), balance_weight=0.01)


def mixtral_8x7b() -> SphinxConfig:
    """Mixtral-8x7B, text only."""
    return SphinxConfig(vision=None, balance_weight=0.02)


def sphinx_mini() -> SphinxConfig:
    """7.4 B parameters, 1.7 B of the decoder active per token; published CLIP and DINOv2; inference on a 24 GB GPU."""
    return SphinxConfig(
        language=DecoderConfig(dim=2048, hidden_dim=7168, num_layers=16, num_heads=16),
        vision=VisionConfig(image_size=224, convnext=None, qformer=None),
    )


def sphinx_tiny() -> SphinxConfig:
    """1.5 B parameters, 0.4 B of the decoder active per token; published CLIP; training on a 24 GB GPU."""
    return SphinxConfig(
        language=DecoderConfig(dim=1024, hidden_dim=3584, num_layers=12, num_heads=8),
        vision=VisionConfig(image_size=224, convnext=None, dino=None, qformer=None),
    )


def nano() -> SphinxConfig:
    """About a million parameters, for 64 x 64 images: training on two CPU cores in minutes."""
    return SphinxConfig(
        language=DecoderConfig(
            dim=96, hidden_dim=192, num_layers=2, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=512
        ),
        vision=VisionConfig(
            image_size=64,
            clip=ClipConfig(width=64, num_layers=2, num_heads=4, patch=16, image_size=64),
            convnext=ConvNextConfig(depths=(1, 1, 1), dims=(32, 64, 128), kernel=3, image_size=64),
            dino=None,
            qformer=None,
        ),
        balance_weight=0.1,
    )


def mixtral_140m() -> SphinxConfig:
    """Text-only Mixtral of 140 M parameters, 53 M of them active per token, for the CPU benchmarks."""
    return SphinxConfig(
        language=DecoderConfig(dim=512, hidden_dim=1024, num_layers=8, num_heads=8, num_kv_heads=4, num_experts=8),
        vision=None,
        balance_weight=0.02,
    )


PRESETS: dict[str, Callable[[], SphinxConfig]] = {
    "nano": nano,
    "mixtral-140m": mixtral_140m,
    "sphinx-tiny": sphinx_tiny,
    "sphinx-mini": sphinx_mini,
    "mixtral-8x7b": mixtral_8x7b,
    "sphinx-moe": sphinx_moe,
    "sphinx-moe-1k": sphinx_moe_1k,
}


def preset(name: str) -> SphinxConfig:
    """The preset called `name`. Raises UserError on an unknown name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
