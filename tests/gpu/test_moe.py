"""The experts' kernels for Hopper GPUs, forward and backward, against float64 on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax.kernels.moe import can_use_grouped_matmul, choose_implementation, moe_ffn

pytestmark = pytest.mark.gpu

E, K = 8, 2

ROUTINGS = {
    "even": lambda experts: experts,
    "an empty expert": lambda experts: np.where(experts == 3, (experts + 1) % E, experts),
    "all on two": lambda experts: experts % 2,
    "none here": lambda experts: np.full_like(experts, E),
    "some elsewhere": lambda experts: np.where(experts < 3, E, experts),
}


@pytest.fixture(autouse=True)
def needs_hopper():
    if sharding.compute_capability() != "9.0":
        pytest.skip("needs a Hopper GPU")


def draw(tokens, dim, hidden):
    random = np.random.default_rng(tokens)

    def normal(scale, *shape):
        return jnp.asarray(random.normal(size=shape) * scale, jnp.bfloat16)

    arrays = (
        normal(1, tokens, dim),
        jnp.asarray(random.random((tokens, K)), jnp.bfloat16),
        normal(dim**-0.5, E, dim, 2, hidden),
        normal(hidden**-0.5, E, hidden, dim),
        normal(1, tokens, dim),
    )
    return arrays, random.random((tokens, E)).argsort(axis=-1)[:, :K].astype(np.int32)


@jax.jit
def forward(x, experts, weights, w_in, w_out):
    return moe_ffn(x, experts, weights, w_in, w_out, "grouped_matmul")


@jax.jit
def with_gradients(x, experts, weights, w_in, w_out, dy):
    y, vjp = jax.vjp(lambda x, *rest: moe_ffn(x, experts, *rest, "grouped_matmul"), x, weights, w_in, w_out)
    return y, *vjp(dy)


def is_close(actual, reference):
    error = np.asarray(actual, np.float64) - reference
    return np.linalg.norm(error) <= 1e-2 * np.linalg.norm(reference) and np.all(np.isfinite(error))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("routing", ["even", "none here", "some elsewhere"])
def test_a_tile_per_assignment(moe_reference, tokens, routing):
    """Few tokens: each assignment has a tile of its own."""
    (x, weights, w_in, w_out, _), experts = draw(tokens, 256, 384)
    experts = ROUTINGS[routing](experts)
    assert is_close(forward(x, experts, weights, w_in, w_out), moe_reference(x, experts, weights, w_in, w_out))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [40, 300, 1100])
def test_values_and_gradients(moe_reference, tokens, routing):
    """1,100 tokens are in tiles of 128 rows, fewer tokens in tiles of 64."""
    (x, weights, w_in, w_out, dy), experts = draw(tokens, 256, 384)
    experts = ROUTINGS[routing](experts)
    assert can_use_grouped_matmul(x, w_in) and choose_implementation("gpu", 1, K, E, True) == "grouped_matmul"
    y, gradients = moe_reference(x, experts, weights, w_in, w_out, dy)
    assert is_close(forward(x, experts, weights, w_in, w_out), y)
    for actual, reference in zip(with_gradients(x, experts, weights, w_in, w_out, dy), (y, *gradients), strict=True):
        assert is_close(actual, reference)


@pytest.mark.parametrize("tokens", [1, 2000])
def test_full_width(tokens):
    """Mixtral's sizes: some of the tokens against XLA's products accumulated in float32."""
    dim, hidden = 4096, 14336
    keys = jax.random.split(jax.random.key(tokens), 4)

    def normal(key, scale, *shape):
        return scale * jax.random.normal(key, shape, jnp.bfloat16)

    x = normal(keys[0], 1, tokens, dim)
    w_in, w_out = normal(keys[1], dim**-0.5, E, dim, 2, hidden), normal(keys[2], hidden**-0.5, E, hidden, dim)
    experts = jnp.argsort(jax.random.uniform(keys[3], (tokens, E)), axis=-1)[:, :K].astype(jnp.int32)
    y = forward(x, experts, jnp.full((tokens, K), 0.5, jnp.bfloat16), w_in, w_out)

    def expert(t, e):
        gate, up = jnp.einsum("d,dgh->gh", x[t], w_in[e], preferred_element_type=jnp.float32)
        return (jax.nn.silu(gate) * up) @ w_out[e].astype(jnp.float32)

    for t in range(0, tokens, 499):
        assert is_close(y[t], np.asarray(0.5 * sum(expert(t, e) for e in experts[t])))
