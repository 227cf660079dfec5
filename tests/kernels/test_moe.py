"""Each implementation of the experts against numpy in float64, with gradients; and what they read on a GPU."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax.config import DecoderConfig
from sphinx_jax.kernels.moe import MAX_UNROLLED_EXPERTS, choose_implementation, moe_ffn, reads_in_place
from sphinx_jax.kernels.moe_sorted_blocks import block_sizes, moe_sorted_blocks
from sphinx_jax.kernels.quantized import quantize
from sphinx_jax.language.moe import MoE
from sphinx_jax.model import bind

E, DIM, HIDDEN, K = 4, 12, 10, 2
IMPLEMENTATIONS = ("gather", "gather on a GPU", "dense", "sorted_blocks", "sorted_blocks in place")


def draw(tokens, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(tokens), 6)
    x, dy = (jax.random.normal(key, (tokens, DIM), dtype) for key in keys[:2])
    w_in = jax.random.normal(keys[2], (E, DIM, 2, HIDDEN), dtype) / 3
    w_out = jax.random.normal(keys[3], (E, HIDDEN, DIM), dtype) / 3
    weights = jax.random.uniform(keys[4], (tokens, K), dtype)
    experts = jnp.argsort(jax.random.uniform(keys[5], (tokens, E)), axis=-1)[:, :K].astype(jnp.int32)
    return x, experts, weights, w_in, w_out, dy


# One number of tokens, so that each implementation is compiled once.
ROUTINGS = {
    "even": lambda experts: experts,
    "an empty expert": lambda experts: experts % 3,
    "all on one": lambda experts: jnp.full_like(experts, 2),
    "none here": lambda experts: jnp.full_like(experts, E),
    "some elsewhere": lambda experts: jnp.where(experts < 2, E, experts),
}


@pytest.fixture(scope="module")
def compiled():
    """y and gradients of an implementation as one program; those for GPUs run on CPU too."""

    def both(case, x, experts, weights, w_in, w_out, dy):
        implementation, *options = case.split(" ", 1)
        with pytest.MonkeyPatch.context() as patch:
            if options == ["on a GPU"]:
                patch.setattr(sharding, "platform", lambda: "gpu")
            patch.setattr(sharding, "reads_slices_in_place", lambda: options == ["in place"])

            def function(x, weights, w_in, w_out):
                return moe_ffn(x, experts, weights, w_in, w_out, implementation)

            y, vjp = jax.vjp(function, x, weights, w_in, w_out)
            return y, vjp(dy)

    return jax.jit(both, static_argnums=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_values_and_gradients(compiled, moe_reference, implementation, routing):
    x, experts, *rest = draw(3)
    args = (x, routing(experts), *rest)
    y, gradients = compiled(implementation, *args)
    expected, expected_gradients = moe_reference(*args)
    for actual, reference in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        np.testing.assert_allclose(actual, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "dtype"), [(1, jnp.float32), (3, jnp.bfloat16)])
def test_one_token_and_bfloat16(compiled, moe_reference, implementation, tokens, dtype):
    args = draw(tokens, dtype)
    y, gradients = compiled(implementation, *args)
    expected, expected_gradients = moe_reference(*args)
    for actual, reference in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        assert actual.dtype == dtype
        tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-6
        assert np.linalg.norm(np.asarray(actual, np.float64) - reference) <= tolerance * np.linalg.norm(reference)


@pytest.mark.parametrize("sizes", [(8, 2), (4, 1)])
def test_blocks_of_two_sizes(moe_reference, sizes):
    @jax.jit
    def both(x, experts, weights, w_in, w_out, dy):
        y, vjp = jax.vjp(lambda *a: moe_sorted_blocks(a[0], experts, *a[1:], sizes), x, weights, w_in, w_out)
        return y, vjp(dy)

    x, experts, *rest = draw(17)
    for routing in ("even", "all on one", "some elsewhere"):
        args = (x, ROUTINGS[routing](experts), *rest)
        (y, gradients), (expected, expected_gradients) = both(*args), moe_reference(*args)
        for actual, reference in zip((y, *gradients), (expected, *expected_gradients), strict=True):
            np.testing.assert_allclose(actual, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("routing", "in_place"), [("an empty expert", False), ("some elsewhere", True)])
def test_lora_factors_are_trained_with_frozen_matrices(moe_reference, monkeypatch, routing, in_place):
    """The reference is the merged matrices; the chain rule turns their gradients into those of the factors."""
    monkeypatch.setattr(sharding, "reads_slices_in_place", lambda: in_place)
    x, experts, weights, w_in, w_out, dy = draw(17)
    experts, rank = ROUTINGS[routing](experts), 3
    shapes = (E, DIM, rank), (E, rank, 2, HIDDEN), (E, HIDDEN, rank), (E, rank, DIM)
    factors = tuple(jax.random.normal(jax.random.key(i), shape) / 3 for i, shape in enumerate(shapes))

    @jax.jit
    def both(x, weights, factors):
        def function(x, weights, factors):
            return moe_ffn(x, experts, weights, w_in, w_out, factors=factors)

        y, vjp = jax.vjp(function, x, weights, factors)
        return y, vjp(dy)

    y, (dx, dweights, dfactors) = both(x, weights, factors)
    a_in, b_in, a_out, b_out = (np.asarray(f, np.float64) for f in factors)
    merged = np.asarray(w_in) + np.einsum("edr,ergh->edgh", a_in, b_in), np.asarray(w_out) + a_out @ b_out
    expected, (expected_dx, expected_dweights, dw_in, dw_out) = moe_reference(x, experts, weights, *merged, dy)
    expected_factors = (
        np.einsum("edgh,ergh->edr", dw_in, b_in),
        np.einsum("edr,edgh->ergh", a_in, dw_in),
        dw_out @ b_out.swapaxes(1, 2),
        a_out.swapaxes(1, 2) @ dw_out,
    )
    actual = (y, dx, dweights, *dfactors)
    references = (expected, expected_dx, expected_dweights, *expected_factors)
    for one, reference in zip(actual, references, strict=True):
        np.testing.assert_allclose(one, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 17])
def test_adapters_next_to_each_other(compiled_with_adapters, moe_reference, implementation, tokens):
    """Tokens with the first adapter, the second, and none, against the matrices of each merged."""
    x, experts, weights, w_in, w_out, dy = draw(tokens)
    experts = ROUTINGS["some elsewhere"](experts)
    shapes = (E, DIM, 5), (E, 5, 2, HIDDEN), (E, HIDDEN, 5), (E, 5, DIM)
    factors = tuple(jax.random.normal(jax.random.key(i), shape) / 3 for i, shape in enumerate(shapes))
    ranks_of = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], np.float32)
    choices = [np.arange(tokens) % 3] if tokens > 1 else [np.array([i]) for i in range(3)]
    a_in, b_in, a_out, b_out = (np.asarray(f, np.float64) for f in factors)
    for chosen in choices:
        args = (x, experts, weights, w_in, w_out, factors, jnp.asarray(ranks_of[chosen]))
        y = np.asarray(compiled_with_adapters(implementation, *args))
        for i, ranks in enumerate(ranks_of):
            merged = (
                np.asarray(w_in) + np.einsum("edr,ergh->edgh", a_in * ranks, b_in),
                np.asarray(w_out) + (a_out * ranks) @ b_out,
            )
            expected = moe_reference(x, experts, weights, *merged, dy)[0]
            np.testing.assert_allclose(y[chosen == i], expected[chosen == i], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def compiled_with_adapters():
    """y of an implementation as one program."""

    def forward(case, x, experts, weights, w_in, w_out, factors, rank_mask):
        implementation, *options = case.split(" ", 1)
        with pytest.MonkeyPatch.context() as patch:
            if options == ["on a GPU"]:
                patch.setattr(sharding, "platform", lambda: "gpu")
            patch.setattr(sharding, "reads_slices_in_place", lambda: options == ["in place"])
            return moe_ffn(x, experts, weights, w_in, w_out, implementation, factors, rank_mask)

    return jax.jit(forward, static_argnums=0)


FULL = DecoderConfig()
MESHES = [{"tensor": 8}, {"tensor": 2}, {"tensor": 8, "expert": 2}]


def layer(mesh, compile_for_gpu, batch, length=1):
    """One full-size mixture-of-experts layer in bfloat16, compiled."""
    graph, params = sharding.abstract_params(lambda rngs: MoE(FULL, rngs=rngs), mesh, dtype=jnp.bfloat16)
    x_sharding = sharding.named_sharding(("batch", None, None), (batch, length, FULL.dim), mesh)
    x = jax.ShapeDtypeStruct((batch, length, FULL.dim), jnp.bfloat16, sharding=x_sharding)
    return compile_for_gpu(mesh, lambda params, x: bind(graph, params)(x)[0], params, x)


def weights_read(text: str) -> list[tuple[int, ...]]:
    """Shapes that the program's kernels read of arrays of over four million elements: only weights have that many."""

    def dims(shape):
        return tuple(map(int, shape.split(",")))

    read = []
    for call in re.finditer(r" fusion\([^\n]*calls=(%[\w.-]+)", text):
        body = text[text.index(f"\n{call[1]} (") :].partition("\n}")[0]
        for name, shape in re.findall(r"\n  (%\S+) = bf16\[([\d,]+)\]\S* parameter\(", body):
            if math.prod(dims(shape)) > 4e6:
                uses = re.findall(rf" = bf16\[([\d,]+)\]\S* (\S+)\([^\n]*{re.escape(name)}[,)]", body)
                read += [dims(part if use == "dynamic-slice" else shape) for part, use in uses]
    return sorted(read)


@pytest.mark.optimized
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_one_token_on_gpu_reads_its_experts_in_place(gpu_mesh, compile_for_gpu, shape):
    program = layer(gpu_mesh(**shape), compile_for_gpu, 1)
    hidden, text = FULL.hidden_dim // shape["tensor"], program.as_text()
    w_in, w_out = (1, FULL.dim, 2, hidden), (1, hidden, FULL.dim)
    assert weights_read(text) == sorted([w_in, w_in, w_out, w_out])
    assert not re.search(r" (while|conditional)\(", text)
    one_expert = 3 * FULL.dim * hidden * 2
    assert program.memory_analysis().temp_size_in_bytes < one_expert / 50


@pytest.mark.slow
@pytest.mark.optimized
def test_a_batch_on_gpu_reads_each_weight_once(gpu_mesh, compile_for_gpu):
    batch = 64
    program = layer(gpu_mesh(tensor=8), compile_for_gpu, batch)
    hidden, text = FULL.hidden_dim // 8, program.as_text()
    assert weights_read(text) == [(8, hidden, FULL.dim), (8, FULL.dim, 2 * hidden)]
    assert not re.search(r" (while|conditional)\(", text)
    # No more than a few arrays of tokens x experts x dim.
    assert program.memory_analysis().temp_size_in_bytes < 4 * batch * 8 * FULL.dim * 4


@pytest.mark.optimized
def test_prefill_on_gpu_has_no_array_of_tokens_by_experts_by_hidden(gpu_mesh, compile_for_gpu):
    tokens = 16384
    text = layer(gpu_mesh(tensor=8), compile_for_gpu, 1, tokens).as_text()
    largest = max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"[a-z]\d+\[([\d,]+)\]", text))
    assert largest < tokens * FULL.num_experts * FULL.hidden_dim // 8


def test_matrices_are_read_in_place_where_products_take_them_unconverted(monkeypatch):
    x, _, _, w_in, *_ = draw(3)
    many = jnp.zeros((MAX_UNROLLED_EXPERTS + 1, DIM, 2, HIDDEN))
    assert not reads_in_place(x, w_in)
    monkeypatch.setattr(sharding, "reads_slices_in_place", lambda: True)
    assert reads_in_place(x, w_in)
    others = w_in.astype(jnp.bfloat16), quantize(w_in, "int8", -3), many
    assert not any(reads_in_place(x, other) for other in others)


def test_implementation_depends_on_platform_and_tokens():
    on_gpu = [choose_implementation("gpu", tokens, 2, 8) for tokens in (1, 3, 4, 128, 129)]
    assert on_gpu == ["gather", "gather", "dense", "dense", "sorted_blocks"]
    assert choose_implementation("gpu", 2, 2, 4) == "dense"
    on_hopper = [choose_implementation("gpu", tokens, 2, 8, True) for tokens in (1, 3, 4, 128, 129)]
    assert on_hopper == ["grouped_matmul", "grouped_matmul", "dense", "dense", "grouped_matmul"]
    # A token may have chosen neither of two local experts.
    assert choose_implementation("gpu", 1, 2, 2, True) == "grouped_matmul"
    on_cpu = [choose_implementation("cpu", tokens, 2, 8) for tokens in (1, 3, 4)]
    assert on_cpu == ["gather", "gather", "sorted_blocks"]
    native = [choose_implementation("cpu", tokens, 2, 8, max_native_tokens=8) for tokens in (3, 8, 9)]
    assert native == ["gather", "gather", "sorted_blocks"]


@pytest.mark.parametrize("max_size", [128, 256])
def test_blocks_have_little_padding(max_size):
    """At most one small block per expert is partly filled: with 2,048 tokens at most an eighth of the rows."""
    for rows in (1, 2, 32, 100, 1000, 4096, 100_000):
        large, small = block_sizes(rows, 8, max_size)[0], block_sizes(rows, 8, max_size)[-1]
        assert large & (large - 1) == 0 and large % small == 0 and large <= max_size
        if rows >= 4096:
            assert 8 * small <= rows / 8
    assert block_sizes(2, 8, max_size) == (1,)
