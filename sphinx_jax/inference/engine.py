"""Runs a model's device programs: one compiled program for each set of shapes, images encoded once.

Every program is compiled ahead of time and kept under the shapes it is for, so that nothing is compiled twice without
anyone noticing. What the programs are is in `programs` and `steps`; `scheduler` decides when they run.
"""

import collections
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

import sharding
from sharding import Program
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.conversation import DEFAULT_TEMPLATE
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError
from sphinx_jax.inference import steps
from sphinx_jax.inference.bucketing import (
    BATCHES,
    LENGTHS,
    bucket,
    positions_for,
    power_of_two,
    prefill_tokens,
)
from sphinx_jax.inference.data_parallel import round_up_to_groups
from sphinx_jax.inference.expert_load import padded_batch
from sphinx_jax.inference.programs import Programs, StateShape
from sphinx_jax.inference.prompt_logprobs import PromptLogprobs, padded, unpadded
from sphinx_jax.inference.requests import PreparedImage, Request
from sphinx_jax.inference.stop_strings import stop_table
from sphinx_jax.kernels.attention import kv_slice_cost
from sphinx_jax.lora_params import num_ranks
from sphinx_jax.quantization import has_quantized

MAX_MODEL_LEN = 4096
"""Positions that a prompt, its image and its answer may take, unless the user sets another number."""

ENCODE_PIXELS = 1 << 21
"""Pixels of images encoded in one call at most: 8 of 512 x 512."""

IMAGE_CACHE_BYTES = 1 << 28
"""Image embeddings kept on the device."""

ImageEmbeds = Float[Array | jax.ShapeDtypeStruct, "crops tokens dim"]
"""Of one image; their shape alone while programs are compiled ahead."""


def _abstract_results(compiled: jax.stages.Compiled) -> Any:
    """Shapes and shardings of what a program returns."""
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        compiled.out_info,
        compiled.output_shardings,
    )


class Engine:
    """A model ready to run. `params` hold the decoder's layers unstacked and are placed on `mesh`.

    As long as they or other arguments are abstract, programs are compiled and not run, and return shapes: see
    `generate.compile_alone` and `warmup`.
    """

    def __init__(
        self,
        config: SphinxConfig,
        graph: Any,
        params: dict,
        tokenizer: Tokenizer,
        mesh: Mesh,
        max_model_len: int = MAX_MODEL_LEN,
        adapters: Mapping[str, Bool[np.ndarray, "rank"]] | None = None,
    ):
        if tokenizer.vocab_size > config.language.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces and the model only {config.language.vocab_size}: "
                "use the tokenizer.model that came with the checkpoint"
            )
        if max_model_len < 2:
            raise UserError(f"--max-model-len must be 2 positions or more, got {max_model_len}")
        window = config.language.sliding_window
        if window is not None and max_model_len > window:
            raise UserError(
                f"this model attends to a sliding window of {window} tokens, which is not computed beyond its first: "
                f"use --max-model-len {window} or less"
            )
        self.config, self.tokenizer, self.mesh, self.max_model_len = config, tokenizer, mesh, max_model_len
        self.params, self.prefill_tokens = params, prefill_tokens(mesh)
        with sharding.mesh_context(mesh):
            self.kv_slice_cost = kv_slice_cost()
        self.groups = sharding.num_shards("batch", mesh)
        """Data-parallel groups of devices, each with batch slots of its own."""
        dtype = params["language"]["embedding"]["table"].dtype
        self._num_ranks = num_ranks(params)
        self._programs = Programs(config, graph, tokenizer.vocab_size, mesh, dtype, self._num_ranks)
        self.adapters = dict(adapters or {})
        """By name, which ranks of the adapters in `params` are its own (`inference.adapters`)."""
        self._compiled: dict[tuple, Future[Any]] = {}
        self._compile_lock = threading.Lock()
        self._compiling, self._compiling_since = 0, 0.0
        self._image_embeds: collections.OrderedDict[bytes, Array] = collections.OrderedDict()
        self._stop_table: Array | None = None
        self.compile_seconds = 0.0
        """Time in which something was being compiled."""
        self.images_encoded = 0
        self.refuses_forged_turns = False
        """Whether questions that hold the end mark of a turn are refused, not passed on as in the original."""

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far, or are being compiled."""
        return len(self._compiled)

    # Programs

    def _run(self, key: tuple, program: Program, *args: Any) -> Any:
        """`program` compiled for the shapes and shardings of `args`, which `key` names, and run."""
        compiled = self._compile(key, program, args)
        table = self.params["language"]["embedding"]["table"]
        is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((table, args)))
        return _abstract_results(compiled) if is_abstract else compiled(*args)

    def _compile(self, key: tuple, program: Program, args: tuple) -> jax.stages.Compiled:
        """`program` compiled for `args`. Threads that want the same program wait for the one that compiles it."""
        with self._compile_lock:
            is_new = key not in self._compiled
            future = self._compiled.setdefault(key, Future())
        if is_new:
            try:
                with self._timed_compilation():
                    future.set_result(program.compile(args, self.mesh))
            except BaseException as error:
                del self._compiled[key]
                future.set_exception(error)
        return future.result()

    @contextlib.contextmanager
    def _timed_compilation(self) -> Iterator[None]:
        """Adds to `compile_seconds` while the block runs, however many threads compile."""
        with self._compile_lock:
            if not self._compiling:
                self._compiling_since = time.perf_counter()
            self._compiling += 1
        try:
            yield
        finally:
            with self._compile_lock:
                self._compiling -= 1
                if not self._compiling:
                    self.compile_seconds += time.perf_counter() - self._compiling_since

    def new_state(self, shape: StateShape) -> steps.State:
        """Free batch slots and an empty pool of prefixes.

        Slots and prefixes must be multiples of the data-parallel groups (`round_up`). Raises UserError if the KV cache
        does not fit into memory, with the length that would.
        """
        try:
            return jax.block_until_ready(self._run(("state", shape), self._programs.new_state(shape)))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = sharding.bytes_per_device(self._programs.abstract_state(shape))
            raise UserError(
                f"no memory for a KV cache of {shape.num_seqs} x {shape.cache_len} positions "
                f"({needed / 2**30:.1f} GiB on each device); "
                f"{self._what_fits(needed / (shape.num_seqs * shape.cache_len))}"
            ) from error

    def abstract_state(self, shape: StateShape) -> steps.State:
        """The shapes of `new_state`, whose program is compiled."""
        return _abstract_results(self._compile(("state", shape), self._programs.new_state(shape), ()))

    def state_bytes(self, shape: StateShape) -> int:
        """Bytes on each device of the state."""
        return sharding.bytes_per_device(self._programs.abstract_state(shape))

    @property
    def working_bytes(self) -> int:
        """Bytes on each device of the temporaries and new results of the compiled program that has most, besides the
        one whose result is the state."""
        stats = [future.result().memory_analysis() for key, future in self._compiled.items() if key[0] != "state"]
        sizes = (s.temp_size_in_bytes + s.output_size_in_bytes - s.alias_size_in_bytes for s in stats)
        return max(sizes, default=0)

    @property
    def reserved_bytes(self) -> int:
        """Bytes on each device that no state may take, besides what the programs need."""
        return 0

    @property
    def all_params(self) -> dict:
        """The model's parameters."""
        return self.params

    def round_up(self, count: int) -> int:
        """As many batch slots, or prefixes, or a few more: as many for each data-parallel group."""
        return round_up_to_groups(count, self.groups)

    def cache_bytes(self, positions: int) -> int:
        """Bytes on each device of the KV cache of so many positions of one sequence in each data-parallel group."""
        state = self._programs.abstract_state(StateShape(self.groups, positions))
        return sharding.bytes_per_device(state.cache)

    def _what_fits(self, bytes_per_position: float) -> str:
        stats = self.mesh.local_devices[0].memory_stats()
        if not stats or "bytes_limit" not in stats:
            return "use a shorter --max-model-len or a smaller --max-num-seqs"
        positions = int((stats["bytes_limit"] - stats["bytes_in_use"]) * 0.9 / bytes_per_position)
        return f"about {max(positions, 0)} positions over all sequences would fit"

    def prefill(
        self, state: steps.State, chunk: steps.Chunk, image_embeds: tuple[ImageEmbeds, ...] | None, wants_top: bool
    ) -> tuple[steps.State, steps.Sampled]:
        """One chunk of some prompts into their slots. Donates the state. The parts of the KV cache before the chunk
        are read unless every prompt begins in it.
        """
        first_chunk = not chunk.start.any()
        key = ("prefill", *state.sizes, *chunk.tokens.shape, image_embeds is not None, first_chunk)
        program = self._programs.prefill(state, first_chunk)
        return self._run(key, program, self.params, state, chunk, image_embeds, self.stops, np.bool_(wants_top))

    def decode(
        self,
        state: steps.State,
        cancelled: np.ndarray,
        num_steps: int,
        until: int,
        kv_len: int,
        wants_top: bool,
    ) -> tuple[steps.State, steps.Sampled]:
        """Up to `num_steps` more tokens for each running sequence, or until no more than `until` run. Donates the
        state. No running sequence may grow past `kv_len` cache positions.
        """
        args = (self.params, state, cancelled, self.stops, np.int32(num_steps), np.int32(until), np.bool_(wants_top))
        program = self._programs.decode(state, kv_len, has_quantized(self.params))
        return self._run(("decode", *state.sizes, kv_len), program, *args)

    @property
    def stops(self) -> Array:
        """The automaton of EOS and the template's end signal, on the device."""
        if self._stop_table is None:
            signals = (DEFAULT_TEMPLATE.response_end_signal,)
            table = stop_table(self.tokenizer, self.config.language.padded_vocab_size, signals)
            self._stop_table = jax.device_put(jax.numpy.asarray(table), self._programs.replicated)
        assert self._stop_table is not None
        return self._stop_table

    # Images

    @property
    def image_cache_bytes(self) -> int:
        """Image embeddings kept on the device."""
        return sum(embeds.nbytes for embeds in list(self._image_embeds.values()))

    def forget_images(self) -> None:
        """Drop all image embeddings."""
        self._image_embeds.clear()
        self.images_encoded = 0

    def encode(
        self, images: Sequence[PreparedImage], sizes: Sequence[int] = BATCHES
    ) -> list[Float[Array, "crops tokens dim"]]:
        """The embeddings of each image. An image seen before, in this call or an earlier one, is not encoded again.

        The encoders run on the least of `sizes` that is enough, padding included, or on `max_images`.
        """
        wanted = {image.digest: image for image in images}
        found = {digest: self._image_embeds[digest] for digest in wanted if digest in self._image_embeds}
        new = [digest for digest in wanted if digest not in found]
        first = 0
        for size in self.encoder_batches(len(new), sizes):
            group = [wanted[digest] for digest in new[first : first + size]]
            padded_group = group + group[:1] * (size - len(group))
            embeds: Any = self._run_encoders(np.stack([image.normalised() for image in padded_group]))
            found |= {image.digest: own for image, own in zip(group, embeds, strict=False)}
            first += size
        self.images_encoded += len(new)
        for digest, embeds in found.items():
            self._image_embeds[digest] = embeds
            self._image_embeds.move_to_end(digest)
        while len(self._image_embeds) > 1 and self.image_cache_bytes > IMAGE_CACHE_BYTES:
            self._image_embeds.popitem(last=False)
        return [found[image.digest] for image in images]

    def missing_embeds(self, images: Sequence[PreparedImage]) -> set[bytes]:
        """Digests of the images whose embeddings are not kept."""
        return {image.digest for image in images} - self._image_embeds.keys()

    def encoder_batches(self, count: int, sizes: Sequence[int]) -> Iterator[int]:
        """The numbers of images, padding included, that the encoders run on for `count` new ones."""
        at_once = min(sizes[-1], self.max_images)
        for first in range(0, count, at_once):
            yield next(size for size in self.encoder_sizes(sizes) if size >= min(count - first, at_once))

    def compile_encoders(self, num_images: int) -> None:
        """Compile the encoders' program for so many images, padding included."""
        assert self.config.vision is not None
        size = self.config.vision.image_size
        self._run_encoders(jax.ShapeDtypeStruct((num_images, size, size, 3), np.float32))

    def abstract_embeds(self, num_images: int) -> tuple[ImageEmbeds, ...]:
        """The shapes of the embeddings of so many images. They do not depend on how many are encoded together."""
        vision = self.config.vision
        assert vision is not None
        shape = (vision.num_crops, vision.tokens_per_crop, self.config.language.dim)
        dtype = self.params["language"]["embedding"]["table"].dtype
        embeds: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=self._programs.replicated)
        return (embeds,) * num_images

    def _run_encoders(self, images: Any) -> tuple[ImageEmbeds, ...]:
        return self._run(("encode", images.shape[0]), self._programs.encode(), self.params, images)

    @property
    def max_images(self) -> int:
        """Images encoded in one call at most."""
        assert self.config.vision is not None, "a model without encoders has no images"
        return max(1, ENCODE_PIXELS // self.config.vision.image_size**2)

    def encoder_sizes(self, sizes: Sequence[int]) -> list[int]:
        """The numbers of images that the encoders run on, of `sizes` of chunks: no more than `max_images`."""
        return sorted({min(size, self.max_images) for size in sizes})

    # The whole model at once

    def rank_masks(self, adapters: Sequence[str | None]) -> Bool[np.ndarray, "batch rank"] | None:
        """The ranks of each sequence's adapter (None: the base, and no rank); None if no adapter is loaded.

        Raises UserError on an unknown name.
        """
        for name in adapters:
            if name is not None and name not in self.adapters:
                loaded = f"choose one of {', '.join(self.adapters)}" if self.adapters else "none is loaded"
                raise UserError(f"unknown adapter {name!r:.100}; {loaded}")
        if not self._num_ranks:
            return None
        base = np.zeros(self._num_ranks, bool)
        return np.stack([base if name is None else self.adapters[name] for name in adapters])

    def _factor_masks(self, adapters: Sequence[str | None]) -> Float[np.ndarray, "batch rank"] | None:
        masks = self.rank_masks(adapters)
        return None if masks is None else masks.astype(self.params["language"]["embedding"]["table"].dtype)

    def logits(
        self,
        tokens: Int[np.ndarray, "batch text"],
        images: Sequence[PreparedImage] | None,
        adapter: str | None = None,
    ) -> Float[Array, "batch text vocab"]:
        """Logits of the token after each token, teacher-forced, without a KV cache. Compiled for each shape."""
        pixels = np.stack([image.normalised() for image in images]) if images else None
        key = ("logits", *tokens.shape, pixels is not None)
        masks = self._factor_masks([adapter] * len(tokens))
        return self._run(key, self._programs.logits(), self.params, tokens, pixels, masks)

    def expert_load(
        self, texts: Sequence[Sequence[int]], images: Sequence[PreparedImage] | None
    ) -> Int[np.ndarray, "layers kinds experts"]:
        """How many assignments to experts the tokens of some texts make, each with its image or all without; kinds are
        `expert_load.KINDS`."""
        size = self.round_up(power_of_two(len(texts)))
        tokens, lengths = padded_batch(texts, size)
        pixels = None
        if images is not None:
            padding = [images[0]] * (size - len(images))
            pixels = np.stack([image.normalised() for image in [*images, *padding]])
        key = ("expert load", *tokens.shape, pixels is not None)
        args = (self.params, tokens, lengths, pixels, self._factor_masks([None] * size))
        return np.asarray(self._run(key, self._programs.expert_load(), *args))

    def prompt_logprobs(self, tokens: list[int], adapter: str | None = None) -> PromptLogprobs:
        """Log-probabilities of the tokens of a text, each given those before it."""
        row, mask = padded(tokens), self._factor_masks([adapter])
        scored = self._run(("prompt logprobs", row.shape[1]), self._programs.score(), self.params, row, mask)
        return unpadded(tokens, jax.device_get(scored))

    # Requests

    def prompt_len(self, request: Request) -> int:
        """Positions that the prompt takes, image tokens included. Raises UserError if it does not fit."""
        num_image_tokens = self.config.num_image_tokens if request.image else 0
        length = len(request.tokens) + num_image_tokens
        if length >= self.max_model_len:
            detail = f", {num_image_tokens} of them the image" if num_image_tokens else ""
            raise UserError(
                f"the prompt is {length} tokens long{detail}, and --max-model-len {self.max_model_len} has to hold it "
                "and the answer: shorten the prompt or raise --max-model-len"
            )
        return length

    def positions_needed(self, request: Request, lengths: tuple[int, ...] = LENGTHS) -> int:
        """Cache positions that the prompt, padded to chunks of `lengths`, and its answer need."""
        num_image_tokens = self.prompt_len(request) - len(request.tokens)
        return positions_for(
            len(request.tokens),
            num_image_tokens,
            request.params.max_new_tokens,
            self.max_model_len,
            self.prefill_tokens,
            lengths,
        )

    def cache_len_of_all(self, lengths: tuple[int, ...]) -> int:
        """Cache positions of a sequence that hold every prompt that fits, padded to chunks of `lengths`."""
        longest = max(
            positions_for(text, image, 1, self.max_model_len, self.prefill_tokens, lengths)
            for image in {0, self.config.num_image_tokens if self.config.vision else 0}
            for text in range(1, max(self.max_model_len - image, 2))
        )
        return -(-longest // 128) * 128

    def prefix_len(self, cache_len: int) -> int:
        """Cache positions of a prefix of the pool: an image and the template before it, or a system text."""
        return min(cache_len, bucket(self.config.num_image_tokens + 128 if self.config.vision else 512))
