"""The mixture of experts against a plain loop over tokens, and the properties of dropless routing."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sharding
from sphinx_jax.config import DecoderConfig
from sphinx_jax.language.moe import MoE, route
from sphinx_jax.model import bind

CONFIG = DecoderConfig(dim=16, hidden_dim=24, num_layers=1, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=8)


def make(rngs):
    return MoE(CONFIG, rngs=rngs)


def loop(params, x, k):
    """One token at a time, one expert at a time, in float64."""
    router, w_in, w_out = (np.asarray(params[name], np.float64) for name in ("router", "w_in", "w_out"))
    out = np.zeros(x.shape)
    for index in np.ndindex(x.shape[:-1]):
        token = np.asarray(x[index], np.float64)
        logits = token @ router
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities)[:k]
        for expert in best:
            gate, up = token @ w_in[expert, :, 0], token @ w_in[expert, :, 1]
            hidden = gate / (1 + np.exp(-gate)) * up
            out[index] += probabilities[expert] / probabilities[best].sum() * (hidden @ w_out[expert])
    return out


def test_equals_a_loop_over_tokens_on_every_mesh(mesh):
    graph, params = sharding.init_params(make, 0, mesh)
    x = jax.random.normal(jax.random.key(1), (4, 9, 16))
    with sharding.mesh_context(mesh):
        y, _ = jax.jit(lambda p, x: bind(graph, p)(x))(params, x)
    np.testing.assert_allclose(y, loop(params, x, CONFIG.experts_per_token), rtol=1e-5, atol=1e-5)


def test_permuting_experts_changes_nothing():
    graph, params = sharding.init_params(make, 0, sharding.make_mesh())
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    order = jnp.array([2, 0, 3, 1])
    permuted = {"router": params["router"][:, order], "w_in": params["w_in"][order], "w_out": params["w_out"][order]}
    y, routing = bind(graph, params)(x)
    y_permuted, routing_permuted = bind(graph, permuted)(x)
    np.testing.assert_allclose(y, y_permuted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(routing.expert_load[order], routing_permuted.expert_load)


def test_no_token_is_dropped_at_the_most_uneven_load():
    """All tokens select the same two experts, beyond any capacity; every token still gets their full output."""
    graph, params = sharding.init_params(make, 0, sharding.make_mesh())
    params["router"] = jnp.zeros((16, 4)).at[0, 2].set(50.0).at[0, 1].set(25.0)
    x = jax.random.normal(jax.random.key(1), (2, 9, 16)).at[..., 0].set(1.0)
    y, routing = bind(graph, params)(x)
    assert set(np.unique(routing.experts)) == {1, 2}
    np.testing.assert_allclose(y, loop(params, x, 2), rtol=1e-5, atol=1e-5)


def test_balance_loss():
    """1 for a uniform load; num_experts / k if k experts get all tokens."""
    even = route(jnp.zeros((1, 4, 4)).at[0, jnp.arange(4), jnp.arange(4)].set(1e-3), 1)
    np.testing.assert_allclose(even.balance_loss, 1.0, rtol=1e-5)
    np.testing.assert_allclose(even.expert_load, 0.25)
    uneven = route(jnp.full((1, 6, 4), -1e9).at[..., :2].set(0.0), 2)
    np.testing.assert_allclose(uneven.balance_loss, 4 / 2, rtol=1e-5)


def test_weights_sum_to_one_and_experts_are_the_top_k():
    logits = jax.random.normal(jax.random.key(0), (3, 5, 8))
    routing = route(logits, 2)
    np.testing.assert_allclose(routing.weights.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(np.sort(routing.experts), np.sort(np.argsort(-np.asarray(logits))[..., :2]))


def test_ties_select_the_first_experts():
    """As `lax.top_k` and numpy's stable sort."""
    logits = np.random.default_rng(0).integers(0, 3, (4, 50, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        route(jnp.asarray(logits), 2).experts, np.argsort(-logits, axis=-1, kind="stable")[..., :2]
    )


def test_golden_dense_reference(golden):
    """The original's dense and sparse implementations, run in PyTorch on one input, and its balance loss."""
    data = golden("moe_dense.npz")
    config = DecoderConfig(dim=24, hidden_dim=128, num_layers=1, num_heads=4, num_kv_heads=4, num_experts=4)
    graph, _ = nnx.split(MoE(config, rngs=nnx.Rngs(0)))
    w1, w2, w3 = (np.stack([data[f"experts.{e}.w{i}.weight"].T for e in range(4)]) for i in (1, 2, 3))
    params = {"router": data["gate"].T, "w_in": np.stack([w1, w3], axis=2), "w_out": w2}
    y, routing = bind(graph, jax.tree.map(jnp.asarray, params))(jnp.asarray(data["x"]))
    for reference in ("y", "y_sparse"):
        np.testing.assert_allclose(y, data[reference], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(routing.balance_loss, data["lb_sparse"], rtol=1e-5)
