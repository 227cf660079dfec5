"""Running a model that is larger than the devices: its experts are in host memory, copied when the router selects them.

Attention, routers, norms, embedding and head are on the devices for good. What memory is left holds the experts used
last (`expert_cache`); a decode step copies only selected experts that are not among them. The vision encoders go to
host memory as well if that makes room for an expert that would not fit, and are copied back for each new image. The
numbers are those of the model that fits: the same functions run, in more programs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

import sharding
from sharding import Program
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError
from sphinx_jax.inference import steps
from sphinx_jax.inference.bucketing import BATCHES, LENGTHS, bucket, prefill_tokens
from sphinx_jax.inference.capacity import usable_bytes
from sphinx_jax.inference.engine import IMAGE_CACHE_BYTES, MAX_MODEL_LEN, Engine, ImageEmbeds
from sphinx_jax.inference.expert_cache import SPARE, ExpertCache, best_fit
from sphinx_jax.inference.offload_params import abstract_on_device, encoders_of, on_device, split_experts, to_host
from sphinx_jax.inference.offload_programs import Carry, OffloadPrograms, Selection
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.prompt_logprobs import PromptLogprobs
from sphinx_jax.inference.requests import PreparedImage
from sphinx_jax.quantization import has_quantized

Attend = Callable[[int, dict, Carry], tuple[Carry, Selection]]
"""(number of the layer, its parameters, hidden states) -> hidden states, and what its experts compute on."""


def offload_prefill_tokens(mesh: Mesh, max_model_len: int) -> int:
    """Longer prompts are prefilled in chunks of this many tokens: the most that a chunk can have, on every GPU.

    Each chunk copies nearly all experts, so fewer chunks are worth their memory.
    """
    return max(prefill_tokens(mesh), min(bucket(max_model_len), LENGTHS[-1]))


def _is_abstract(tree: Any) -> bool:
    """Whether programs are to be compiled and not run."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


class OffloadEngine(Engine):
    """An engine for parameters as `offload_params.offloaded` places them.

    `device_bytes` limits what it takes of each device, experts included; by default what the allocator gives out.
    """

    def __init__(
        self,
        config: SphinxConfig,
        params: dict,
        tokenizer: Tokenizer,
        mesh: Mesh,
        max_model_len: int = MAX_MODEL_LEN,
        device_bytes: int | None = None,
    ):
        outside, self._layers, experts = split_experts(params)
        self._by_layer = OffloadPrograms(config, tokenizer.vocab_size, mesh, has_quantized(params))
        super().__init__(config, self._by_layer.graph, outside, tokenizer, mesh, max_model_len)
        self.prefill_tokens = offload_prefill_tokens(mesh, max_model_len)
        self.cache = ExpertCache(experts)
        self.device_bytes = usable_bytes(mesh.local_devices[0]) if device_bytes is None else device_bytes
        self._numbers = [jax.device_put(np.int32(i), self._by_layer.replicated) for i in range(len(experts[0]))]
        """Of the experts, on the devices: one that came from the host with each call would wait for copies."""
        self._encoders_in_host_memory = False
        self._encoders: dict | None = None
        """On the devices while images are encoded, if their place is in host memory."""
        self._fitted_programs = 0
        self._hidden_bytes = 0
        """Of the largest hidden states between the programs of a layer."""

    @property
    def all_params(self) -> dict:
        """The parameters that this engine was made of, wherever they are now."""
        layers = dict(enumerate(self._layers))
        return self.params | {"language": self.params["language"] | {"layers": layers}}

    # Memory

    @property
    def reserved_bytes(self) -> int:
        """Of each device, what experts need at least."""
        return SPARE * self.cache.expert_bytes

    def _fit(self, new_bytes: int = 0) -> None:
        """Keep as many experts as there is room for besides all arrays on the devices and `new_bytes` more.

        Called before the state or the encoders are allocated, and when a program was compiled: its temporaries may be
        the largest so far. Calls come in the same order in all processes, which must keep the same experts.
        """
        others = self._live_bytes() - self.cache.device_bytes
        reserve = IMAGE_CACHE_BYTES - self.image_cache_bytes if self.config.vision else 0
        free = self.device_bytes - others - reserve - self.working_bytes - self._hidden_bytes - new_bytes
        free = sharding.least_of_processes(max(free, 0))
        movable = 0 if self._encoders_in_host_memory else self._encoder_bytes
        kept, move_encoders = best_fit(free, self.cache.expert_bytes, self.cache.num_experts, movable)
        if move_encoders:
            self.params = self.params | {"vision": self.params["vision"] | to_host(self._encoder_params)}
            self._encoders_in_host_memory = True
        self.cache.resize(kept)

    def _live_bytes(self) -> int:
        """Bytes on a device of all arrays of this process."""
        device = self.mesh.local_devices[0]
        arrays = (array for array in jax.live_arrays() if device in array.sharding.device_set)
        return sharding.bytes_per_device([array for array in arrays if array.sharding.memory_kind == "device"])

    def new_state(self, shape: StateShape) -> steps.State:
        """As `Engine.new_state`; experts make room for it."""
        self._fit(self.state_bytes(shape))
        return super().new_state(shape)

    def _run(self, key: tuple, program: Program, *args: Any) -> Any:
        if not _is_abstract(args):
            self._make_room_for(key, program, args)
        return super()._run(key, program, *args)

    def _make_room_for(self, key: tuple, program: Program, args: tuple) -> None:
        """Compile a program that is about to run; experts make room for its temporaries."""
        self._compile(key, program, args)
        if len(self._compiled) > self._fitted_programs:
            self._fitted_programs = len(self._compiled)
            self._fit()

    # Images

    @property
    def _encoder_params(self) -> dict:
        return encoders_of(self.params)

    @property
    def _encoder_bytes(self) -> int:
        return sharding.bytes_per_device(self._encoder_params)

    def encode(
        self, images: Sequence[PreparedImage], sizes: Sequence[int] = BATCHES
    ) -> list[Float[Array, "crops tokens dim"]]:
        """As `Engine.encode`. Encoders whose place is in host memory are copied once for all images."""
        try:
            return super().encode(images, sizes)
        finally:
            if self._encoders is not None:
                self._encoders = None
                self._fit()

    def _run_encoders(self, images: Any) -> tuple[ImageEmbeds, ...]:
        program, vision = self._programs.encode(), self.params["vision"]
        if _is_abstract(images):
            encoders = abstract_on_device(self._encoder_params)
        else:
            if self._encoders is None and self._encoders_in_host_memory:
                self._fit(self._encoder_bytes)
                self._encoders = on_device(self._encoder_params)
            encoders = self._encoders or self._encoder_params
        params = self.params | {"vision": vision | encoders}
        return self._run(("encode", images.shape[0]), program, params, images)

    # Layers

    def _through_layers(self, carry: Carry, is_prefill: bool, attend: Attend) -> Carry:
        """Hidden states after all layers. If they are abstract, programs are compiled, which all layers share."""
        batch, length = carry.h.shape[:2]
        self._hidden_bytes = max(self._hidden_bytes, sharding.bytes_per_device([carry, carry.h]))
        key = ("expert", batch, length, is_prefill)
        program = self._by_layer.expert(batch, length, is_prefill)
        run = super()._run
        if _is_abstract(carry):
            carry, selection = attend(0, abstract_on_device(self._layers[0]), carry)
            args = (self.cache.abstract_expert, carry.outputs, selection, self._numbers[0])
            return carry._replace(outputs=run(key, program, *args))
        for i, layer in enumerate(self._layers):
            carry, selection = attend(i, layer, carry)
            # Now: while experts compute, none may be dropped for a program's sake.
            self._make_room_for(key, program, (self.cache.abstract_expert, carry.outputs, selection, self._numbers[0]))

            def add(i: int, expert: Any, outputs: Any, selection: Selection = selection) -> Any:
                return run(key, program, expert, outputs, selection, self._numbers[i])

            # The host waits here for the router.
            selected = np.flatnonzero(np.asarray(selection.load)).tolist()
            carry = carry._replace(outputs=self.cache.compute(i, selected, add, carry.outputs))
        return carry

    def prefill(
        self, state: steps.State, chunk: steps.Chunk, image_embeds: tuple[ImageEmbeds, ...] | None, wants_top: bool
    ) -> tuple[steps.State, steps.Sampled]:
        """As `Engine.prefill`, layer by layer: a chunk copies each expert once at most."""
        programs, first_chunk, rest = self._by_layer, not chunk.start.any(), state.without_cache
        cache, prefixes = list(state.cache), list(state.prefixes)
        if _is_abstract(state):
            chunk = jax.eval_shape(lambda: chunk)
        batch, text = chunk.tokens.shape
        num_image_tokens = self.config.num_image_tokens if image_embeds is not None else 0
        length = text + num_image_tokens
        size = (*state.sizes, batch, length, num_image_tokens)
        key = ("prefill embed", batch, length, num_image_tokens)
        carry, positions = self._run(key, programs.prefill_embed(batch, length), self.params, chunk, image_embeds)

        first_prefixes = prefixes[0] if prefixes else None
        program = programs.prefill_attend(cache[0], first_prefixes, batch, length, num_image_tokens, first_chunk)

        def attend(i: int, layer: dict, carry: Carry) -> tuple[Carry, Selection]:
            own_prefixes = prefixes[i] if prefixes else None
            args = (layer, carry, positions, cache[i], own_prefixes, chunk)
            carry, selection, cache[i], stored = self._run(("prefill attend", *size, first_chunk), program, *args)
            if prefixes:
                prefixes[i] = stored
            return carry, selection

        carry = self._through_layers(carry, True, attend)
        args = (self.params, rest, chunk, carry, self.stops, np.bool_(wants_top))
        rest, sampled = self._run(("prefill finish", *size), programs.prefill_finish(rest), *args)
        return rest._replace(cache=cache, prefixes=prefixes), sampled

    def decode(
        self,
        state: steps.State,
        cancelled: np.ndarray,
        num_steps: int,
        until: int,
        kv_len: int,
        wants_top: bool,
    ) -> tuple[steps.State, steps.Sampled]:
        """As `Engine.decode`, token by token."""
        cache, size = list(state.cache), (state.num_seqs, state.cache_len)
        # Made once: their shardings take longer than a step's other work on the host.
        embed = self._by_layer.decode_embed(state.num_seqs)
        program = self._by_layer.decode_attend(cache[0], kv_len)
        finish = self._by_layer.decode_finish(state.without_cache)

        def step(rest: steps.State) -> tuple[steps.State, steps.Sampled]:
            carry, positions = self._run(("decode embed", *size), embed, self.params, rest)

            def attend(i: int, layer: dict, carry: Carry) -> tuple[Carry, Selection]:
                args = (layer, carry, positions, cache[i], rest.done)
                carry, selection, cache[i] = self._run(("decode attend", *size, kv_len), program, *args)
                return carry, selection

            carry = self._through_layers(carry, False, attend)
            args = (self.params, rest, carry, self.stops, np.bool_(wants_top))
            return self._run(("decode finish", *size), finish, *args)

        if _is_abstract(state):
            return step(state.without_cache)
        rest = state.without_cache._replace(done=state.done | cancelled)
        columns: list[steps.Sampled] = []
        sampled = jax.device_get(steps.empty_sampled(rest, 0))
        while len(columns) < num_steps and np.sum(~np.asarray(sampled.done)) > until:
            rest, sampled = step(rest)
            sampled = jax.device_get(sampled)
            columns.append(sampled)
        names = ("tokens", "logprobs", "top_tokens", "top_logprobs")
        if columns:
            joined = {name: np.concatenate([getattr(column, name) for column in columns], axis=1) for name in names}
            sampled = sampled._replace(**joined)
        return rest._replace(cache=cache, prefixes=state.prefixes), sampled

    def logits(
        self,
        tokens: Int[np.ndarray, "batch text"],
        images: Sequence[PreparedImage] | None,
        adapter: str | None = None,
    ) -> Float[Array, "batch text vocab"]:
        """As `Engine.logits`; no adapter is loaded."""
        self.rank_masks([adapter])  # raises UserError on one
        programs, (batch, text) = self._by_layer, tokens.shape
        embeds = jnp.stack(self.encode(images)) if images else None
        size = (batch, text + (self.config.num_image_tokens if images else 0))
        carry = self._run(("forward embed", *size, text), programs.forward_embed(*size), self.params, tokens, embeds)

        def attend(i: int, layer: dict, carry: Carry) -> tuple[Carry, Selection]:
            return self._run(("forward attend", *size), programs.forward_attend(*size), layer, carry)

        carry = self._through_layers(carry, True, attend)
        return self._run(("forward logits", *size, text), programs.forward_logits(text), self.params, carry)

    def expert_load(
        self, texts: Sequence[Sequence[int]], images: Sequence[PreparedImage] | None
    ) -> Int[np.ndarray, "layers kinds experts"]:
        """Raises UserError: the program needs all layers on the devices."""
        raise UserError("the experts' load needs all experts on the devices: start without --offload")

    def prompt_logprobs(self, tokens: list[int], adapter: str | None = None) -> PromptLogprobs:
        """Raises UserError: the program needs all layers on the devices."""
        raise UserError("log-probabilities of a prompt need all experts on the devices: start without --offload")
