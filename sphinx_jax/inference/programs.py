"""The device programs of inference: what runs, which argument it takes over, where its results lie.

The engine compiles them for arrays, `planning` for shapes alone, so that what is planned is what runs.
"""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

import sharding
from sharding import Program
from sphinx_jax.config import SphinxConfig
from sphinx_jax.inference import steps
from sphinx_jax.model import bind


class Programs:
    """The programs of one model on one mesh. `vocab_size` is the tokenizer's, `dtype` the weights'."""

    def __init__(self, config: SphinxConfig, graph: nnx.GraphDef, vocab_size: int, mesh: Mesh, dtype: jnp.dtype):
        self._config, self.graph, self._vocab_size, self._mesh, self._dtype = config, graph, vocab_size, mesh, dtype
        self.everywhere = NamedSharding(mesh, PartitionSpec())

    def abstract_state(self, num_seqs: int, cache_len: int) -> steps.State:
        """Shapes and shardings of the state that `new_state` makes."""
        return steps.abstract_state(
            self._config.language, num_seqs, cache_len, self._dtype, self._mesh, sharding.DEFAULT_RULES
        )

    def new_state(self, num_seqs: int, cache_len: int) -> Program:
        """() -> empty rows."""
        make = lambda: steps.make_state(self._config.language, num_seqs, cache_len, self._dtype)
        return Program(make, (), sharding.shardings_of(self.abstract_state(num_seqs, cache_len)))

    def prefill(self, state: steps.State, first_chunk: bool) -> Program:
        """params, state, chunk, words, sampling, stops -> state; see `steps.prefill`."""
        function = lambda *args: steps.prefill(self.graph, self._vocab_size, first_chunk, *args)
        return Program(function, (1,), sharding.shardings_of(state), slices_in_place=True)

    def decode(self, state: steps.State) -> Program:
        """params, state, sampling, stops, steps, until -> state; see `steps.decode`."""
        function = lambda *args: steps.decode(self.graph, self._vocab_size, *args)
        return Program(function, (1,), sharding.shardings_of(state))

    def encode(self) -> Program:
        """params, normalised pictures -> the words of each."""

        def function(
            params: dict, images: Float[Array, "batch size size 3"]
        ) -> tuple[Float[Array, "crops tokens dim"], ...]:
            return tuple(bind(self.graph, params).encode_images(images))

        return Program(function, (), self.everywhere)

    def logits(self) -> Program:
        """params, tokens, normalised pictures or None -> scores of the word after each token."""
        function = lambda params, tokens, images: bind(self.graph, params)(tokens, images)[0]
        return Program(function, (), self.everywhere, slices_in_place=True)
