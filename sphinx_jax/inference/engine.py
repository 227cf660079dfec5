"""A model ready to answer: shapes rounded to buckets, one compiled program per bucket, pictures encoded once.

Every device program is compiled ahead of time and kept under the shapes it is for, so that nothing is ever
compiled again without anyone noticing. What they are is in `programs` and `steps`; `serving` says when they run.
"""

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

import sharding
from sharding import Program
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError
from sphinx_jax.inference import steps
from sphinx_jax.inference.bucketing import bucket, cache_len_for, power_of_two, prefill_tokens
from sphinx_jax.inference.data_parallel import deal, round_up_to_groups
from sphinx_jax.inference.programs import Programs
from sphinx_jax.inference.requests import PreparedImage, Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.stop_strings import stop_table

MAX_MODEL_LEN = 4096
"""Positions that a conversation may take, the picture included, unless the user says otherwise."""

ENCODE_PIXELS = 1 << 21
"""Pixels of pictures encoded at once at most: 8 of 512 x 512."""

IMAGE_CACHE_BYTES = 1 << 28
"""Encoded pictures kept on the device."""


def _promised(compiled: jax.stages.Compiled) -> Any:
    """Shapes and shardings of what a program gives."""
    shaped = lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)
    return jax.tree.map(shaped, compiled.out_info, compiled.output_shardings)


class Engine:
    """A model ready to answer. `params` hold the decoder's layers apart and lie on `mesh`.

    As long as they are abstract, what is asked is compiled and not run, and answered with shapes: see `prepare`.
    """

    def __init__(
        self,
        config: SphinxConfig,
        graph: nnx.GraphDef,
        params: dict,
        tokenizer: Tokenizer,
        mesh: Mesh,
        max_model_len: int = MAX_MODEL_LEN,
    ):
        if tokenizer.vocab_size > config.language.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces and the model only {config.language.vocab_size}: "
                "use the tokenizer.model that came with the checkpoint"
            )
        if max_model_len < 2:
            raise UserError(f"the context must be 2 positions or more, got {max_model_len}")
        self.config, self.tokenizer, self.mesh, self.max_model_len = config, tokenizer, mesh, max_model_len
        self.params, self.prefill_tokens = params, prefill_tokens(mesh)
        self.groups = sharding.num_shards("batch", mesh)
        dtype = params["language"]["embedding"]["table"].dtype
        self._programs = Programs(config, graph, tokenizer.vocab_size, mesh, dtype)
        self._compiled: dict[tuple, Callable] = {}
        self._pictures: collections.OrderedDict[bytes, Array] = collections.OrderedDict()
        self._tables: dict[tuple[str, ...], Array] = {}
        self.compile_seconds = 0.0
        self.images_encoded = 0

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far."""
        return len(self._compiled)

    # Programs

    def _run(self, key: tuple, program: Program, *args: Any) -> Any:
        """`program` compiled for the shapes and shardings of `args`, which `key` names, and run."""
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = program.compile(args, self.mesh)
            self.compile_seconds += time.perf_counter() - start
        compiled = self._compiled[key]
        return _promised(compiled) if self._is_abstract else compiled(*args)

    @property
    def _is_abstract(self) -> bool:
        return isinstance(self.params["language"]["embedding"]["table"], jax.ShapeDtypeStruct)

    def prepare(self, request: Request, stops: tuple[str, ...]) -> None:
        """While the parameters are abstract, compile what it takes to answer `request` alone."""
        table, sampling = self.stop_table(stops), SamplingParams()
        state = self.new_state(1, self.cache_len_needed(request))
        self.decode(self.prefill(state, [0], [request], sampling, table), sampling, table, 1, 0)
        # Encoded were shapes.
        self._pictures.clear()
        self.images_encoded = 0

    def new_state(self, num_seqs: int, cache_len: int) -> steps.State:
        """Empty rows, so many or a few more, as each group of devices has as many.

        Raises UserError if the cache does not fit into memory, with the length that would.
        """
        num_seqs = round_up_to_groups(num_seqs, self.groups)
        try:
            return jax.block_until_ready(
                self._run(("state", num_seqs, cache_len), self._programs.new_state(num_seqs, cache_len))
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = sharding.bytes_per_device(self._programs.abstract_state(num_seqs, cache_len))
            raise UserError(
                f"no memory for a cache of {num_seqs} x {cache_len} positions ({needed / 2**30:.1f} GiB on each device); "
                f"{self._what_fits(needed / (num_seqs * cache_len))}"
            ) from error

    def _what_fits(self, bytes_per_position: float) -> str:
        stats = self.mesh.local_devices[0].memory_stats()
        if not stats or "bytes_limit" not in stats:
            return "use a shorter --max-model-len or fewer rows"
        positions = int((stats["bytes_limit"] - stats["bytes_in_use"]) * 0.9 / bytes_per_position)
        return f"about {max(positions, 0)} positions over all rows would fit"

    def _prefill(
        self,
        state: steps.State,
        chunk: steps.Chunk,
        words: tuple[Array, ...] | None,
        sampling: SamplingParams,
        stops: Array,
    ) -> steps.State:
        first_chunk = not chunk.start.any()
        args = (self.params, state, chunk, words, sampling.values(), stops)
        key = (
            "prefill",
            state.num_seqs,
            state.cache_len,
            *chunk.tokens.shape,
            words is not None,
            first_chunk,
            stops.shape,
        )
        return self._run(key, self._programs.prefill(state, first_chunk), *args)

    def decode(
        self, state: steps.State, sampling: SamplingParams, stops: Array, number: int, until: int
    ) -> steps.State:
        """Up to `number` more tokens for each row, or until no more than `until` rows go on. Takes the state over."""
        args = (self.params, state, sampling.values(), stops, np.int32(number), np.int32(until))
        return self._run(("decode", state.num_seqs, state.cache_len, stops.shape), self._programs.decode(state), *args)

    def stop_table(self, stops: tuple[str, ...]) -> Array:
        """The automaton of these stop strings, on the device."""
        if stops not in self._tables:
            if len(self._tables) >= 16:
                self._tables.pop(next(iter(self._tables)))
            table = stop_table(self.tokenizer, self.config.language.vocab_size, stops)
            self._tables[stops] = jax.device_put(table, self._programs.everywhere)
        return self._tables[stops]

    # Pictures

    def encode(self, pictures: Sequence[PreparedImage]) -> list[Float[Array, "crops tokens dim"]]:
        """The words of each picture. A picture seen before, in this call or an earlier one, is not encoded again."""
        wanted = {picture.digest: picture for picture in pictures}
        found = {digest: self._pictures[digest] for digest in wanted if digest in self._pictures}
        new = [digest for digest in wanted if digest not in found]
        at_once = max(1, ENCODE_PIXELS // self.config.vision.image_size**2)
        for first in range(0, len(new), at_once):
            group = new[first : first + at_once]
            found |= dict(zip(group, self._encode([wanted[digest] for digest in group]), strict=False))
        self.images_encoded += len(new)
        for digest, words in found.items():
            self._pictures[digest] = words
            self._pictures.move_to_end(digest)
        while len(self._pictures) > 1 and sum(w.nbytes for w in self._pictures.values()) > IMAGE_CACHE_BYTES:
            self._pictures.popitem(last=False)
        return [found[picture.digest] for picture in pictures]

    def _encode(self, pictures: list[PreparedImage]) -> tuple[Float[Array, "crops tokens dim"], ...]:
        padding = pictures[:1] * (power_of_two(len(pictures)) - len(pictures))
        batch = np.stack([picture.normalised() for picture in pictures + padding])
        return self._run(("encode", len(batch)), self._programs.encode(), self.params, batch)

    # The whole model at once

    def logits(
        self, tokens: Int[np.ndarray, "batch text"], pictures: Sequence[PreparedImage] | None
    ) -> Float[Array, "batch text vocab"]:
        """Scores of the word after each token, teacher-forced, without a cache. Compiled for each shape anew."""
        images = np.stack([picture.normalised() for picture in pictures]) if pictures else None
        key = ("logits", *tokens.shape, images is not None)
        return self._run(key, self._programs.logits(), self.params, tokens, images)

    # Requests

    def prompt_length(self, request: Request) -> int:
        """Positions that the prompt takes, the picture included. Raises UserError if the context is too short."""
        picture = self.config.num_image_tokens if request.picture else 0
        length = len(request.tokens) + picture
        if length >= self.max_model_len:
            detail = f", {picture} of them the picture" if picture else ""
            raise UserError(
                f"the prompt is {length} tokens long{detail}, and the context of {self.max_model_len} has to hold it and "
                "the answer: shorten the prompt or raise --max-model-len"
            )
        return length

    def cache_len_needed(self, request: Request) -> int:
        """Positions of the cache that the prompt, padded as it will be read, and its answer need."""
        picture = self.prompt_length(request) - len(request.tokens)
        return cache_len_for(
            len(request.tokens), picture, request.max_new_tokens, self.max_model_len, self.prefill_tokens
        )

    def prefill(
        self,
        state: steps.State,
        num_seqs: Sequence[int],
        requests: Sequence[Request],
        sampling: SamplingParams,
        stops: Array,
        reuse: int = 0,
    ) -> steps.State:
        """Each request's prompt into its row, in chunks. All have a picture or none has.

        The first `reuse` tokens, and the picture after the first, are in the cache already.
        """
        num_image_tokens = self.config.num_image_tokens if requests[0].picture else 0
        words = self.encode([r.picture for r in requests]) if num_image_tokens and not reuse else None
        for first in range(reuse, max(len(r.tokens) for r in requests), self.prefill_tokens):
            at = [i for i, r in enumerate(requests) if len(r.tokens) > first]
            places = [
                None if i is None else at[i] for i in deal([num_seqs[i] for i in at], self.groups, state.num_seqs)
            ]
            chunk = self._chunk(places, num_seqs, requests, first, num_image_tokens, state, sampling)
            chunk_words = tuple(words[i or 0] for i in places) if words is not None and first == 0 else None
            state = self._prefill(state, chunk, chunk_words, sampling, stops)
        return state

    def _chunk(
        self,
        places: Sequence[int | None],
        num_seqs: Sequence[int],
        requests: Sequence[Request],
        first: int,
        num_image_tokens: int,
        state: steps.State,
        sampling: SamplingParams,
    ) -> steps.Chunk:
        """Tokens `first` to `first` + `prefill_tokens` of the requests that `places` names, padded to a bucket."""
        parts = {i: list(requests[i].tokens[first : first + self.prefill_tokens]) for i in places if i is not None}
        batch, text = len(places), bucket(max(map(len, parts.values())))
        chunk = steps.Chunk(
            row=np.full(batch, state.num_seqs, np.int32),
            tokens=np.zeros((batch, text), np.int32),
            length=np.ones(batch, np.int32),
            start=np.full(batch, first + num_image_tokens if first else 0, np.int32),
            limit=np.ones(batch, np.int32),
            seeds=np.zeros((batch, 2), np.uint32),
            seen=np.zeros((batch, self.config.language.vocab_size), bool),
        )
        for place, i in enumerate(places):
            if i is None:
                continue
            request, part = requests[i], parts[i]
            chunk.row[place] = num_seqs[i]
            chunk.tokens[place, : len(part)] = part
            chunk.length[place] = len(part)
            chunk.limit[place] = min(request.max_new_tokens, self.max_model_len - self.prompt_length(request))
            chunk.seeds[place] = request.seeds()
            if sampling.repetition_penalty != 1:
                chunk.seen[place, list(request.tokens)] = True
        return chunk
