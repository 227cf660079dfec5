"""The device programs of inference: what runs, which argument it donates, where its results are placed.

The engine compiles them for arrays, `memory_plan` for abstract inputs, so that what is planned is what runs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import sharding
from sharding import Program
from sphinx_jax.config import SphinxConfig
from sphinx_jax.inference import expert_load, steps
from sphinx_jax.inference.prompt_logprobs import score
from sphinx_jax.model import bind


@dataclasses.dataclass(frozen=True)
class StateShape:
    """Sizes of the engine's state: batch slots and their KV cache, and the pool of prefixes."""

    num_seqs: int
    cache_len: int
    """Positions of the KV cache in each batch slot."""
    num_prefixes: int = 0
    prefix_len: int = 0
    """Positions of the KV cache of each prefix."""


class Programs:
    """The programs of one model on one mesh. `vocab_size` is the tokenizer's, `dtype` the weights', `num_ranks` the
    rank of all adapters in `graph` together.
    """

    def __init__(
        self, config: SphinxConfig, graph: Any, vocab_size: int, mesh: Mesh, dtype: jnp.dtype, num_ranks: int = 0
    ):
        self._config, self.graph, self._vocab_size, self._mesh, self._dtype = config, graph, vocab_size, mesh, dtype
        self._num_ranks = num_ranks
        self.replicated = NamedSharding(mesh, PartitionSpec())

    def abstract_state(self, shape: StateShape) -> steps.State:
        """Shapes and shardings of the state that `new_state` makes."""
        return steps.abstract_state(
            self._config.language,
            **dataclasses.asdict(shape),
            dtype=self._dtype,
            mesh=self._mesh,
            rules=sharding.DEFAULT_RULES,
            num_ranks=self._num_ranks,
        )

    def new_state(self, shape: StateShape) -> Program:
        """() -> state with free batch slots."""

        def make() -> steps.State:
            sizes = dataclasses.asdict(shape) | {"num_ranks": self._num_ranks}
            return steps.make_state(self._config.language, **sizes, dtype=self._dtype)

        return Program(make, (), sharding.shardings_of(self.abstract_state(shape)))

    def prefill(self, state: steps.State, first_chunk: bool) -> Program:
        """params, state, chunk, image_embeds, stops, wants_top -> state, sampled; see `steps.prefill`."""

        def function(*args: Any) -> tuple[steps.State, steps.Sampled]:
            return steps.prefill(self.graph, self._vocab_size, first_chunk, *args)

        return Program(function, (1,), self._placement(state), slices_in_place=True)

    def decode(self, state: steps.State, kv_len: int, quantized: bool = False) -> Program:
        """params, state, cancelled, stops, steps, until, wants_top -> state, sampled; see `steps.decode`."""

        def function(*args: Any) -> tuple[steps.State, steps.Sampled]:
            return steps.decode(self.graph, self._vocab_size, kv_len, *args)

        return Program(function, (1,), self._placement(state), fused_operands=quantized)

    def _placement(self, state: steps.State) -> tuple[Any, NamedSharding]:
        return sharding.shardings_of(state), self.replicated

    def encode(self) -> Program:
        """params, normalised images -> the image embeddings of each."""

        def function(
            params: dict, images: Float[Array, "batch size size 3"]
        ) -> tuple[Float[Array, "crops tokens dim"], ...]:
            return tuple(bind(self.graph, params).encode_images(images))

        return Program(function, (), self.replicated)

    def score(self) -> Program:
        """params, tokens, rank_mask -> log-probabilities of a text; see `prompt_logprobs.score`."""

        def function(params: dict, tokens: jax.Array, rank_mask: jax.Array | None = None) -> Any:
            return score(self.graph, self._vocab_size, params, tokens, rank_mask)

        return Program(function, (), self.replicated, slices_in_place=True)

    def expert_load(self) -> Program:
        """params, tokens, lengths, normalised images or None, rank_mask -> assignments to experts; see
        `expert_load.count`."""

        def function(*args: Any) -> Int[Array, "layers kinds experts"]:
            return expert_load.count(self.graph, *args)

        return Program(function, (), self.replicated, slices_in_place=True)

    def logits(self) -> Program:
        """params, tokens, normalised images or None, rank_mask -> logits of the token after each token."""

        def function(
            params: dict, tokens: jax.Array, images: jax.Array | None, rank_mask: jax.Array | None = None
        ) -> Float[Array, "batch text vocab"]:
            return bind(self.graph, params)(tokens, images, rank_mask=rank_mask)[0]

        return Program(function, (), self.replicated, slices_in_place=True)
