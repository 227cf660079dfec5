"""The experts' kernels for Hopper GPUs, gradients included, against float64 on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax.kernels.moe import choose_implementation, has_kernels, moe_ffn

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
    normal = lambda scale, *shape: jnp.asarray(random.normal(size=shape) * scale, jnp.bfloat16)
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
    return moe_ffn(x, experts, weights, w_in, w_out, "groups")


@jax.jit
def with_gradients(x, experts, weights, w_in, w_out, dy):
    y, pull = jax.vjp(lambda x, *rest: moe_ffn(x, experts, *rest, "groups"), x, weights, w_in, w_out)
    return y, *pull(dy)


def close(found, reference):
    wrong = np.asarray(found, np.float64) - reference
    return np.linalg.norm(wrong) <= 1e-2 * np.linalg.norm(reference) and np.all(np.isfinite(wrong))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("routing", ["even", "none here", "some elsewhere"])
def test_a_few_tokens(experts_reference, tokens, routing):
    """Each assignment in a tile of its own."""
    (x, weights, w_in, w_out, _), experts = draw(tokens, 256, 384)
    experts = ROUTINGS[routing](experts)
    assert close(forward(x, experts, weights, w_in, w_out), experts_reference(x, experts, weights, w_in, w_out))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [40, 300, 1100])
def test_values_and_gradients(experts_reference, tokens, routing):
    """1,100 tokens lie in tiles of 128 rows, fewer in tiles of 64."""
    (x, weights, w_in, w_out, dy), experts = draw(tokens, 256, 384)
    experts = ROUTINGS[routing](experts)
    assert has_kernels(x, w_in) and choose_implementation("gpu", 1, K, E, True) == "groups"
    y, gradients = experts_reference(x, experts, weights, w_in, w_out, dy)
    assert close(forward(x, experts, weights, w_in, w_out), y)
    for found, reference in zip(with_gradients(x, experts, weights, w_in, w_out, dy), (y, *gradients), strict=True):
        assert close(found, reference)


@pytest.mark.parametrize("tokens", [1, 2000])
def test_full_width(tokens):
    """Mixtral's sizes: some tokens against XLA's own products in float32."""
    dim, hidden = 4096, 14336
    keys = jax.random.split(jax.random.key(tokens), 4)
    normal = lambda key, scale, *shape: scale * jax.random.normal(key, shape, jnp.bfloat16)
    x = normal(keys[0], 1, tokens, dim)
    w_in, w_out = normal(keys[1], dim**-0.5, E, dim, 2, hidden), normal(keys[2], hidden**-0.5, E, hidden, dim)
    experts = jnp.argsort(jax.random.uniform(keys[3], (tokens, E)), axis=-1)[:, :K].astype(jnp.int32)
    y = forward(x, experts, jnp.full((tokens, K), 0.5, jnp.bfloat16), w_in, w_out)

    def expert(t, e):
        gate, up = jnp.einsum("d,dgh->gh", x[t], w_in[e], preferred_element_type=jnp.float32)
        return (jax.nn.silu(gate) * up) @ w_out[e].astype(jnp.float32)

    for t in range(0, tokens, 499):
        assert close(y[t], np.asarray(0.5 * sum(expert(t, e) for e in experts[t])))
