"""What runs on the device: reading prompts into the cache, and choosing tokens until every row is done.

The state has a fixed number of rows, each an answer in the making with its own part of the cache. Rows
start and end at different times and never see each other: what a row says does not depend on the others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from sharding import Rules, constrain, local_index, named_sharding, sharded_map
from sphinx_jax.config import DecoderConfig
from sphinx_jax.inference.sampling import SamplingValues, choose
from sphinx_jax.inference.stop_strings import FIRST, STOPPED
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.language.attention import LayerCache
from sphinx_jax.language.kv_cache import Cache, make_cache
from sphinx_jax.model import SphinxMoE, bind


class State(NamedTuple):
    """All rows, each with `cache_len` positions of the cache."""

    cache: Cache
    length: Int[Array, "num_seqs"]
    """Positions that are filled: the next token goes to slot `length`."""
    token: Int[Array, "num_seqs"]
    """Chosen last, and not in the cache yet."""
    count: Int[Array, "num_seqs"]
    """Tokens chosen so far."""
    limit: Int[Array, "num_seqs"]
    """Tokens to choose at most."""
    done: Bool[Array, "num_seqs"]
    stop: Int[Array, "num_seqs"]
    """State of the stop automaton."""
    seeds: UInt32[Array, "num_seqs 2"]
    seen: Bool[Array, "num_seqs vocab"]
    """Tokens of the prompt and of the answer, for the repetition penalty."""
    output: Int[Array, "num_seqs cache_len"]
    logprob: Float[Array, "num_seqs cache_len"]
    """Log-probability of each chosen token, as the model gave it, before temperature, penalty and cuts."""

    @property
    def num_seqs(self) -> int:
        return self.output.shape[0]

    @property
    def cache_len(self) -> int:
        return self.output.shape[1]


_CACHE = ("batch", None, "kv_heads", None)


class Chunk(NamedTuple):
    """Some tokens of some prompts: one call of `prefill`. Padding has a `row` past the last.

    Groups of devices that share out the rows share out the chunk as well, and each reads into rows of its own: both are
    multiples of their number, and `row_groups.deal` says what stands where.
    """

    row: Int[Array, "batch"]
    tokens: Int[Array, "batch text"]
    length: Int[Array, "batch"]
    """How many of `tokens` are real, 1 or more; the rest is padding on the right."""
    start: Int[Array, "batch"]
    """Positions of the row's cache that are filled already and stay."""
    limit: Int[Array, "batch"]
    seeds: UInt32[Array, "batch 2"]
    seen: Bool[Array, "batch vocab"]


def make_state(config: DecoderConfig, num_seqs: int, cache_len: int, dtype: jnp.dtype) -> State:
    """Rows that wait for a prompt."""
    zeros = lambda *shape, dtype=jnp.int32: jnp.zeros(shape, dtype)
    return State(
        cache=make_cache(config, num_seqs, cache_len, dtype),
        length=zeros(num_seqs),
        token=zeros(num_seqs),
        count=zeros(num_seqs),
        limit=zeros(num_seqs),
        done=jnp.ones(num_seqs, bool),
        stop=zeros(num_seqs),
        seeds=zeros(num_seqs, 2, dtype=jnp.uint32),
        seen=zeros(num_seqs, config.vocab_size, dtype=bool),
        output=zeros(num_seqs, cache_len),
        logprob=zeros(num_seqs, cache_len, dtype=jnp.float32),
    )


def abstract_state(
    config: DecoderConfig, num_seqs: int, cache_len: int, dtype: jnp.dtype, mesh: Mesh, rules: Rules
) -> State:
    """Shapes and shardings: the cache is split by rows and key/value heads, all else is small and everywhere."""
    shapes = jax.eval_shape(lambda: make_state(config, num_seqs, cache_len, dtype))

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = _CACHE if leaf.ndim == 4 else (None,) * leaf.ndim
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(names, leaf.shape, mesh, rules))

    return jax.tree.map(placed, shapes)


def prefill(
    graph: nnx.GraphDef,
    vocab_size: int,
    first_chunk: bool,
    params: dict,
    state: State,
    chunk: Chunk,
    words: tuple[Float[Array, "crops tokens dim"], ...] | None,
    sampling: SamplingValues,
    stops: Int[Array, "states vocab"],
) -> State:
    """Read a chunk of each prompt into its row, and choose the token after it, the first of the answer.

    `first_chunk` says that prompts begin here: there is no earlier part of the cache to look at. `words` are the
    pictures, which stand after the first token: given with the first chunk only. Padding is read too, into
    slots past the end of the prompt: no query looks there before they are overwritten.
    """
    model = bind(graph, params)
    embedded, positions = prefill_embed(model, chunk, words)
    cache_len = visible_len(state, positions, first_chunk)
    cache = [gather_sequences(layer, chunk, cache_len, first_chunk) for layer in state.cache]
    hidden, cache, _ = model.language(embedded, positions, chunk_mask(chunk, first_chunk), cache)
    cache = [scatter_sequences(whole, part, chunk) for whole, part in zip(state.cache, cache, strict=True)]
    rest = prefill_finish(model, vocab_size, state._replace(cache=[]), chunk, hidden, sampling, stops)
    return rest._replace(cache=cache)


def prefill_embed(
    model: SphinxMoE, chunk: Chunk, words: tuple[Float[Array, "crops tokens dim"], ...] | None
) -> tuple[Float[Array, "batch length dim"], Int[Array, "batch length"]]:
    """What the layers read of a chunk, and at which positions."""
    embedded = model.embed(chunk.tokens, None if words is None else jnp.stack(words))
    return embedded, chunk.start[:, None] + jnp.arange(embedded.shape[1])


def visible_len(state: State, positions: Int[Array, "batch length"], first_chunk: bool) -> int:
    """Slots that a chunk looks at: most prompts are far shorter than the cache, which is not read past them."""
    return positions.shape[1] if first_chunk else state.cache_len


def chunk_mask(chunk: Chunk, first_chunk: bool) -> Causal:
    """What a chunk's tokens may look at of those slots."""
    return Causal(None if first_chunk else chunk.start)


def gather_sequences(layer: LayerCache, chunk: Chunk, cache_len: int, first_chunk: bool) -> LayerCache:
    """The part of a layer's cache that a chunk reads and writes: one row for each of its prompts."""

    def own(
        whole: Float[Array, "num_seqs cache_len kv_heads head_dim"],
    ) -> Float[Array, "batch seen kv_heads head_dim"]:
        if first_chunk:
            part = jnp.zeros((chunk.tokens.shape[0], cache_len, *whole.shape[2:]), whole.dtype)
            return constrain(part, *_CACHE)
        take = lambda own, row: _take(own, local_index(row, "batch", whole.shape[0]))
        return sharded_map(take, (_CACHE, ("batch",)), _CACHE, sum_over=())(whole, chunk.row)

    return jax.tree.map(own, layer)


def scatter_sequences(layer: LayerCache, part: LayerCache, chunk: Chunk) -> LayerCache:
    """The layer's cache with that part put back."""

    def put(whole: Array, part: Array) -> Array:
        num_seqs = whole.shape[0]
        own = lambda whole, part, row: whole.at[local_index(row, "batch", num_seqs), : part.shape[1]].set(
            part, mode="drop"
        )
        return sharded_map(own, (_CACHE, _CACHE, ("batch",)), _CACHE, sum_over=())(whole, part, chunk.row)

    return jax.tree.map(put, layer, part)


def prefill_finish(
    model: SphinxMoE,
    vocab_size: int,
    rest: State,
    chunk: Chunk,
    hidden: Float[Array, "batch length dim"],
    sampling: SamplingValues,
    stops: Int[Array, "states vocab"],
) -> State:
    """The rows that a chunk was read into, each with the token after it; `rest` is the state without its cache."""
    picture = hidden.shape[1] - chunk.tokens.shape[1]
    end = picture + chunk.length - 1
    logits = model.language.logits(jnp.take_along_axis(hidden, end[:, None, None], axis=1))[:, 0]
    num_seqs = jax.tree.map(lambda x: _take(x, chunk.row), rest)
    num_seqs = num_seqs._replace(
        length=chunk.start + picture + chunk.length,
        count=jnp.zeros_like(num_seqs.count),
        limit=chunk.limit,
        done=jnp.zeros_like(num_seqs.done),
        stop=jnp.full_like(num_seqs.stop, FIRST),
        seeds=chunk.seeds,
        seen=chunk.seen,
    )
    # In vain where the prompt goes on: the next chunk begins the answer anew.
    num_seqs = _choose_next(num_seqs, logits, vocab_size, sampling, stops)
    return jax.tree.map(lambda whole, new: whole.at[chunk.row].set(new, mode="drop"), rest, num_seqs)


def _take(whole: Array, row: Int[Array, "batch"]) -> Array:
    """The named rows; padding takes any."""
    return jnp.take(whole, row, axis=0, mode="clip")


def decode(
    graph: nnx.GraphDef,
    vocab_size: int,
    params: dict,
    state: State,
    sampling: SamplingValues,
    stops: Int[Array, "states vocab"],
    steps: Int[Array, ""],
    until: Int[Array, ""],
) -> State:
    """Choose up to `steps` tokens for each row that is not done, or until no more than `until` rows go on."""
    model = bind(graph, params)

    def going(carry: tuple[Int[Array, ""], State]) -> Bool[Array, ""]:
        step, state = carry
        return (step < steps) & (jnp.sum(~state.done) > until)

    def body(carry: tuple[Int[Array, ""], State]) -> tuple[Int[Array, ""], State]:
        step, state = carry
        embedded, positions = decode_embed(model, state)
        hidden, cache, _ = model.language(embedded, positions, Causal(state.length), state.cache)
        rest = decode_finish(model, vocab_size, state._replace(cache=[]), hidden, sampling, stops)
        return step + 1, rest._replace(cache=cache)

    return jax.lax.while_loop(going, body, (jnp.int32(0), state))[1]


def decode_embed(model: SphinxMoE, state: State) -> tuple[Float[Array, "num_seqs 1 dim"], Int[Array, "num_seqs 1"]]:
    """Each row's last token, and its position. A row that is done computes too, and writes past its end."""
    return model.embed(state.token[:, None]), state.length[:, None]


def decode_finish(
    model: SphinxMoE,
    vocab_size: int,
    rest: State,
    hidden: Float[Array, "num_seqs 1 dim"],
    sampling: SamplingValues,
    stops: Int[Array, "states vocab"],
) -> State:
    """Each row with its next token; `rest` is the state without its cache."""
    logits = model.language.logits(hidden)[:, 0]
    rest = rest._replace(length=jnp.where(rest.done, rest.length, rest.length + 1))
    return _choose_next(rest, logits, vocab_size, sampling, stops)


def _choose_next(
    state: State, logits: Float[Array, "num_seqs vocab"], vocab_size: int, sampling: SamplingValues, stops: Array
) -> State:
    """The next token of each row that is not done, recorded; and whether it ends the answer.

    `vocab_size` is the tokenizer's: a model's table may be larger, and what lies beyond is no token.
    """
    logits = constrain(logits, "batch", None)
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    token = choose(logits, state.seen, state.seeds, state.count, sampling)
    row = jnp.arange(token.shape[0])
    logprob = jax.nn.log_softmax(logits, axis=-1)[row, token]
    # All that devices with different rows tell each other of them: each then knows all that was said, and who is done.
    token, logprob = constrain(token, None), constrain(logprob, None)
    count = jnp.where(state.done, state.count, state.count + 1)
    stop = jnp.where(state.done, state.stop, stops[state.stop, token].astype(jnp.int32))
    return state._replace(
        token=jnp.where(state.done, state.token, token),
        count=count,
        stop=stop,
        done=state.done | (stop == STOPPED) | (count >= state.limit),
        seen=_put(state.seen, token, jnp.ones_like(state.done)),
        # A row that is done writes past its end, where nobody looks.
        output=_put(state.output, state.count, token),
        logprob=_put(state.logprob, state.count, logprob),
    )


def _put(whole: Shaped[Array, "num_seqs n"], place: Int[Array, "num_seqs"], value: Shaped[Array, "num_seqs"]) -> Array:
    """`whole` with one value in each row replaced, by every device for itself."""
    put = lambda whole, place, value: whole.at[jnp.arange(len(place)), place].set(value, mode="drop")
    return sharded_map(put, ((None, None), (None,), (None,)), (None, None), sum_over=())(whole, place, value)
