"""Attention in blocks against float64, with every kind of mask, and what its programs keep in memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax.kernels import attention as attention_module
from sphinx_jax.kernels.attention import attention
from sphinx_jax.kernels.attention_blockwise import _Work, attention_in_blocks
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.memory_plan.aot import compile_ahead
from sphinx_jax.memory_plan.hlo import largest_values


def drawn(q_len, kv_len, dtype=jnp.float32, kv_heads=2, group=3, batch=2):
    """q, k, v and a gradient of the output."""
    rng = np.random.default_rng(q_len)
    heads, keys = (batch, q_len, kv_heads, group, 8), (batch, kv_len, kv_heads, 8)
    return [jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in (heads, keys, keys, heads)]


def packed(length):
    """Texts side by side, each of which sees itself, up to where it is: no later one sees the first blocks of keys."""
    text = np.minimum(np.arange(length) // (length // 3), 2)
    return np.tril(text[:, None] == text)[None].repeat(2, axis=0)


def scattered(q_len, kv_len):
    """Some query of every block sees keys of every block, and every one sees some."""
    seen = np.random.default_rng(0).random((2, q_len, kv_len)) < 0.1
    seen[..., -1] = True
    return seen


EVERYTHING = np.ones((1, 100, 70), bool)
CASES = {
    "causal": (Causal(), np.tril(np.ones((1, 100, 100), bool))),
    "causal, whole blocks": (Causal(), np.tril(np.ones((1, 96, 96), bool))),
    "everything": (None, EVERYTHING),
    "packed": (packed(100), packed(100)),
    "scattered": (scattered(60, 90), scattered(60, 90)),
}


def far(ours, reference):
    """Distance between two arrays, as a part of the second's size."""
    return np.linalg.norm(np.asarray(ours, np.float64) - reference) / np.linalg.norm(reference)


def with_gradients(function, q, k, v, d_out):
    out, gradients = jax.vjp(function, q, k, v)
    return out, *gradients(d_out)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "within"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)], ids=["float32", "bfloat16"])
def test_values_and_gradients(attention_reference, case, dtype, within):
    mask, seen = CASES[case]
    mask = jnp.asarray(mask) if isinstance(mask, np.ndarray) else mask
    args = drawn(*seen.shape[1:], dtype)
    ours = jax.jit(lambda *args: with_gradients(lambda *qkv: attention_in_blocks(*qkv, mask, 32), *args))(*args)
    assert {x.dtype for x in ours} == {jnp.dtype(dtype)}
    assert all(far(*pair) < within for pair in zip(ours, attention_reference(*args, seen), strict=True))


@pytest.mark.parametrize("length", [5, 40])
def test_texts_read_on_from_their_own_starts(later_attention, length):
    """In a cache in which others may have left anything past a row's end."""
    start, slots = np.array([0, 33, 77]), 150
    q, k, v, _ = drawn(length, slots, batch=3)
    past = (np.arange(slots) >= (start + length)[:, None])[:, :, None, None]
    masked = lambda start, q, k, v: attention_in_blocks(q, k, v, Causal(start), 32)
    ours = jax.jit(masked)(start, q, jnp.where(past, 1e4, k), jnp.where(past, -1e4, v))
    assert far(ours, later_attention(start, q, k, v)) < 1e-6


def test_nobody_sees_what_fills_up_the_last_block(attention_reference):
    """Queries past the last key see all there are."""
    args = drawn(16, 40)
    seen = np.arange(40) <= 30 + np.arange(16)[:, None]
    ours = with_gradients(lambda *qkv: attention_in_blocks(*qkv, Causal(jnp.array([30, 30])), 16), *args)
    assert all(far(*pair) < 1e-6 for pair in zip(ours, attention_reference(*args, seen[None]), strict=True))


MASKS = {
    "causal": (Causal(), np.tril(np.ones((1, 100, 100), bool))),
    "later": (Causal(np.array([0, 40])), np.arange(170) <= np.array([[[0]], [[40]]]) + np.arange(100)[:, None]),
    "everything": (None, EVERYTHING),
    "packed": (packed(100), packed(100)),
}


@pytest.mark.parametrize("case", MASKS)
def test_blocks_that_nobody_sees_are_left_out(case):
    """Of keys before the first that some row's query of a block sees, and behind the last."""
    mask, seen = MASKS[case]
    mask = jax.tree.map(jnp.asarray, mask)
    q, k, *_ = drawn(*seen.shape[1:])
    i, j, number = _Work(q, k, mask, 16).pairs()
    size = [16 * -(-n // (16 * -(-n // 16))) for n in seen.shape[1:]]
    expected = []
    for block, queries in enumerate(range(0, seen.shape[1], size[0])):
        (keys,) = np.nonzero(seen[:, queries : queries + size[0]].any(axis=(0, 1)))
        expected += [(block, other) for other in range(keys[0] // size[1], keys[-1] // size[1] + 1)]
    assert list(zip(i.tolist(), j.tolist(), strict=True))[: int(number)] == expected
    assert isinstance(number, int) == (case in ("causal", "everything"))


@pytest.mark.parametrize("case", ["causal", "everything", "of each row", "of all"])
def test_some_rows_at_a_time(attention_reference, monkeypatch, case):
    """Two of four, whose scores take up what there may be at once."""
    texts = np.concatenate([packed(100), np.tril(np.ones((2, 100, 100), bool))])
    mask, seen = {"of each row": (texts, texts), "of all": (texts[:1], texts[:1])}.get(case) or CASES[case]
    mask = jnp.asarray(mask) if isinstance(mask, np.ndarray) else mask
    q_len, kv_len = seen.shape[1:]
    monkeypatch.setitem(attention_module._SCORE_BYTES, "cpu", (1 << 10, 4 * 2 * 6 * q_len * kv_len))
    rows = []
    monkeypatch.setattr(
        attention_module, "attention_in_blocks", lambda *args: rows.append(len(args[0])) or attention_in_blocks(*args)
    )
    args = drawn(q_len, kv_len, batch=4)
    ours = jax.jit(lambda *args: with_gradients(lambda *qkv: attention(*qkv, mask), *args))(*args)
    assert set(rows) == {2}
    assert all(far(*pair) < 1e-6 for pair in zip(ours, attention_reference(*args, seen), strict=True))


@pytest.mark.parametrize("case", ["causal", "everything", "packed"])
def test_on_several_devices(attention_reference, monkeypatch, case):
    """Two devices share a key head, and two more the rows: in blocks because all scores would be too many."""
    monkeypatch.setitem(attention_module._SCORE_BYTES, "cpu", (1 << 10, 1 << 10))
    monkeypatch.setattr(attention_module, "_SMALLEST_BLOCK", 16)
    sizes, (mask, seen) = [], CASES[case]
    monkeypatch.setattr(
        attention_module,
        "attention_in_blocks",
        lambda *args: sizes.append((args[0].shape, args[-1])) or attention_in_blocks(*args),
    )
    mask = jnp.asarray(mask) if isinstance(mask, np.ndarray) else mask
    args = drawn(*seen.shape[1:], group=2)
    with sharding.mesh_context(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        ours = jax.jit(lambda *args: with_gradients(lambda *qkv: attention(*qkv, mask), *args))(*args)
    assert set(sizes) == {((1, seen.shape[1], 1, 1, 8), 16)}
    assert all(far(*pair) < 1e-6 for pair in zip(ours, attention_reference(*args, seen), strict=True))


def test_later_pieces_on_several_devices(later_attention, monkeypatch):
    monkeypatch.setitem(attention_module._SCORE_BYTES, "cpu", (1 << 10, 1 << 10))
    start = np.array([0, 77])
    q, k, v, _ = drawn(40, 150, group=2)
    with sharding.mesh_context(sharding.make_mesh(data=2, tensor=4)):
        ours = jax.jit(lambda start, *qkv: attention(*qkv, Causal(start)))(start, q, k, v)
    assert far(ours, later_attention(start, q, k, v)) < 1e-6


LENGTH, HEADS = 4096, 32


def test_a_gpu_keeps_no_scores_and_leaves_half_of_them_out(gpu_mesh):
    """Mixtral-8x7B's attention to 4,096 positions and its gradient, on a GPU that is no Hopper.

    36 of 64 pairs of blocks, whose number the program knows.
    """
    mesh = gpu_mesh("a100-80gb")
    shaped = lambda *shape: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=sharding.named_sharding((None,) * 4, shape, mesh)
    )
    q, k = shaped(1, LENGTH, HEADS, 128), shaped(1, LENGTH, 8, 128)

    def loss(q, k, v):
        return jnp.sum(attention(q.reshape(1, LENGTH, 8, -1, 128), k, v, Causal()).astype(jnp.float32))

    compiled = compile_ahead(sharding.Program(jax.grad(loss, argnums=(0, 1, 2))), (q, k, k), mesh)
    text, in_a_block = compiled.as_text(), 4 * HEADS * 512 * 512
    assert re.findall(r'known_trip_count":{"n":"(\d+)"', text) == ["36", "36"]
    # The largest is what the output and the queries' gradients are added up in, float32, zeroed by one kernel.
    assert max(largest_values(text, in_a_block))[0] <= 2 * (4 * HEADS * LENGTH * 128)
    # All at once it takes 8 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 300 * 2**20


@pytest.mark.parametrize("start", [None, 1536])
def test_a_cpu_keeps_no_scores(start):
    """Of 512 queries and 2,048 keys, 8 heads and float32, all would be 32 MiB."""
    rows = jax.ShapeDtypeStruct((1,), jnp.int32)
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    q, k = shaped(1, 512 if start else 2048, 4, 2, 16), shaped(1, 2048, 4, 16)
    masked = lambda start_of, q, k, v: attention(q, k, v, Causal(start_of if start else None))
    compiled = jax.jit(masked).lower(rows, q, k, k).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**20
