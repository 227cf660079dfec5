"""What is asked and what is answered."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from sphinx_jax.data.images import normalise
from sphinx_jax.errors import UserError

Pixels = UInt8[np.ndarray, "size size 3"] | Float[np.ndarray, "size size 3"]
"""A square picture of the encoders' size: 0 to 255, or float32 with CLIP's mean and deviation taken out."""


class PreparedImage(NamedTuple):
    """A picture, and a digest of its content."""

    pixels: Pixels
    digest: bytes

    @classmethod
    def of(cls, pixels: Pixels) -> "PreparedImage":
        return cls(pixels, hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16).digest())

    def normalised(self) -> Float[np.ndarray, "size size 3"]:
        """As the encoders take it."""
        return self.pixels if self.pixels.dtype == np.float32 else normalise(self.pixels)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt. Equal requests give equal texts, whatever else is served beside them."""

    tokens: Sequence[int]
    picture: PreparedImage | None = None
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max-new-tokens must be 1 or more, got {self.max_new_tokens}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"the seed must be from 0 to {2**32 - 1}, got {self.seed}")

    def seeds(self) -> tuple[int, int]:
        """The seed, and a digest of what is asked: different requests draw independently with one seed."""
        content = np.asarray(self.tokens, np.int32).tobytes() + (self.picture.digest if self.picture else b"")
        return self.seed, int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")


class Completion(NamedTuple):
    """An answer. `tokens` are all that were chosen, the stop string or EOS included; `text` ends before it."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
