"""The abstract arguments of the engine's programs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import sharding
from sphinx_jax.config import SphinxConfig
from sphinx_jax.inference import steps
from sphinx_jax.inference.engine import ENCODE_PIXELS
from sphinx_jax.inference.programs import Programs
from sphinx_jax.inference.row_groups import whole_groups
from sphinx_jax.inference.sampling import Sampling
from sphinx_jax.inference.serving import prompts_at_once
from sphinx_jax.inference.shapes import bucket, power_of_two, prefill_tokens, slots_for
from sphinx_jax.planning.jobs import Job

STOP_STATES = 32
"""Rows of the table of stop strings (`inference.stopping`), unless there are many of them."""


class Asked:
    """The abstract arguments of the engine's programs, for the longest prompt there can be."""

    def __init__(self, config: SphinxConfig, graph: Any, params: Any, mesh: Mesh, rows: int, context: int):
        self._config, vision, vocab = config, config.vision, config.language.vocab_size
        self._dtype = params["language"]["embedding"]["table"].dtype
        self.programs = Programs(config, graph, vocab, mesh, self._dtype)
        self.piece = prefill_tokens(mesh)
        # The last chunk is padded, so that the cache may be longer than the context.
        slots = slots_for(context - config.image_words - 1, config.image_words, 1, context, self.piece)
        groups = sharding.shards("batch", mesh)
        rows = whole_groups(rows, groups)
        self.state = self.programs.abstract_state(rows, slots)
        self.sampling = jax.tree.map(lambda x: self.whole((), np.asarray(x).dtype), Sampling().values())
        self.stops = self.whole((STOP_STATES, vocab), jnp.int16)
        each = prompts_at_once(context - config.image_words, self.piece, groups, vision is not None)
        self.batch = groups * power_of_two(min(rows // groups, each))
        self.text = bucket(min(self.piece, context - config.image_words))
        self.reads_on = context - config.image_words > self.piece
        words = self.whole((vision.views, vision.view_words, config.language.dim), self._dtype) if vision else None
        self.words = (words,) * self.batch if vision else None

    def whole(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array that every device has."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.programs.everywhere)

    def chunk(self, text: int) -> steps.Chunk:
        """So many tokens of each prompt that is read at once."""
        return steps.Chunk(
            row=self.whole((self.batch,)),
            tokens=self.whole((self.batch, text)),
            length=self.whole((self.batch,)),
            start=self.whole((self.batch,)),
            limit=self.whole((self.batch,)),
            seeds=self.whole((self.batch, 2), jnp.uint32),
            seen=self.whole((self.batch, self._config.language.vocab_size), jnp.bool_),
        )

    def encode_jobs(self, params: Any) -> list[Job]:
        """Encoding as many pictures as the engine does at once; none if the model sees none."""
        if not (vision := self._config.vision):
            return []
        at_once = power_of_two(min(self.batch, max(1, ENCODE_PIXELS // vision.image_size**2)))
        images = self.whole((at_once, vision.image_size, vision.image_size, 3), jnp.float32)
        return [Job("encode pictures", self.programs.encode(), (params, images), (0,))]
