"""A request in progress: the tokens sampled so far, the text that is certain, and how it ended."""

import numpy as np

from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.inference.requests import Completion, FinishReason, Request, TopLogprobs
from sphinx_jax.inference.stop_strings import TextStream

NO_SLOT = -1


class Sequence:
    """What the scheduler knows of one request. Its consumers read `take_text`, `finish` and `completion`."""

    def __init__(self, request: Request, tokenizer: Tokenizer, streams: bool):
        self.request, self.streams = request, streams
        self.prompt = np.asarray(request.tokens, np.int32)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.finish: FinishReason | None = None
        self.error: str | None = None
        self.slot = NO_SLOT
        """Its batch slot, while it has one."""
        self.prefilled = 0
        """Tokens of the prompt that are in the KV cache."""
        self.reused = 0
        """Of these, the tokens that were there before."""
        self._text = TextStream(tokenizer, request.stops, request.continues)
        self._new_text, self._parts = "", []

    @property
    def context(self) -> bytes | None:
        """What keys and values depend on besides the tokens: the image, and the adapter; None: on nothing."""
        image, adapter = self.request.image, self.request.adapter
        if adapter is None:
            return image.digest if image else None
        return adapter.encode() + b"\0" + (image.digest if image else b"")

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        return "".join(self._parts)

    def take_text(self) -> str:
        """The text that has become certain since the last call."""
        new, self._new_text = self._new_text, ""
        return new

    def append(self, tokens: list[int], logprobs: list[float], top: list[TopLogprobs]) -> None:
        """New tokens. Those after the end of a stop string are dropped, and the sequence is finished."""
        before = len(self.tokens)
        self._add_text(self._text.push(tokens))
        kept = self._text.num_tokens - before
        self.tokens += tokens[:kept]
        self.logprobs += logprobs[:kept]
        self.top_logprobs += top[:kept]
        if self._text.stopped:
            self.finish = "stop"

    def end(self, finish: FinishReason, error: str | None = None) -> None:
        """The one terminal event. Text that was held back is certain now, unless the sequence was broken off."""
        self.finish, self.error = finish, error
        if finish in ("stop", "length"):
            self._add_text(self._text.finish())

    def _add_text(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._new_text += text

    @property
    def completion(self) -> Completion:
        """The answer of a sequence that has ended."""
        assert self.finish is not None, "the sequence has not ended"
        return Completion(self.text, self.tokens, self.logprobs, self.finish, tuple(self.top_logprobs))
