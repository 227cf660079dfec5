"""The device programs of an offloaded model: a layer up to its router, then one program for each expert.

Which experts a layer needs, the host has to know before it copies them. So a layer ends with its router's choice, and
its experts are added when the next layer begins: between them hidden states are a `Carry`. All layers and experts share
their programs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

import sharding
from sharding import Program, constrain, named_sharding
from sphinx_jax.config import SphinxConfig
from sphinx_jax.inference import steps
from sphinx_jax.inference.offload_params import layer_without_experts
from sphinx_jax.kernels.attention_mask import Causal, Mask
from sphinx_jax.language.attention import LayerCache
from sphinx_jax.language.moe import expert_output
from sphinx_jax.model import SphinxMoE, bind

Positions = Int[Array, "batch length"]


class Carry(NamedTuple):
    """Hidden states between two layers: h + sum over j of weights[..., j] x outputs[..., j, :].

    The output of each expert has a place of its own, so that the sum does not depend on the order in which experts
    compute: it is the same as in `kernels.moe`.
    """

    h: Float[Array, "batch length dim"]
    outputs: Float[Array, "batch length k dim"]
    weights: Float[Array, "batch length k"]

    @classmethod
    def of(cls, h: Float[Array, "batch length dim"], weights: Float[Array, "batch length k"]) -> "Carry":
        """No expert has computed yet."""
        return cls(h, jnp.zeros((*weights.shape, h.shape[-1]), h.dtype), weights.astype(h.dtype))

    def sum(self) -> Float[Array, "batch length dim"]:
        ffn_out = jnp.sum(self.outputs * self.weights[..., None], axis=-2)
        return constrain(self.h + ffn_out, "batch", "residual", None)


class Selection(NamedTuple):
    """What the experts of a layer compute on."""

    normed: Float[Array, "batch length dim"]
    experts: Int[Array, "batch length k"]
    load: Int[Array, "experts"]
    """How many tokens selected each expert; padding and ended sequences do not count."""


class OffloadPrograms:
    """The programs of one model on one mesh. `graph` is that of the model without its layers; `quantized` is whether
    decode steps read quantized weights.
    """

    def __init__(self, config: SphinxConfig, vocab_size: int, mesh: Mesh, quantized: bool):
        self._quantized = quantized
        self._dim, self._vocab_size, self._mesh = config.language.dim, vocab_size, mesh
        self._num_experts, self._k = config.language.num_experts, config.language.experts_per_token
        no_layers = dataclasses.replace(config, language=dataclasses.replace(config.language, num_layers=0))

        def graph_of(make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
            return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]

        self.graph = graph_of(lambda rngs: SphinxMoE(no_layers, unstacked=True, rngs=rngs))
        self._layer = graph_of(lambda rngs: layer_without_experts(config.language, rngs))
        self.replicated = NamedSharding(mesh, PartitionSpec())

    def abstract_carry(self, batch: int, length: int, dtype: Any) -> Carry:
        """Shapes and shardings of hidden states between layers."""

        def abstract(*shape: int) -> Any:
            names = ("batch", "residual", None, None)[: len(shape)]
            return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(names, shape, self._mesh))

        sizes = batch, length
        return Carry(abstract(*sizes, self._dim), abstract(*sizes, self._k, self._dim), abstract(*sizes, self._k))

    def abstract_selection(self, batch: int, length: int, dtype: Any) -> Selection:
        """Shapes and shardings of what the experts compute on."""
        normed, _, weights = self.abstract_carry(batch, length, dtype)

        def integers(shape: tuple[int, ...], placement: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement)

        experts = integers(weights.shape, weights.sharding)
        return Selection(normed, experts, integers((self._num_experts,), self.replicated))

    def _carry_shardings(self, batch: int, length: int) -> Carry:
        return sharding.shardings_of(self.abstract_carry(batch, length, jnp.float32))

    def _selection_shardings(self, batch: int, length: int) -> Selection:
        return sharding.shardings_of(self.abstract_selection(batch, length, jnp.float32))

    def _begin(self, h: Float[Array, "batch length dim"]) -> Carry:
        return Carry.of(h, jnp.zeros((*h.shape[:2], self._k), h.dtype))

    def _attend(
        self,
        layer_params: dict,
        carry: Carry,
        positions: Positions,
        mask: Mask,
        cache: LayerCache | None,
        counts: Bool[Array, "batch length"] | None,
    ) -> tuple[Carry, Selection, LayerCache | None]:
        """A layer up to its router's choice. `counts`: whether a token's choice is needed; None: all are."""
        layer = nnx.merge(self._layer, nnx.State(layer_params))
        with jax.named_scope("decoder_layer"):
            h, normed, _, cache = layer.attend(carry.sum(), positions, mask, cache)
            routing = layer.ffn.route(normed)
        selects = routing.experts[..., None] == jnp.arange(self._num_experts)
        if counts is not None:
            selects &= counts[..., None, None]
        load = constrain(jnp.sum(selects, axis=(0, 1, 2), dtype=jnp.int32), None)
        return Carry.of(h, routing.weights), Selection(normed, routing.experts, load), cache

    def expert(self, batch: int, length: int, is_prefill: bool) -> Program:
        """expert, outputs, selection, number of the expert -> outputs with its own."""

        def function(
            expert: dict, outputs: Float[Array, "batch length k dim"], selection: Selection, number: Int[Array, ""]
        ) -> Float[Array, "batch length k dim"]:
            selected = selection.experts == number
            out = expert_output(selection.normed, jnp.any(selected, axis=-1), expert["w_in"], expert["w_out"])
            return jnp.where(selected[..., None], out[..., None, :], outputs)

        fused = self._quantized and not is_prefill
        out = self._carry_shardings(batch, length).outputs
        return Program(function, (1,), out, slices_in_place=is_prefill, fused_operands=fused)

    def prefill_embed(self, batch: int, length: int) -> Program:
        """params, chunk, image_embeds -> carry, positions."""

        def function(params: dict, chunk: steps.Chunk, image_embeds: Any) -> tuple[Carry, Positions]:
            x, positions = steps.prefill_embed(bind(self.graph, params), chunk, image_embeds)
            return self._begin(x), positions

        return Program(function, (), (self._carry_shardings(batch, length), self.replicated))

    def prefill_attend(
        self,
        cache: LayerCache,
        prefixes: LayerCache | None,
        batch: int,
        length: int,
        num_image_tokens: int,
        first_chunk: bool,
    ) -> Program:
        """layer, carry, positions, the layer's cache, its prefixes, chunk -> carry, selection, cache, prefixes."""

        def function(
            layer: dict,
            carry: Carry,
            positions: Positions,
            cache: LayerCache,
            prefixes: LayerCache | None,
            chunk: steps.Chunk,
        ) -> tuple[Carry, Selection, LayerCache, LayerCache | None]:
            visible = length if first_chunk else cache.k.shape[1]
            own = steps.gather_slots(cache, prefixes, chunk, visible, first_chunk)
            mask = steps.chunk_mask(chunk, first_chunk)
            is_real = (jnp.arange(length) < num_image_tokens + chunk.length[:, None]) & (chunk.slot < cache.k.shape[0])[
                :, None
            ]
            carry, selection, own = self._attend(layer, carry, positions, mask, own, is_real)
            assert own is not None
            stored = prefixes and steps.scatter_slots(prefixes, own, chunk.target)
            return carry, selection, steps.scatter_slots(cache, own, chunk.slot), stored

        out = (
            self._carry_shardings(batch, length),
            self._selection_shardings(batch, length),
            sharding.shardings_of(cache),
            sharding.shardings_of(prefixes),
        )
        return Program(function, (1, 3, 4), out, slices_in_place=True)

    def prefill_finish(self, rest: steps.State) -> Program:
        """params, state without caches, chunk, carry, stops, wants_top -> state, sampled."""

        def function(
            params: dict, rest: steps.State, chunk: steps.Chunk, carry: Carry, stops: Array, wants_top: Array
        ) -> tuple[steps.State, steps.Sampled]:
            model = bind(self.graph, params)
            hidden = model.language.norm(carry.sum())
            return steps.prefill_finish(model, self._vocab_size, rest, chunk, hidden, stops, wants_top)

        return Program(function, (1,), (sharding.shardings_of(rest), self.replicated))

    def decode_embed(self, num_seqs: int) -> Program:
        """params, state without caches -> carry, positions."""

        def function(params: dict, rest: steps.State) -> tuple[Carry, Positions]:
            x, positions = steps.decode_embed(bind(self.graph, params), rest)
            return self._begin(x), positions

        return Program(function, (), (self._carry_shardings(num_seqs, 1), self.replicated))

    def decode_attend(self, cache: LayerCache, kv_len: int) -> Program:
        """layer, carry, positions, the layer's cache, done -> carry, selection, the layer's cache."""

        def function(
            layer: dict, carry: Carry, positions: Positions, cache: LayerCache, done: Bool[Array, "num_seqs"]
        ) -> tuple[Carry, Selection, LayerCache | None]:
            mask = Causal(jnp.where(done, 0, positions[:, 0]), kv_len)
            return self._attend(layer, carry, positions, mask, cache, ~done[:, None])

        sizes = len(cache.k), 1
        out = self._carry_shardings(*sizes), self._selection_shardings(*sizes), sharding.shardings_of(cache)
        return Program(function, (1, 3), out, fused_operands=self._quantized)

    def decode_finish(self, rest: steps.State) -> Program:
        """params, state without caches, carry, stops, wants_top -> state, sampled."""

        def function(
            params: dict, rest: steps.State, carry: Carry, stops: Array, wants_top: Array
        ) -> tuple[steps.State, steps.Sampled]:
            model = bind(self.graph, params)
            hidden = model.language.norm(carry.sum())
            return steps.decode_finish(model, self._vocab_size, rest, hidden, stops, wants_top)

        return Program(function, (1,), (sharding.shardings_of(rest), self.replicated))

    def forward_embed(self, batch: int, length: int) -> Program:
        """params, tokens, image_embeds or None -> carry."""

        def function(params: dict, tokens: Array, image_embeds: Array | None) -> Carry:
            return self._begin(bind(self.graph, params).embed(tokens, image_embeds))

        return Program(function, (), self._carry_shardings(batch, length))

    def forward_attend(self, batch: int, length: int) -> Program:
        """layer, carry -> carry, selection; without a KV cache."""

        def function(layer: dict, carry: Carry) -> tuple[Carry, Selection]:
            positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
            return self._attend(layer, carry, positions, Causal(), None, None)[:2]

        out = self._carry_shardings(batch, length), self._selection_shardings(batch, length)
        return Program(function, (1,), out, slices_in_place=True)

    def forward_logits(self, text: int) -> Program:
        """params, carry -> logits of the token after each of the `text` last positions."""

        def function(params: dict, carry: Carry) -> Float[Array, "batch text vocab"]:
            language = bind(self.graph, params).language
            return language.logits(language.norm(carry.sum())[:, -text:])

        return Program(function, (), self.replicated)
