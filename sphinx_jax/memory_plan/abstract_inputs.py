"""The abstract arguments (ShapeDtypeStructs) of the engine's programs."""

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
"""Rows of the table of stop strings (`inference.stop_strings`); more only with many stop strings."""


class AbstractInputs:
    """The abstract arguments of the engine's programs, for the longest prompt that `max_model_len` admits."""

    def __init__(
        self, config: SphinxConfig, graph: Any, params: Any, mesh: Mesh, max_num_seqs: int, max_model_len: int
    ):
        self._config, vision, vocab_size = config, config.vision, config.language.vocab_size
        self._dtype = params["language"]["embedding"]["table"].dtype
        self.programs = Programs(config, graph, vocab_size, mesh, self._dtype)
        self.chunk_len = prefill_tokens(mesh)
        num_image_tokens, max_text_len = config.num_image_tokens, max_model_len - config.num_image_tokens
        # The last chunk is padded to its bucket, so cache_len may exceed max_model_len.
        cache_len = cache_len_for(max_text_len - 1, num_image_tokens, 1, max_model_len, self.chunk_len)
        groups = sharding.num_shards("batch", mesh)
        max_num_seqs = round_up_to_groups(max_num_seqs, groups)
        self.state = self.programs.abstract_state(max_num_seqs, cache_len)
        self.sampling = jax.tree.map(lambda x: self.replicated((), np.asarray(x).dtype), SamplingParams().values())
        self.stop_table = self.replicated((STOP_STATES, vocab_size), jnp.int16)
        # Prompts of one prefill call: as many per data-parallel group as the scheduler admits at once.
        per_group = prefill_batch_size(max_text_len, self.chunk_len, groups, vision is not None)
        self.batch_size = groups * power_of_two(min(max_num_seqs // groups, per_group))
        self.first_chunk_len = bucket(min(self.chunk_len, max_text_len))
        self.needs_chunked_prefill = max_text_len > self.chunk_len
        self.image_embeds: tuple | None = None
        if vision:
            shape = (vision.num_crops, vision.tokens_per_crop, config.language.dim)
            self.image_embeds = (self.replicated(shape, self._dtype),) * self.batch_size

    def replicated(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        """A ShapeDtypeStruct, replicated over all devices; typed `Any` because it takes the place of an array."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.programs.everywhere)

    def chunk(self, length: int) -> steps.Chunk:
        """`length` text tokens of each prompt of one prefill call."""
        per_prompt = self.replicated((self.batch_size,))
        return steps.Chunk(
            row=per_prompt,
            tokens=self.replicated((self.batch_size, length)),
            length=per_prompt,
            start=per_prompt,
            limit=per_prompt,
            seeds=self.replicated((self.batch_size, 2), jnp.uint32),
            seen=self.replicated((self.batch_size, self._config.language.vocab_size), jnp.bool_),
        )

    def encode_jobs(self, params: Any) -> list[Job]:
        """The vision encoders on as many images as the engine encodes at once; empty for a language model."""
        if not (vision := self._config.vision):
            return []
        num_images = power_of_two(min(self.batch_size, max(1, ENCODE_PIXELS // vision.image_size**2)))
        images = self.replicated((num_images, vision.image_size, vision.image_size, 3), jnp.float32)
        return [Job("encode images", self.programs.encode(), (params, images), (0,))]
