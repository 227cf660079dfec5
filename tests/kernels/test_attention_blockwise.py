"""Blockwise attention against float64, with every kind of mask, and the memory of its programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax.kernels import attention as attention_module
from sphinx_jax.kernels.attention import attention
from sphinx_jax.kernels.attention_blockwise import _Blocking, blockwise_attention
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.memory_plan.aot import compile_aot
from tests.instruments import largest_values


def draw(q_len, kv_len, dtype=jnp.float32, kv_heads=2, group=3, batch=2):
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(q_len)
    q_shape, k_shape = (batch, q_len, kv_heads, group, 8), (batch, kv_len, kv_heads, 8)
    return [jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in (q_shape, k_shape, k_shape, q_shape)]


def packed(length):
    """Three packed segments, causal within each: later segments do not attend to the first blocks of keys."""
    segment_ids = np.minimum(np.arange(length) // (length // 3), 2)
    return np.tril(segment_ids[:, None] == segment_ids)[None].repeat(2, axis=0)


def scattered(q_len, kv_len):
    """Every block of queries attends to every block of keys, and every query to at least one key."""
    mask = np.random.default_rng(0).random((2, q_len, kv_len)) < 0.1
    mask[..., -1] = True
    return mask


NO_MASK = np.ones((1, 100, 70), bool)
CASES = {
    "causal": (Causal(), np.tril(np.ones((1, 100, 100), bool))),
    "causal, full blocks": (Causal(), np.tril(np.ones((1, 96, 96), bool))),
    "no mask": (None, NO_MASK),
    "packed": (packed(100), packed(100)),
    "scattered": (scattered(60, 90), scattered(60, 90)),
}


def relative_error(actual, reference):
    """Of the whole array, in the Euclidean norm."""
    return np.linalg.norm(np.asarray(actual, np.float64) - reference) / np.linalg.norm(reference)


def with_gradients(function, q, k, v, d_out):
    out, vjp = jax.vjp(function, q, k, v)
    return out, *vjp(d_out)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)], ids=["float32", "bfloat16"]
)
def test_values_and_gradients(attention_reference, case, dtype, tolerance):
    mask, dense_mask = CASES[case]
    mask = jnp.asarray(mask) if isinstance(mask, np.ndarray) else mask
    args = draw(*dense_mask.shape[1:], dtype)
    actual = jax.jit(lambda *args: with_gradients(lambda *qkv: blockwise_attention(*qkv, mask, 32), *args))(*args)
    assert {x.dtype for x in actual} == {jnp.dtype(dtype)}
    assert all(
        relative_error(*pair) < tolerance for pair in zip(actual, attention_reference(*args, dense_mask), strict=True)
    )


@pytest.mark.parametrize("length", [5, 40])
def test_chunks_with_different_starts(chunk_attention, length):
    """The KV cache has stale values past the end of each sequence."""
    start, cache_len = np.array([0, 33, 77]), 150
    q, k, v, _ = draw(length, cache_len, batch=3)
    past = (np.arange(cache_len) >= (start + length)[:, None])[:, :, None, None]
    attend = jax.jit(lambda start, q, k, v: blockwise_attention(q, k, v, Causal(start), 32))
    actual = attend(start, q, jnp.where(past, 1e4, k), jnp.where(past, -1e4, v))
    assert relative_error(actual, chunk_attention(start, q, k, v)) < 1e-6


def test_padding_keys_are_masked(attention_reference):
    """Queries at positions past the last key attend to all keys."""
    args = draw(16, 40)
    dense_mask = np.arange(40) <= 30 + np.arange(16)[:, None]
    actual = with_gradients(lambda *qkv: blockwise_attention(*qkv, Causal(jnp.array([30, 30])), 16), *args)
    assert all(
        relative_error(*pair) < 1e-6 for pair in zip(actual, attention_reference(*args, dense_mask[None]), strict=True)
    )


MASKS = {
    "causal": (Causal(), np.tril(np.ones((1, 100, 100), bool))),
    "chunk": (Causal(jnp.array([0, 40])), np.arange(170) <= np.array([[[0]], [[40]]]) + np.arange(100)[:, None]),
    "no mask": (None, NO_MASK),
    "packed": (packed(100), packed(100)),
}


@pytest.mark.parametrize("case", MASKS)
def test_blocks_without_visible_keys_are_skipped(case):
    """Key blocks before the first, and after the last, that a query of the block attends to in any sequence."""
    mask, dense_mask = MASKS[case]
    mask = jax.tree.map(jnp.asarray, mask)
    q, k, *_ = draw(*dense_mask.shape[1:])
    i, j, num_pairs = _Blocking(q, k, mask, 16).block_pairs()
    q_size, kv_size = (16 * -(-n // (16 * -(-n // 16))) for n in dense_mask.shape[1:])
    expected = []
    for q_block, first_query in enumerate(range(0, dense_mask.shape[1], q_size)):
        (keys,) = np.nonzero(dense_mask[:, first_query : first_query + q_size].any(axis=(0, 1)))
        expected += [(q_block, kv_block) for kv_block in range(keys[0] // kv_size, keys[-1] // kv_size + 1)]
    assert list(zip(i.tolist(), j.tolist(), strict=True))[: int(num_pairs)] == expected
    assert isinstance(num_pairs, int) == (case in ("causal", "no mask"))


def record_calls(monkeypatch):
    """Shape of q and block size of each call of `blockwise_attention` by `attention`."""
    calls = []

    def record(q, k, v, mask, block_size):
        calls.append((q.shape, block_size))
        return blockwise_attention(q, k, v, mask, block_size)

    monkeypatch.setattr(attention_module, "blockwise_attention", record)
    return calls


@pytest.mark.parametrize("case", ["causal", "no mask", "per sequence", "shared"])
def test_some_sequences_at_a_time(attention_reference, monkeypatch, case):
    """Two of four: the scores of two sequences are the largest that may be computed at once."""
    masks = np.concatenate([packed(100), np.tril(np.ones((2, 100, 100), bool))])
    mask, dense_mask = {"per sequence": (masks, masks), "shared": (masks[:1], masks[:1])}.get(case) or CASES[case]
    mask = jnp.asarray(mask) if isinstance(mask, np.ndarray) else mask
    q_len, kv_len = dense_mask.shape[1:]
    monkeypatch.setitem(attention_module._MAX_DENSE_SCORE_BYTES, "cpu", 1 << 10)
    monkeypatch.setitem(attention_module._MAX_BLOCK_SCORE_BYTES, "cpu", 4 * 2 * 6 * q_len * kv_len)
    calls = record_calls(monkeypatch)
    args = draw(q_len, kv_len, batch=4)
    actual = jax.jit(lambda *args: with_gradients(lambda *qkv: attention(*qkv, mask), *args))(*args)
    assert {shape[0] for shape, _ in calls} == {2}
    expected = attention_reference(*args, dense_mask)
    assert all(relative_error(*pair) < 1e-6 for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("case", ["causal", "no mask", "packed"])
def test_on_several_devices(attention_reference, monkeypatch, case):
    """Two devices share a key head, and the batch is sharded over two: blockwise, as all scores would be too many."""
    monkeypatch.setitem(attention_module._MAX_DENSE_SCORE_BYTES, "cpu", 1 << 10)
    monkeypatch.setitem(attention_module._MAX_BLOCK_SCORE_BYTES, "cpu", 1 << 10)
    monkeypatch.setattr(attention_module, "_MIN_BLOCK_SIZE", 16)
    calls, (mask, dense_mask) = record_calls(monkeypatch), CASES[case]
    mask = jnp.asarray(mask) if isinstance(mask, np.ndarray) else mask
    args = draw(*dense_mask.shape[1:], group=2)
    with sharding.mesh_context(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        actual = jax.jit(lambda *args: with_gradients(lambda *qkv: attention(*qkv, mask), *args))(*args)
    assert set(calls) == {((1, dense_mask.shape[1], 1, 1, 8), 16)}
    expected = attention_reference(*args, dense_mask)
    assert all(relative_error(*pair) < 1e-6 for pair in zip(actual, expected, strict=True))


def test_chunks_on_several_devices(chunk_attention, monkeypatch):
    monkeypatch.setitem(attention_module._MAX_DENSE_SCORE_BYTES, "cpu", 1 << 10)
    monkeypatch.setitem(attention_module._MAX_BLOCK_SCORE_BYTES, "cpu", 1 << 10)
    start = np.array([0, 77])
    q, k, v, _ = draw(40, 150, group=2)
    with sharding.mesh_context(sharding.make_mesh(data=2, tensor=4)):
        actual = jax.jit(lambda start, *qkv: attention(*qkv, Causal(start)))(start, q, k, v)
    assert relative_error(actual, chunk_attention(start, q, k, v)) < 1e-6


LENGTH, HEADS = 4096, 32


@pytest.mark.optimized
def test_gpu_program_has_no_scores_and_skips_masked_blocks(gpu_mesh, monkeypatch):
    """Mixtral-8x7B's attention to 4,096 positions, forward and backward, on a non-Hopper GPU without cuDNN.

    36 of 64 pairs of blocks, a trip count that is known when the program is compiled.
    """
    monkeypatch.setattr(attention_module, "_has_cudnn", lambda platform: False)
    mesh = gpu_mesh("a100-80gb")

    def abstract(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.named_sharding((None,) * 4, shape, mesh))

    q, k = abstract(1, LENGTH, HEADS, 128), abstract(1, LENGTH, 8, 128)

    def loss(q, k, v):
        return jnp.sum(attention(q.reshape(1, LENGTH, 8, -1, 128), k, v, Causal()).astype(jnp.float32))

    compiled = compile_aot(sharding.Program(jax.grad(loss, argnums=(0, 1, 2))), (q, k, k), mesh)
    text, block_bytes = compiled.as_text(), 4 * HEADS * 512 * 512
    assert re.findall(r'known_trip_count":{"n":"(\d+)"', text) == ["36", "36"]
    # The largest values are the float32 accumulators of the output and of d_q, which one kernel initialises.
    assert max(largest_values(text, block_bytes))[0] <= 2 * (4 * HEADS * LENGTH * 128)
    # Dense attention takes 8 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 300 * 2**20


@pytest.mark.parametrize("start", [None, 1536])
def test_cpu_program_has_no_scores(start):
    """All float32 scores of 512 queries and 2,048 keys with 8 heads would be 32 MiB."""

    def abstract(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    q, k = abstract(1, 512 if start else 2048, 4, 2, 16), abstract(1, 2048, 4, 16)
    attend = jax.jit(lambda starts, q, k, v: attention(q, k, v, Causal(starts if start else None)))
    compiled = attend.lower(jax.ShapeDtypeStruct((1,), jnp.int32), q, k, k).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**20
