"""Decoding a model that is larger than the devices: its layers stay in host memory and are copied in one by one.

While a layer computes, the next one is copied to the devices. They never hold more than two layers, and the numbers
are those of the model that fits: the same functions run, one program a layer instead of one for all. A token takes as
long as copying every layer, so this is for a GPU on which nothing else fits.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import sharding
from sharding import Program, named_sharding
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError
from sphinx_jax.inference import steps
from sphinx_jax.inference.engine import MAX_MODEL_LEN, Engine
from sphinx_jax.inference.prompt_logprobs import PromptLogprobs
from sphinx_jax.inference.requests import PreparedImage
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.language.attention import LayerCache
from sphinx_jax.language.decoder import DecoderLayer
from sphinx_jax.model import SphinxMoE, bind

Path = tuple[str | int, ...]
Hidden = Float[Array, "batch length dim"]
Positions = Int[Array, "batch length"]


def in_host_memory(path: Path, param: Any) -> Any:
    """A parameter of the model, moved to host memory if it is a layer's; arrays or abstract ones."""
    if path[:2] != ("language", "layers"):
        return param

    def move(leaf: Any) -> Any:
        host = leaf.sharding.with_memory_kind("pinned_host")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)
        return jax.device_put(leaf, host)

    return jax.tree.map(move, param)


def split_layers(params: dict) -> tuple[dict, list[dict]]:
    """The parameters outside of the layers, and those of each layer."""
    language = params["language"]
    layers = [language["layers"][i] for i in range(len(language["layers"]))]
    return params | {"language": language | {"layers": {}}}, layers


def _abstract_on_device(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind("device"))


def _is_abstract(state: steps.State) -> bool:
    """Whether programs are to be compiled and not run."""
    return isinstance(state.length, jax.ShapeDtypeStruct)


class LayerPrograms:
    """The device programs, a layer at a time. `graph` is that of the model without its layers."""

    def __init__(self, config: SphinxConfig, vocab_size: int, mesh: Mesh):
        self._dim, self._vocab_size, self._mesh = config.language.dim, vocab_size, mesh
        no_layers = dataclasses.replace(config, language=dataclasses.replace(config.language, num_layers=0))

        def graph_of(make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
            return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]

        self.graph = graph_of(lambda rngs: SphinxMoE(no_layers, unstacked=True, rngs=rngs))
        self._layer = graph_of(lambda rngs: DecoderLayer(config.language, rngs=rngs))
        self._replicated = NamedSharding(mesh, PartitionSpec())

    def hidden_sharding(self, batch: int, length: int) -> NamedSharding:
        """Of the hidden states between layers."""
        return named_sharding(("batch", "residual", None), (batch, length, self._dim), self._mesh)

    def prefill_embed(self, batch: int, length: int) -> Program:
        """params, chunk, image_embeds -> hidden states, positions."""

        def function(params: dict, chunk: steps.Chunk, image_embeds: Any) -> tuple[Hidden, Positions]:
            return steps.prefill_embed(bind(self.graph, params), chunk, image_embeds)

        return Program(function, (), (self.hidden_sharding(batch, length), self._replicated))

    def prefill_layer(
        self, cache: LayerCache, prefixes: LayerCache | None, batch: int, length: int, first_chunk: bool
    ) -> Program:
        """layer, hidden states, positions, the layer's cache, its prefixes, chunk -> hidden states, cache, prefixes."""

        def function(
            layer: dict,
            x: Hidden,
            positions: Positions,
            cache: LayerCache,
            prefixes: LayerCache | None,
            chunk: steps.Chunk,
        ) -> tuple[Hidden, LayerCache, LayerCache | None]:
            visible = length if first_chunk else cache.k.shape[1]
            own = steps.gather_slots(cache, prefixes, chunk, visible, first_chunk)
            mask = steps.chunk_mask(chunk, first_chunk)
            x, own, _ = nnx.merge(self._layer, nnx.State(layer))(x, positions, mask, own)
            stored = prefixes and steps.scatter_slots(prefixes, own, chunk.target)
            return x, steps.scatter_slots(cache, own, chunk.slot), stored

        out = self.hidden_sharding(batch, length), sharding.shardings_of(cache), sharding.shardings_of(prefixes)
        return Program(function, (1, 3, 4), out, slices_in_place=True)

    def prefill_finish(self, rest: steps.State) -> Program:
        """params, state without caches, chunk, hidden states, stops, wants_top -> state, sampled."""

        def function(
            params: dict, rest: steps.State, chunk: steps.Chunk, x: Hidden, stops: Array, wants_top: Array
        ) -> tuple[steps.State, steps.Sampled]:
            model = bind(self.graph, params)
            x = model.language.norm(x)
            return steps.prefill_finish(model, self._vocab_size, rest, chunk, x, stops, wants_top)

        return Program(function, (1,), (sharding.shardings_of(rest), self._replicated))

    def decode_embed(self, num_seqs: int) -> Program:
        """params, state without caches -> hidden states, positions."""

        def function(params: dict, rest: steps.State) -> tuple[Hidden, Positions]:
            return steps.decode_embed(bind(self.graph, params), rest)

        return Program(function, (), (self.hidden_sharding(num_seqs, 1), self._replicated))

    def decode_layer(self, cache: LayerCache, kv_len: int) -> Program:
        """layer, hidden states, positions, the layer's cache -> hidden states, the layer's cache."""

        def function(
            layer: dict, x: Hidden, positions: Positions, cache: LayerCache
        ) -> tuple[Hidden, LayerCache | None]:
            return nnx.merge(self._layer, nnx.State(layer))(x, positions, Causal(positions[:, 0], kv_len), cache)[:2]

        return Program(function, (1, 3), (self.hidden_sharding(len(cache.k), 1), sharding.shardings_of(cache)))

    def decode_finish(self, rest: steps.State) -> Program:
        """params, state without caches, hidden states, stops, wants_top -> state, sampled."""

        def function(
            params: dict, rest: steps.State, x: Hidden, stops: Array, wants_top: Array
        ) -> tuple[steps.State, steps.Sampled]:
            model = bind(self.graph, params)
            x = model.language.norm(x)
            return steps.decode_finish(model, self._vocab_size, rest, x, stops, wants_top)

        return Program(function, (1,), (sharding.shardings_of(rest), self._replicated))

    def forward_embed(self, batch: int, length: int) -> Program:
        """params, tokens, image_embeds or None -> hidden states."""

        def function(params: dict, tokens: Array, image_embeds: Array | None) -> Hidden:
            return bind(self.graph, params).embed(tokens, image_embeds)

        return Program(function, (), self.hidden_sharding(batch, length))

    def forward_layer(self, batch: int, length: int) -> Program:
        """layer, hidden states -> hidden states, without a KV cache."""

        def function(layer: dict, x: Hidden) -> Hidden:
            positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
            return nnx.merge(self._layer, nnx.State(layer))(x, positions, Causal())[0]

        return Program(function, (1,), self.hidden_sharding(batch, length), slices_in_place=True)

    def forward_logits(self, text: int) -> Program:
        """params, hidden states -> logits of the token after each of the `text` last positions."""

        def function(params: dict, x: Hidden) -> Float[Array, "batch text vocab"]:
            language = bind(self.graph, params).language
            return language.logits(language.norm(x)[:, -text:])

        return Program(function, (), self._replicated)


class OffloadEngine(Engine):
    """An engine whose `params` are those outside of the layers; layers are copied in when they run."""

    def __init__(
        self, config: SphinxConfig, params: dict, tokenizer: Tokenizer, mesh: Mesh, max_model_len: int = MAX_MODEL_LEN
    ):
        without_layers, self._layers = split_layers(params)
        self._by_layer = LayerPrograms(config, tokenizer.vocab_size, mesh)
        super().__init__(config, self._by_layer.graph, without_layers, tokenizer, mesh, max_model_len)
        self._next: tuple[int, dict] | None = None

    def _fetch(self, i: int) -> None:
        """Begin to copy layer i to the devices."""
        self._next = (
            i,
            jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("device")), self._layers[i]),
        )

    def _through_layers(self, x: Hidden, run: Callable[[int, dict, Hidden], Hidden]) -> Hidden:
        """x = run(i, layer i, x) for each layer, while the next one is being copied.

        If `x` is abstract, programs are compiled: layers share them.
        """
        if isinstance(x, jax.ShapeDtypeStruct):
            return run(0, jax.tree.map(_abstract_on_device, self._layers[0]), x)
        for i in range(len(self._layers)):
            # The layer before has ended: only now is there room for one more.
            jax.block_until_ready(x)
            if self._next is None or self._next[0] != i:
                self._fetch(i)
            assert self._next is not None
            (_, layer), self._next = self._next, None
            x = run(i, layer, x)
            # After the last comes the first, for the next token.
            self._fetch((i + 1) % len(self._layers))
        return x

    def prefill(
        self, state: steps.State, chunk: steps.Chunk, image_embeds: tuple[Array, ...] | None, wants_top: bool
    ) -> tuple[steps.State, steps.Sampled]:
        """As `Engine.prefill`, layer by layer."""
        programs, first_chunk, rest = self._by_layer, not chunk.start.any(), state.without_cache
        cache, prefixes = list(state.cache), list(state.prefixes)
        if _is_abstract(state):
            chunk = jax.eval_shape(lambda: chunk)
        batch, text = chunk.tokens.shape
        length = text + (self.config.num_image_tokens if image_embeds is not None else 0)
        size = (*state.sizes, batch, length)
        key = ("prefill embed", batch, length, image_embeds is not None)
        x, positions = self._run(key, programs.prefill_embed(batch, length), self.params, chunk, image_embeds)

        def layer(i: int, params: dict, x: Hidden) -> Hidden:
            own_prefixes = prefixes[i] if prefixes else None
            program = programs.prefill_layer(cache[i], own_prefixes, batch, length, first_chunk)
            args = (params, x, positions, cache[i], own_prefixes, chunk)
            x, cache[i], stored = self._run(("prefill layer", *size, first_chunk), program, *args)
            if prefixes:
                prefixes[i] = stored
            return x

        x = self._through_layers(x, layer)
        args = (self.params, rest, chunk, x, self.stops, np.bool_(wants_top))
        program = programs.prefill_finish(rest)
        rest, sampled = self._run(("prefill finish", *size), program, *args)
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
        programs, cache, positions = self._by_layer, list(state.cache), None
        size = state.num_seqs, state.cache_len

        def layer(i: int, params: dict, x: Hidden) -> Hidden:
            args = (params, x, positions, cache[i])
            x, cache[i] = self._run(("decode layer", *size, kv_len), programs.decode_layer(cache[i], kv_len), *args)
            return x

        def step(rest: steps.State) -> tuple[steps.State, steps.Sampled]:
            nonlocal positions
            x, positions = self._run(("decode embed", *size), programs.decode_embed(state.num_seqs), self.params, rest)
            x = self._through_layers(x, layer)
            args = (self.params, rest, x, self.stops, np.bool_(wants_top))
            return self._run(("decode finish", *size), programs.decode_finish(rest), *args)

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

    def expert_load(
        self, texts: Sequence[Sequence[int]], images: Sequence[PreparedImage] | None
    ) -> Int[np.ndarray, "layers kinds experts"]:
        """Raises UserError: the program needs all layers on the devices."""
        raise UserError("the experts' load needs the layers on the devices: start without --offload")

    def prompt_logprobs(self, tokens: list[int]) -> PromptLogprobs:
        """Raises UserError: the program needs all layers on the devices."""
        raise UserError("log-probabilities of a prompt need the layers on the devices: start without --offload")

    def logits(
        self, tokens: Int[np.ndarray, "batch text"], images: Sequence[PreparedImage] | None
    ) -> Float[Array, "batch text vocab"]:
        """As `Engine.logits`."""
        programs, (batch, text) = self._by_layer, tokens.shape
        embeds = jnp.stack(self.encode(images)) if images else None
        shape = (batch, text + (self.config.num_image_tokens if images else 0))
        x = self._run(("forward embed", *shape, text), programs.forward_embed(*shape), self.params, tokens, embeds)

        def layer(i: int, params: dict, x: Hidden) -> Hidden:
            return self._run(("forward layer", *shape), programs.forward_layer(*shape), params, x)

        x = self._through_layers(x, layer)
        return self._run(("forward logits", *shape, text), programs.forward_logits(text), self.params, x)
