"""Which programs the first round for some requests runs, found by scheduling them on an engine that runs nothing."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sphinx_jax.inference import steps
from sphinx_jax.inference.bucketing import BATCHES
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.program_specs import Decode, Encode, Prefill, ProgramSpec
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.requests import PreparedImage, Request
from sphinx_jax.inference.sampling import MAX_TOP_LOGPROBS
from sphinx_jax.inference.scheduler import MIN_REUSED, Scheduler


class _Rehearsal(Engine):
    """Another engine's settings, and a list of what was asked of it. Every sampled token is 0, and none is the last."""

    def __init__(self, engine: Engine):
        vars(self).update(vars(engine))
        self.specs: list[ProgramSpec] = []
        self._encoded: set[bytes] = set()

    def new_state(self, shape: StateShape) -> steps.State:
        return self._programs.abstract_state(shape)

    def encode(self, images: Sequence[PreparedImage], sizes: Sequence[int] = BATCHES) -> list[Any]:
        new = self.missing_embeds(images) - self._encoded
        self._encoded |= new
        self.specs += map(Encode, self.encoder_batches(len(new), sizes))
        return list(self.abstract_embeds(len(images)))

    def prefill(
        self, state: steps.State, chunk: steps.Chunk, image_embeds: Any, wants_top: bool
    ) -> tuple[steps.State, steps.Sampled]:
        batch, length = chunk.tokens.shape
        start = MIN_REUSED if chunk.start.any() else 0
        self.specs.append(Prefill(batch, length, image_embeds is not None, start))
        return state, self._sampled(batch)

    def decode(
        self, state: steps.State, cancelled: np.ndarray, num_steps: int, until: int, kv_len: int, wants_top: bool
    ) -> tuple[steps.State, steps.Sampled]:
        self.specs.append(Decode(kv_len))
        return state, self._sampled(state.num_seqs)

    @staticmethod
    def _sampled(batch: int) -> steps.Sampled:
        column = (batch, 1)
        fields: dict[str, Any] = {
            "tokens": np.zeros(column, np.int32),
            "logprobs": np.zeros(column, np.float32),
            "count": np.ones(batch, np.int32),
            "done": np.zeros(batch, bool),
            "stopped": np.zeros(batch, bool),
            "top_tokens": np.zeros((*column, MAX_TOP_LOGPROBS), np.int32),
            "top_logprobs": np.zeros((*column, MAX_TOP_LOGPROBS), np.float32),
        }
        return steps.Sampled(**fields)


def rehearse(engine: Engine, shape: StateShape, requests: Iterable[Request]) -> list[ProgramSpec]:
    """The programs of the first round of a scheduler with these requests, in their order, each once."""
    rehearsal = _Rehearsal(engine)
    scheduler = Scheduler(rehearsal, shape)
    for request in requests:
        scheduler.submit(request)
    scheduler.step()
    return list(dict.fromkeys(rehearsal.specs))
