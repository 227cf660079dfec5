"""Requests and completions."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from sphinx_jax.data.conversation import DEFAULT_TEMPLATE
from sphinx_jax.data.images import normalise
from sphinx_jax.inference.sampling import GREEDY, SamplingParams

Pixels = UInt8[np.ndarray, "size size 3"] | Float[np.ndarray, "size size 3"]
"""A square image of the encoders' size: 0 to 255, or float32 normalised with CLIP's mean and deviation."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


class PreparedImage(NamedTuple):
    """An image as the encoders take it, and a digest of its content."""

    pixels: Pixels
    digest: bytes

    @classmethod
    def of(cls, pixels: Pixels) -> "PreparedImage":
        return cls(pixels, hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest())

    def normalised(self) -> Float[np.ndarray, "size size 3"]:
        """With CLIP's mean and deviation taken out."""
        return self.pixels if self.pixels.dtype == np.float32 else normalise(self.pixels)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt. Equal requests give equal texts, whatever shares the batch with them."""

    tokens: Sequence[int]
    image: PreparedImage | None = None
    params: SamplingParams = GREEDY
    raw: bool = False
    """The prompt is no conversation: the template's end signal does not end the answer."""
    continues: bool = False
    """The answer goes on within a text: the space that its first token may begin with belongs to it."""
    adapter: str | None = None
    """Name of the adapter that answers; None: the base."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Every text that ends the answer."""
        own = tuple(self.params.stop)
        return own if self.raw or self.params.ignore_eos else (DEFAULT_TEMPLATE.response_end_signal, *own)

    def seeds(self) -> tuple[int, int]:
        """The seed, and a digest of the prompt: different requests draw independently with one seed."""
        content = np.asarray(self.tokens, np.int32).tobytes() + (self.image.digest if self.image else b"")
        return self.params.seed, int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")


class TopLogprobs(NamedTuple):
    """The most probable tokens at one position, in falling order."""

    tokens: list[int]
    logprobs: list[float]


class Completion(NamedTuple):
    """An answer. `tokens` are all that were sampled, those of the stop string or EOS included; `text` ends before."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish: FinishReason
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """As many as tokens, if the request asked for them."""
