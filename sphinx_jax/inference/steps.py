"""The device programs of inference: chunked prefill into the KV cache, and the decode loop.

The state has a fixed number of batch slots, each a sequence with its own part of the KV cache, and a pool of
prefixes: the KV cache of the first positions of prompts that may come again. Sequences start and end at different
times and never see each other: a sequence's tokens do not depend on the rest of the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from sharding import Rules, constrain, local_index, named_sharding, sharded_map
from sphinx_jax.config import DecoderConfig
from sphinx_jax.inference.sampling import MAX_TOP_LOGPROBS, SamplingArrays, sample
from sphinx_jax.inference.stop_strings import STOPPED
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.language.attention import LayerCache
from sphinx_jax.language.kv_cache import Cache, make_cache
from sphinx_jax.model import SphinxMoE, bind

MAX_STEPS = 64
"""Decode steps in one call at most: the width of the arrays that it returns."""

_CACHE = ("batch", None, "kv_heads", None)


class State(NamedTuple):
    """All batch slots, each with `cache_len` positions of the KV cache, and the pool of prefixes."""

    cache: Cache
    prefixes: Cache
    """[num_prefixes, prefix_len, kv_heads, head_dim] a layer; an empty list where there is no pool."""
    length: Int[Array, "num_seqs"]
    """Positions that are filled: the next token's keys and values go to position `length`."""
    token: Int[Array, "num_seqs"]
    """Sampled last, and not in the KV cache yet."""
    count: Int[Array, "num_seqs"]
    """Tokens sampled so far."""
    limit: Int[Array, "num_seqs"]
    """Tokens to sample at most."""
    done: Bool[Array, "num_seqs"]
    """The slot is free, its prompt is not prefilled to its end, or its sequence has ended."""
    stop: Int[Array, "num_seqs"]
    """State of the stop automaton."""
    seeds: UInt32[Array, "num_seqs 2"]
    seen: Bool[Array, "num_seqs vocab"]
    """Tokens of the prompt and of the answer, for the repetition penalty."""
    sampling: SamplingArrays
    rank_mask: Bool[Array, "num_seqs rank"] | None = None
    """The ranks of each sequence's adapter (`inference.adapters`); None where no adapter is loaded."""

    @property
    def num_seqs(self) -> int:
        return self.length.shape[0]

    @property
    def cache_len(self) -> int:
        return self.cache[0].k.shape[1]

    @property
    def num_prefixes(self) -> int:
        return self.prefixes[0].k.shape[0] if self.prefixes else 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """What programs for this state are named by."""
        prefix_len = self.prefixes[0].k.shape[1] if self.prefixes else 0
        return self.num_seqs, self.cache_len, self.num_prefixes, prefix_len

    @property
    def without_cache(self) -> "State":
        return self._replace(cache=[], prefixes=[])


class Chunk(NamedTuple):
    """Some tokens of some prompts: one call of `prefill`. Padding has a `slot` past the last.

    Data-parallel groups of devices split the chunk as they split the slots, and each prefills slots of its own: both
    are multiples of their number, and `data_parallel.assign` says which request goes where.
    """

    slot: Int[Array, "batch"]
    tokens: Int[Array, "batch text"]
    length: Int[Array, "batch"]
    """How many of `tokens` are real, 1 or more; the rest is padding on the right."""
    start: Int[Array, "batch"]
    """Positions of the KV cache that are filled before this chunk."""
    source: Int[Array, "batch"]
    """Prefix of the pool that these positions are copied from; past the last: they are in the slot already."""
    target: Int[Array, "batch"]
    """Prefix of the pool that the first positions are stored in; past the last: none."""
    last: Bool[Array, "batch"]
    """The prompt ends in this chunk, so that its first token is sampled."""
    limit: Int[Array, "batch"]
    stop: Int[Array, "batch"]
    """First state of the stop automaton."""
    seeds: UInt32[Array, "batch 2"]
    seen: Bool[Array, "batch vocab"]
    sampling: SamplingArrays
    rank_mask: Bool[Array, "batch rank"] | None = None


class Sampled(NamedTuple):
    """What the host gets of a call: small arrays on every device, not donated to the next call.

    Of sequence i the first `count[i] - (count before the call)` columns are new tokens.
    """

    tokens: Int[Array, "batch steps"]
    logprobs: Float[Array, "batch steps"]
    """Log-probability of each token as the model gave it: before temperature, penalty, top-p and top-k."""
    count: Int[Array, "batch"]
    done: Bool[Array, "batch"]
    stopped: Bool[Array, "batch"]
    """The sequence ended by EOS or the template's end signal, not by its limit."""
    top_tokens: Int[Array, "batch steps top"]
    """The most probable tokens; zeros where nobody asked."""
    top_logprobs: Float[Array, "batch steps top"]


def make_state(
    config: DecoderConfig,
    num_seqs: int,
    cache_len: int,
    num_prefixes: int,
    prefix_len: int,
    dtype: jnp.dtype,
    num_ranks: int = 0,
) -> State:
    """Free batch slots and an empty pool of prefixes. `num_ranks`: of all adapters that are loaded."""
    ints, floats = jnp.zeros(num_seqs, jnp.int32), jnp.zeros(num_seqs, jnp.float32)
    return State(
        cache=make_cache(config, num_seqs, cache_len, dtype),
        prefixes=make_cache(config, num_prefixes, prefix_len, dtype) if num_prefixes else [],
        length=ints,
        token=ints,
        count=ints,
        limit=ints,
        done=jnp.ones(num_seqs, bool),
        stop=ints,
        seeds=jnp.zeros((num_seqs, 2), jnp.uint32),
        seen=jnp.zeros((num_seqs, config.padded_vocab_size), bool),
        sampling=SamplingArrays(floats, floats, ints, floats),
        rank_mask=jnp.zeros((num_seqs, num_ranks), bool) if num_ranks else None,
    )


def abstract_state(
    config: DecoderConfig,
    num_seqs: int,
    cache_len: int,
    num_prefixes: int,
    prefix_len: int,
    dtype: jnp.dtype,
    mesh: Mesh,
    rules: Rules,
    num_ranks: int = 0,
) -> State:
    """Shapes and shardings: KV caches are sharded by batch slot and key/value head, all else is replicated."""
    shapes = jax.eval_shape(lambda: make_state(config, num_seqs, cache_len, num_prefixes, prefix_len, dtype, num_ranks))

    def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = _CACHE if leaf.ndim == 4 else (None,) * leaf.ndim
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(names, leaf.shape, mesh, rules))

    return jax.tree.map(with_sharding, shapes)


def prefill(
    graph: nnx.GraphDef,
    vocab_size: int,
    first_chunk: bool,
    params: dict,
    state: State,
    chunk: Chunk,
    image_embeds: tuple[Float[Array, "crops tokens dim"], ...] | None,
    stops: Int[Array, "states vocab"],
    wants_top: Bool[Array, ""],
) -> tuple[State, Sampled]:
    """Prefill one chunk of each prompt into its batch slot; sample the first token of prompts that end in it.

    `first_chunk`: no prompt has an earlier part in the KV cache, so attention is limited to the chunk. `image_embeds`
    are inserted after BOS, with the first chunk only. Padding is prefilled too, into positions past the end of the
    prompt: no query sees them before they are overwritten. `wants_top`: also return the most probable tokens.
    """
    model = bind(graph, params)
    x, positions = prefill_embed(model, chunk, image_embeds)
    layer_prefixes = state.prefixes or [None] * len(state.cache)
    visible = visible_len(state.cache_len, positions, first_chunk)
    own = [
        gather_slots(layer, prefixes, chunk, visible, first_chunk)
        for layer, prefixes in zip(state.cache, layer_prefixes, strict=True)
    ]
    mask, rank_mask = chunk_mask(chunk, first_chunk), as_factors(chunk.rank_mask, x)
    hidden, own, _ = model.language(x, positions, mask, own, rank_mask=rank_mask)
    cache = [scatter_slots(layer, part, chunk.slot) for layer, part in zip(state.cache, own, strict=True)]
    prefixes = [scatter_slots(layer, part, chunk.target) for layer, part in zip(state.prefixes, own, strict=False)]
    rest, sampled = prefill_finish(model, vocab_size, state.without_cache, chunk, hidden, stops, wants_top)
    return rest._replace(cache=cache, prefixes=prefixes), sampled


def prefill_embed(
    model: SphinxMoE, chunk: Chunk, image_embeds: tuple[Float[Array, "crops tokens dim"], ...] | None
) -> tuple[Float[Array, "batch length dim"], Int[Array, "batch length"]]:
    """Embeddings of a chunk, image tokens included, and their positions."""
    x = model.embed(chunk.tokens, None if image_embeds is None else jnp.stack(image_embeds))
    return x, chunk.start[:, None] + jnp.arange(x.shape[1])


def as_factors(
    rank_mask: Bool[Array, "batch rank"] | None, x: Float[Array, "batch length dim"]
) -> Float[Array, "batch rank"] | None:
    """The mask as what the ranks of adapters are multiplied by."""
    return None if rank_mask is None else rank_mask.astype(x.dtype)


def visible_len(cache_len: int, positions: Int[Array, "batch length"], first_chunk: bool) -> int:
    """Cache positions that a chunk's attention covers: most prompts are far shorter than the cache."""
    return positions.shape[1] if first_chunk else cache_len


def chunk_mask(chunk: Chunk, first_chunk: bool) -> Causal:
    """Causal over the chunk alone, or over what is in the KV cache before it too."""
    return Causal(None if first_chunk else chunk.start)


def gather_slots(
    layer: LayerCache, prefixes: LayerCache | None, chunk: Chunk, visible: int, first_chunk: bool
) -> LayerCache:
    """The part of a layer's KV cache that a chunk reads and writes: `visible` positions of the slot of each prompt.

    Where `chunk.source` names a prefix of the pool, the first positions are the prefix's.
    """
    batch = chunk.tokens.shape[0]

    def gather(whole: Array, prefix: Array | None) -> Float[Array, "batch visible kv_heads head_dim"]:
        if first_chunk:
            return constrain(jnp.zeros((batch, visible, *whole.shape[2:]), whole.dtype), *_CACHE)
        own = _take_slots(whole, chunk.slot)
        if prefix is None:
            return own
        # A prefix longer than the slots' caches is cut: its positions past them belong to no prompt that fits.
        shared = _take_slots(prefix, chunk.source)[:, :visible]
        shared = jnp.pad(shared, ((0, 0), (0, visible - shared.shape[1]), (0, 0), (0, 0)))
        return jnp.where((chunk.source < prefix.shape[0])[:, None, None, None], shared, own)

    return LayerCache(
        gather(layer.k, prefixes and prefixes.k),
        gather(layer.v, prefixes and prefixes.v),
    )


def _take_slots(
    whole: Float[Array, "slots length kv_heads head_dim"], index: Int[Array, "batch"]
) -> Float[Array, "batch length kv_heads head_dim"]:
    """whole[index]: each data-parallel group takes of its own slots, so no collective is needed."""
    size = whole.shape[0]

    def take(own: Array, index: Array) -> Array:
        return jnp.take(own, local_index(index, "batch", size), axis=0, mode="clip")

    return sharded_map(take, (_CACHE, ("batch",)), _CACHE, sum_over=())(whole, index)


def scatter_slots(layer: LayerCache, part: LayerCache, index: Int[Array, "batch"]) -> LayerCache:
    """The layer's cache with `part` written to the first positions of the slots `index`; past the last: dropped."""

    def scatter(whole: Array, part: Array) -> Array:
        size, length = whole.shape[:2]

        def own(whole: Array, part: Array, index: Array) -> Array:
            local = local_index(index, "batch", size)
            return whole.at[local, : part.shape[1]].set(part, mode="drop")

        return sharded_map(own, (_CACHE, _CACHE, ("batch",)), _CACHE, sum_over=())(whole, part[:, :length], index)

    return LayerCache(scatter(layer.k, part.k), scatter(layer.v, part.v))


def prefill_finish(
    model: SphinxMoE,
    vocab_size: int,
    rest: State,
    chunk: Chunk,
    hidden: Float[Array, "batch length dim"],
    stops: Int[Array, "states vocab"],
    wants_top: Bool[Array, ""],
) -> tuple[State, Sampled]:
    """The slots that a chunk was prefilled into, each with the token after it; `rest` is the state without caches.

    A slot whose prompt goes on is left done, so that decode steps in between pass it over.
    """
    num_image_tokens = hidden.shape[1] - chunk.tokens.shape[1]
    end = num_image_tokens + chunk.length - 1
    logits = model.language.logits(jnp.take_along_axis(hidden, end[:, None, None], axis=1))[:, 0]
    slots = State(
        cache=[],
        prefixes=[],
        length=chunk.start + num_image_tokens + chunk.length,
        token=jnp.zeros_like(chunk.length),
        count=jnp.zeros_like(chunk.length),
        limit=chunk.limit,
        done=~chunk.last,
        stop=chunk.stop,
        seeds=chunk.seeds,
        seen=chunk.seen,
        sampling=chunk.sampling,
        rank_mask=chunk.rank_mask,
    )
    slots, token, logprob, top = _sample_next(slots, logits, vocab_size, stops, wants_top)
    rest = jax.tree.map(lambda whole, new: whole.at[chunk.slot].set(new, mode="drop"), rest, slots)
    return rest, _one_step(slots, token, logprob, top)


def decode(
    graph: nnx.GraphDef,
    vocab_size: int,
    kv_len: int,
    params: dict,
    state: State,
    cancelled: Bool[Array, "num_seqs"],
    stops: Int[Array, "states vocab"],
    steps: Int[Array, ""],
    until: Int[Array, ""],
    wants_top: Bool[Array, ""],
) -> tuple[State, Sampled]:
    """Up to `steps` decode steps, or until no more than `until` sequences run.

    Attention reads the first `kv_len` cache positions: no running sequence may grow past them. `cancelled` sequences
    end before the first step. `wants_top`: also return the most probable tokens.
    """
    model = bind(graph, params)
    state = state._replace(done=state.done | cancelled)

    def is_running(carry: tuple[Int[Array, ""], State, Sampled]) -> Bool[Array, ""]:
        step, state, _ = carry
        return (step < steps) & (jnp.sum(~state.done) > until)

    def body(carry: tuple[Int[Array, ""], State, Sampled]) -> tuple[Int[Array, ""], State, Sampled]:
        step, state, so_far = carry
        x, positions = decode_embed(model, state)
        # A sequence that is done may have any length; its output is not used.
        mask = Causal(jnp.where(state.done, 0, state.length), kv_len)
        rank_mask = as_factors(state.rank_mask, x)
        hidden, cache, _ = model.language(x, positions, mask, state.cache, rank_mask=rank_mask)
        rest, new = decode_finish(model, vocab_size, state.without_cache, hidden, stops, wants_top)
        return step + 1, rest._replace(cache=cache, prefixes=state.prefixes), _put_column(so_far, new, step)

    empty = empty_sampled(state, MAX_STEPS)
    _, state, sampled = jax.lax.while_loop(is_running, body, (jnp.int32(0), state, empty))
    return state, sampled._replace(count=state.count, done=state.done, stopped=state.stop == STOPPED)


def empty_sampled(state: State, steps: int) -> Sampled:
    """No tokens yet."""
    shape = (state.num_seqs, steps)
    top = (*shape, num_top(state.seen.shape[1]))
    return Sampled(
        tokens=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        count=state.count,
        done=state.done,
        stopped=state.stop == STOPPED,
        top_tokens=jnp.zeros(top, jnp.int32),
        top_logprobs=jnp.zeros(top, jnp.float32),
    )


def num_top(vocab_size: int) -> int:
    """How many of the most probable tokens are returned."""
    return min(MAX_TOP_LOGPROBS, vocab_size)


def decode_embed(model: SphinxMoE, state: State) -> tuple[Float[Array, "num_seqs 1 dim"], Int[Array, "num_seqs 1"]]:
    """Each sequence's last token, and its position. A slot that is done computes too, and writes past its end."""
    return model.embed(state.token[:, None]), state.length[:, None]


def decode_finish(
    model: SphinxMoE,
    vocab_size: int,
    rest: State,
    hidden: Float[Array, "num_seqs 1 dim"],
    stops: Int[Array, "states vocab"],
    wants_top: Bool[Array, ""],
) -> tuple[State, Sampled]:
    """Each sequence with its next token; `rest` is the state without caches."""
    logits = model.language.logits(hidden)[:, 0]
    rest = rest._replace(length=jnp.where(rest.done, rest.length, rest.length + 1))
    rest, token, logprob, top = _sample_next(rest, logits, vocab_size, stops, wants_top)
    return rest, _one_step(rest, token, logprob, top)


def _sample_next(
    state: State,
    logits: Float[Array, "batch vocab"],
    vocab_size: int,
    stops: Int[Array, "states vocab"],
    wants_top: Bool[Array, ""],
) -> tuple[State, Int[Array, "batch"], Float[Array, "batch"], tuple[Array, Array]]:
    """The state after the next token of each sequence that is not done; token, log-probability and alternatives.

    `vocab_size` is the tokenizer's: a model's table may be larger, and what is past it is no token.
    """
    logits = constrain(logits, "batch", None)
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    token = sample(logits, state.seen, state.seeds, state.count, state.sampling)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    # The only collective between data-parallel groups: every device then knows all tokens, and which sequences ended.
    token, logprob = constrain(token, None), constrain(logprob, None)
    top = _top(logprobs, wants_top)
    count = jnp.where(state.done, state.count, state.count + 1)
    stop = jnp.where(state.done, state.stop, stops[state.stop, token].astype(jnp.int32))
    state = state._replace(
        token=jnp.where(state.done, state.token, token),
        count=count,
        stop=stop,
        done=state.done | (stop == STOPPED) | (count >= state.limit),
        seen=_mark(state.seen, token),
    )
    return state, token, logprob, top


def _top(
    logprobs: Float[Array, "batch vocab"], wants_top: Bool[Array, ""]
) -> tuple[Int[Array, "batch top"], Float[Array, "batch top"]]:
    """The most probable tokens and their log-probabilities, in falling order; zeros where nobody asked.

    A branch, not a program of its own: whoever asks first need not wait for a compilation. Each data-parallel group
    looks through its own sequences, and what it found is gathered within the branch: nobody else pays for it.
    """
    number = num_top(logprobs.shape[-1])

    def most_probable(logprobs: Array) -> Array:
        return jax.lax.top_k(logprobs, number)[1]

    def values_of(logprobs: Array, ids: Array) -> Array:
        return jnp.take_along_axis(logprobs, ids, axis=-1)

    def find() -> tuple[Array, Array]:
        rows = ("batch", None)
        ids = sharded_map(most_probable, (rows,), rows, sum_over=())(logprobs)
        values = sharded_map(values_of, (rows, rows), rows, sum_over=())(logprobs, ids)
        return constrain(ids, None, None), constrain(values, None, None)

    def nothing() -> tuple[Array, Array]:
        shape = (len(logprobs), number)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, logprobs.dtype)

    return jax.lax.cond(wants_top, find, nothing)


def _one_step(state: State, token: Array, logprob: Array, top: tuple[Array, Array]) -> Sampled:
    """The tokens of one step as arrays with one column."""
    tokens, logprobs, *top_columns = jax.tree.map(lambda x: x[:, None], (token, logprob, *top))
    return Sampled(tokens, logprobs, state.count, state.done, state.stop == STOPPED, *top_columns)


def _put_column(so_far: Sampled, new: Sampled, step: Int[Array, ""]) -> Sampled:
    """`so_far` with the token of decode step `step`; only its wide arrays are kept."""
    names = ("tokens", "logprobs", "top_tokens", "top_logprobs")
    put = jax.lax.dynamic_update_slice_in_dim
    return so_far._replace(**{name: put(getattr(so_far, name), getattr(new, name), step, axis=1) for name in names})


def _mark(seen: Shaped[Array, "batch vocab"], token: Int[Array, "batch"]) -> Bool[Array, "batch vocab"]:
    """`seen` with each sequence's token added, on every device by itself."""

    def mark(seen: Array, token: Array) -> Array:
        return seen.at[jnp.arange(len(token)), token].set(True, mode="drop")

    return sharded_map(mark, ((None, None), (None,)), (None, None), sum_over=())(seen, token)
