"""The abstract arguments (ShapeDtypeStructs) of the engine's programs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import sharding
from sphinx_jax.config import SphinxConfig
from sphinx_jax.inference import steps
from sphinx_jax.inference.bucketing import (
    BATCHES,
    FILE_CHUNKS,
    LENGTHS,
    batch_sizes,
    bucket,
    positions_for,
    prefill_tokens,
)
from sphinx_jax.inference.data_parallel import round_up_to_groups
from sphinx_jax.inference.engine import ENCODE_PIXELS
from sphinx_jax.inference.generate import MAX_PREFIXES
from sphinx_jax.inference.programs import Programs, StateShape
from sphinx_jax.inference.sampling import SamplingArrays
from sphinx_jax.inference.stop_strings import NUM_STATES
from sphinx_jax.lora_params import num_ranks
from sphinx_jax.memory_plan.jobs import Job


class AbstractInputs:
    """The abstract arguments of the engine's programs, for the longest prompts that `max_model_len` admits.

    Chunks of longer prompts have `chunk_len` tokens, by default those of the mesh's devices.
    """

    def __init__(
        self,
        config: SphinxConfig,
        graph: Any,
        params: Any,
        mesh: Mesh,
        max_num_seqs: int,
        max_model_len: int,
        chunk_len: int | None = None,
    ):
        self._config, self._dtype = config, params["language"]["embedding"]["table"].dtype
        self._num_ranks = num_ranks(params)
        self.programs = Programs(config, graph, config.language.vocab_size, mesh, self._dtype, self._num_ranks)
        self._groups, self.chunk_len = sharding.num_shards("batch", mesh), chunk_len or prefill_tokens(mesh)
        self.max_text_len = max_model_len - config.num_image_tokens
        self.needs_chunked_prefill = self.max_text_len > self.chunk_len
        self.shape = self._state_shape(max_num_seqs, max_model_len)
        self.state = self.programs.abstract_state(self.shape)
        self.stops = self.replicated((NUM_STATES, config.language.padded_vocab_size), jnp.int16)
        self.wants_top = self.replicated((), jnp.bool_)

    def _state_shape(self, max_num_seqs: int, max_model_len: int) -> StateShape:
        """The state of `generate.run`; of `generate.stream_alone`, without prefixes, for one sequence."""
        num_seqs = round_up_to_groups(max_num_seqs, self._groups)
        # The last chunk is padded to its bucket, so cache_len may exceed max_model_len.
        num_image_tokens = self._config.num_image_tokens
        positions = positions_for(self.max_text_len - 1, num_image_tokens, 1, max_model_len, self.chunk_len)
        cache_len = bucket(positions)
        if max_num_seqs == 1:
            return StateShape(num_seqs, cache_len)
        # As `Engine.prefix_len`.
        prefix_len = min(cache_len, bucket(num_image_tokens + 128 if self._config.vision else 512))
        return StateShape(
            num_seqs, cache_len, round_up_to_groups(min(num_seqs, MAX_PREFIXES), self._groups), prefix_len
        )

    def replicated(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        """A ShapeDtypeStruct, replicated over all devices; typed `Any` because it takes the place of an array."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.programs.replicated)

    def first_chunk(self) -> tuple[steps.Chunk, tuple | None]:
        """The first chunk of prompts, with the most tokens that the scheduler admits, and its image embeddings."""
        vision = self._config.vision
        longest = bucket(min(self.chunk_len, self.max_text_len))
        lengths = [length for length in LENGTHS if length < longest] + [longest]
        batch_sizes = {length: self._batch_size(length, has_image=vision is not None) for length in lengths}
        length = max(lengths, key=lambda n: (batch_sizes[n] * (n + self._config.num_image_tokens), n))
        image_embeds = None
        if vision:
            shape = (vision.num_crops, vision.tokens_per_crop, self._config.language.dim)
            image_embeds = (self.replicated(shape, self._dtype),) * batch_sizes[length]
        return self._chunk(batch_sizes[length], length), image_embeds

    def later_chunk(self) -> steps.Chunk:
        """A chunk of prompts after their first, of the full chunk length."""
        return self._chunk(self._batch_size(self.chunk_len, has_image=False), self.chunk_len)

    def _batch_size(self, length: int, has_image: bool) -> int:
        """Prompts of one chunk, padding included: as `data_parallel.assign`."""
        num_image_tokens = self._config.num_image_tokens * has_image
        return self._groups * batch_sizes(length, num_image_tokens, FILE_CHUNKS, self._groups, self.shape.num_seqs)[-1]

    def _chunk(self, batch_size: int, length: int) -> steps.Chunk:
        integers = self.replicated((batch_size,))
        floats, booleans = (self.replicated((batch_size,), dtype) for dtype in (jnp.float32, jnp.bool_))
        return steps.Chunk(
            slot=integers,
            tokens=self.replicated((batch_size, length)),
            length=integers,
            start=integers,
            source=integers,
            target=integers,
            last=booleans,
            limit=integers,
            stop=integers,
            seeds=self.replicated((batch_size, 2), jnp.uint32),
            seen=self.replicated((batch_size, self._config.language.padded_vocab_size), jnp.bool_),
            sampling=SamplingArrays(floats, floats, integers, floats),
            rank_mask=self.replicated((batch_size, self._num_ranks), jnp.bool_) if self._num_ranks else None,
        )

    def encode_jobs(self, params: Any) -> list[Job]:
        """The vision encoders on as many images as the engine encodes at once; empty for a language model."""
        if not (vision := self._config.vision):
            return []
        num_images = self._batch_size(bucket(1), has_image=True)
        num_images = min(num_images, BATCHES[-1], max(1, ENCODE_PIXELS // vision.image_size**2))
        images = self.replicated((num_images, vision.image_size, vision.image_size, 3), jnp.float32)
        return [Job("encode images", self.programs.encode(), (params, images), (0,))]
