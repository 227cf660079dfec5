"""The abstract arguments of the engine's programs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import sharding
from sphinx_jax.config import SphinxConfig
from sphinx_jax.inference import steps
from sphinx_jax.inference.bucketing import bucket, cache_len_for, power_of_two, prefill_tokens
from sphinx_jax.inference.data_parallel import round_up_to_groups
from sphinx_jax.inference.engine import ENCODE_PIXELS
from sphinx_jax.inference.programs import Programs
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.serving import prefill_batch_size
from sphinx_jax.memory_plan.jobs import Job

STOP_STATES = 32
"""Rows of the table of stop strings (`inference.stopping`), unless there are many of them."""


class AbstractInputs:
    """The abstract arguments of the engine's programs, for the longest prompt there can be."""

    def __init__(
        self, config: SphinxConfig, graph: Any, params: Any, mesh: Mesh, max_num_seqs: int, max_model_len: int
    ):
        self._config, vision, vocab = config, config.vision, config.language.vocab_size
        self._dtype = params["language"]["embedding"]["table"].dtype
        self.programs = Programs(config, graph, vocab, mesh, self._dtype)
        self.piece = prefill_tokens(mesh)
        # The last chunk is padded, so that the cache may be longer than the context.
        slots = cache_len_for(
            max_model_len - config.num_image_tokens - 1, config.num_image_tokens, 1, max_model_len, self.piece
        )
        groups = sharding.num_shards("batch", mesh)
        max_num_seqs = round_up_to_groups(max_num_seqs, groups)
        self.state = self.programs.abstract_state(max_num_seqs, slots)
        self.sampling = jax.tree.map(lambda x: self.whole((), np.asarray(x).dtype), SamplingParams().values())
        self.stops = self.whole((STOP_STATES, vocab), jnp.int16)
        each = prefill_batch_size(max_model_len - config.num_image_tokens, self.piece, groups, vision is not None)
        self.batch = groups * power_of_two(min(max_num_seqs // groups, each))
        self.text = bucket(min(self.piece, max_model_len - config.num_image_tokens))
        self.reads_on = max_model_len - config.num_image_tokens > self.piece
        words = (
            self.whole((vision.num_crops, vision.tokens_per_crop, config.language.dim), self._dtype) if vision else None
        )
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
