"""Decoding a model that is larger than the devices: its layers stay in host memory and pass through, one by one.

While a layer computes, the one after it is copied to the devices. They never hold more than two layers, and the
numbers are those of the model that lies there whole: the same functions run, one program a layer instead of one
for all. A token takes as long as it takes to copy every layer, so this is for a card on which nothing else fits.
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
from sphinx_jax.inference import steps
from sphinx_jax.inference.engine import MAX_MODEL_LEN, Engine
from sphinx_jax.inference.requests import PreparedImage
from sphinx_jax.inference.sampling import SamplingParams
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

    def moved(leaf: Any) -> Any:
        host = leaf.sharding.with_memory_kind("pinned_host")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)
        return jax.device_put(leaf, host)

    return jax.tree.map(moved, param)


def split_layers(params: dict) -> tuple[dict, list[dict]]:
    """The parameters around the layers, and those of each layer."""
    language = params["language"]
    layers = [language["layers"][i] for i in range(len(language["layers"]))]
    return params | {"language": language | {"layers": {}}}, layers


class LayerPrograms:
    """The device programs, a layer at a time. `around` is the graph of the model without its layers."""

    def __init__(self, config: SphinxConfig, vocab_size: int, mesh: Mesh):
        self._dim, self._vocab_size, self._mesh = config.language.dim, vocab_size, mesh
        no_layers = dataclasses.replace(config, language=dataclasses.replace(config.language, num_layers=0))
        graph = lambda make: nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
        self.around = graph(lambda rngs: SphinxMoE(no_layers, unstacked=True, rngs=rngs))
        self._layer = graph(lambda rngs: DecoderLayer(config.language, rngs=rngs))

    def hidden_sharding(self, batch: int, length: int) -> NamedSharding:
        """Where what a layer reads and writes lies."""
        return named_sharding(("batch", "residual", None), (batch, length, self._dim), self._mesh)

    def prefill_embed(self, batch: int, length: int) -> Program:
        """params, chunk, words -> what the layers read, and positions."""
        function = lambda params, chunk, words: steps.prefill_embed(bind(self.around, params), chunk, words)
        return Program(function, (), (self.hidden_sharding(batch, length), self._everywhere))

    def prefill_layer(self, cache: LayerCache, batch: int, length: int, first_chunk: bool) -> Program:
        """layer, x, positions, the layer's cache, chunk -> x, the layer's cache."""

        def function(layer: dict, x: Hidden, positions: Positions, cache: LayerCache, chunk: steps.Chunk):
            cache_len = length if first_chunk else cache.k.shape[1]
            own, mask = (
                steps.gather_sequences(cache, chunk, cache_len, first_chunk),
                steps.chunk_mask(chunk, first_chunk),
            )
            x, own, _ = nnx.merge(self._layer, nnx.State(layer))(x, positions, mask, own)
            return x, steps.scatter_sequences(cache, own, chunk)

        placed = self.hidden_sharding(batch, length), sharding.shardings_of(cache)
        return Program(function, (1, 3), placed, slices_in_place=True)

    def prefill_finish(self, rest: steps.State) -> Program:
        """params, state without its cache, chunk, x, sampling, stops -> state."""

        def function(params: dict, rest: steps.State, chunk: steps.Chunk, x: Hidden, *choice: Any) -> steps.State:
            model = bind(self.around, params)
            return steps.prefill_finish(model, self._vocab_size, rest, chunk, model.language.norm(x), *choice)

        return Program(function, (1,), sharding.shardings_of(rest))

    def decode_embed(self, num_seqs: int) -> Program:
        """params, state without its cache -> what the layers read, and positions."""
        function = lambda params, rest: steps.decode_embed(bind(self.around, params), rest)
        return Program(function, (), (self.hidden_sharding(num_seqs, 1), self._everywhere))

    def decode_layer(self, cache: LayerCache) -> Program:
        """layer, x, positions, the layer's cache -> x, the layer's cache."""

        def function(layer: dict, x: Hidden, positions: Positions, cache: LayerCache):
            return nnx.merge(self._layer, nnx.State(layer))(x, positions, Causal(positions[:, 0]), cache)[:2]

        return Program(function, (1, 3), (self.hidden_sharding(len(cache.k), 1), sharding.shardings_of(cache)))

    def decode_finish(self, rest: steps.State) -> Program:
        """params, state without its cache, x, sampling, stops -> state."""

        def function(params: dict, rest: steps.State, x: Hidden, *choice: Any) -> steps.State:
            model = bind(self.around, params)
            return steps.decode_finish(model, self._vocab_size, rest, model.language.norm(x), *choice)

        return Program(function, (1,), sharding.shardings_of(rest))

    def forward_embed(self, batch: int, length: int) -> Program:
        """params, tokens, words or None -> what the layers read."""
        function = lambda params, tokens, words: bind(self.around, params).embed(tokens, words)
        return Program(function, (), self.hidden_sharding(batch, length))

    def forward_layer(self, batch: int, length: int) -> Program:
        """layer, x -> x, without a cache."""

        def function(layer: dict, x: Hidden) -> Hidden:
            positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
            return nnx.merge(self._layer, nnx.State(layer))(x, positions, Causal())[0]

        return Program(function, (1,), self.hidden_sharding(batch, length), slices_in_place=True)

    def forward_logits(self, text: int) -> Program:
        """params, x -> scores of the word after each of the `text` last positions."""

        def function(params: dict, x: Hidden) -> Float[Array, "batch text vocab"]:
            language = bind(self.around, params).language
            return language.logits(language.norm(x)[:, -text:])

        return Program(function, (), self._everywhere)

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec())


class OffloadEngine(Engine):
    """An engine whose `params` are those around the layers; the layers come from host memory as they are needed."""

    def __init__(
        self, config: SphinxConfig, params: dict, tokenizer: Tokenizer, mesh: Mesh, max_model_len: int = MAX_MODEL_LEN
    ):
        around, self._layers = split_layers(params)
        self._by_layer = LayerPrograms(config, tokenizer.vocab_size, mesh)
        super().__init__(config, self._by_layer.around, around, tokenizer, mesh, max_model_len)
        self._coming: tuple[int, dict] | None = None

    def _fetch(self, i: int) -> None:
        """Begin to copy layer i to the devices."""
        on_device = lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))
        self._coming = i, jax.tree.map(on_device, self._layers[i])

    def _through_layers(self, x: Hidden, run: Callable[[int, dict, Hidden], Hidden]) -> Hidden:
        """x = run(i, layer i, x) for each layer, the next one on its way meanwhile."""
        for i in range(len(self._layers)):
            # The layer before is done with: only now is there room for one more.
            jax.block_until_ready(x)
            if self._coming is None or self._coming[0] != i:
                self._fetch(i)
            layer, self._coming = self._coming[1], None
            x = run(i, layer, x)
            # After the last comes the first, for the next token.
            self._fetch((i + 1) % len(self._layers))
        return x

    def _prefill(
        self,
        state: steps.State,
        chunk: steps.Chunk,
        words: tuple[Array, ...] | None,
        sampling: SamplingParams,
        stops: Array,
    ) -> steps.State:
        programs, first_chunk, cache, rest = (
            self._by_layer,
            not chunk.start.any(),
            list(state.cache),
            _without_cache(state),
        )
        (batch, text), picture = chunk.tokens.shape, self.config.num_image_tokens if words else 0
        shape, size = (batch, text + picture), (state.num_seqs, state.cache_len)
        x, positions = self._run(
            ("begin chunk", *shape, picture), programs.prefill_embed(*shape), self.params, chunk, words
        )

        def layer(i: int, params: dict, x: Hidden) -> Hidden:
            program = programs.prefill_layer(cache[i], *shape, first_chunk)
            x, cache[i] = self._run(
                ("chunk layer", *size, *shape, first_chunk), program, params, x, positions, cache[i], chunk
            )
            return x

        x = self._through_layers(x, layer)
        ending = (self.params, rest, chunk, x, sampling.values(), stops)
        rest = self._run(("end chunk", *size, *shape, stops.shape), programs.prefill_finish(rest), *ending)
        return rest._replace(cache=cache)

    def decode(
        self, state: steps.State, sampling: SamplingParams, stops: Array, number: int, until: int
    ) -> steps.State:
        """As `Engine.decode`, token by token."""
        programs, cache, rest = self._by_layer, list(state.cache), _without_cache(state)
        size = state.num_seqs, state.cache_len

        def layer(i: int, params: dict, x: Hidden) -> Hidden:
            args = (params, x, positions, cache[i])
            x, cache[i] = self._run(("token layer", *size), programs.decode_layer(cache[i]), *args)
            return x

        for _ in range(number):
            if np.sum(~np.array(rest.done)) <= until:
                break
            x, positions = self._run(("begin token", *size), programs.decode_embed(state.num_seqs), self.params, rest)
            x = self._through_layers(x, layer)
            ending = (self.params, rest, x, sampling.values(), stops)
            rest = self._run(("end token", *size, stops.shape), programs.decode_finish(rest), *ending)
        return rest._replace(cache=cache)

    def logits(
        self, tokens: Int[np.ndarray, "batch text"], pictures: Sequence[PreparedImage] | None
    ) -> Float[Array, "batch text vocab"]:
        """As `Engine.logits`."""
        programs, (batch, text) = self._by_layer, tokens.shape
        words = jnp.stack(self.encode(pictures)) if pictures else None
        shape = (batch, text + (self.config.num_image_tokens if pictures else 0))
        x = self._run(("begin text", *shape, text), programs.forward_embed(*shape), self.params, tokens, words)
        layer = lambda i, params, x: self._run(("text layer", *shape), programs.forward_layer(*shape), params, x)
        x = self._through_layers(x, layer)
        return self._run(("end text", *shape, text), programs.forward_logits(text), self.params, x)


def _without_cache(state: steps.State) -> steps.State:
    return state._replace(cache=[])
