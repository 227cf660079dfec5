"""The full model at nano size: the same numbers on every mesh, causality, segments and dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax.config import SphinxConfig, nano
from sphinx_jax.errors import UserError
from sphinx_jax.language.kv_cache import segment_positions
from sphinx_jax.model import SphinxMoE, bind
from sphinx_jax.training.step import make_loss
from tests.conftest import MESHES, mesh_name

CONFIG = dataclasses.replace(nano(), language=dataclasses.replace(nano().language, vocab_size=64))
BATCH, TEXT = 4, 14
QUICK = {"tensor": 2, "expert": 2, "fsdp": 2}


def make(rngs):
    return SphinxMoE(CONFIG, rngs=rngs)


def make_batch():
    keys = jax.random.split(jax.random.key(1), 2)
    tokens = jax.random.randint(keys[0], (BATCH, TEXT), 3, 64)
    segment_ids = jnp.array([[0] * 4 + [1] * 5 + [2] * 5] * BATCH)
    labels = jnp.where(jnp.arange(TEXT) % 3 == 0, tokens, 0)
    return {
        "tokens": tokens,
        "labels": labels,
        "segment_ids": segment_ids,
        "images": jax.random.normal(keys[1], (BATCH, 64, 64, 3)),
    }


@functools.cache
def initial_params():
    """Drawn once: every mesh draws the same."""
    return jax.tree.map(np.asarray, sharding.init_params(make, 0, sharding.make_mesh())[1])


@pytest.fixture(scope="module")
def one_device():
    """Loss, gradients and logits on one device."""
    return run(sharding.make_mesh())


def run(mesh):
    graph, abstract = sharding.abstract_params(make, mesh)
    params = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), initial_params(), abstract)
    batch = make_batch()
    loss = make_loss(graph, CONFIG)

    def loss_grads_logits(params):
        (value, _), grads = jax.value_and_grad(lambda p: loss({"model": p}, batch), has_aux=True)(params)
        return value, grads, bind(graph, params)(batch["tokens"], batch["images"])[0]

    with sharding.mesh_context(mesh):
        value, grads, logits = jax.jit(loss_grads_logits)(params)
    return float(value), jax.tree.map(np.asarray, grads), np.asarray(logits)


def close(ours, theirs, rtol=1e-5):
    assert np.linalg.norm(ours - theirs) <= rtol * np.linalg.norm(theirs) + 1e-8


@pytest.mark.slow
def test_initial_parameters_do_not_depend_on_the_mesh():
    """Of the whole model; of the decoder on every mesh in tests/sharding/test_init.py."""
    params = sharding.init_params(make, 0, sharding.make_mesh(**QUICK))[1]
    jax.tree.map(lambda ours, one: np.testing.assert_array_equal(np.asarray(ours), one), params, initial_params())


@pytest.mark.parametrize(
    "shape",
    [shape if shape == QUICK else pytest.param(shape, marks=pytest.mark.slow) for shape in MESHES[1:]],
    ids=mesh_name,
)
def test_every_mesh_gives_the_same_numbers(shape, one_device):
    loss, grads, logits = run(sharding.make_mesh(**shape))
    assert loss == pytest.approx(one_device[0], rel=1e-5)
    close(logits, one_device[2])
    jax.tree.map(close, grads, one_device[1])


def test_causality():
    """The gradient of the output at a position is exactly zero for later positions, and nonzero for the others."""
    graph, params = sharding.init_params(make, 0, sharding.make_mesh())
    model = bind(graph, params)
    x = jax.random.normal(jax.random.key(0), (1, 8, CONFIG.language.dim))
    positions = jnp.arange(8)[None]
    mask = jnp.tril(jnp.ones((1, 8, 8), bool))
    grad = jax.grad(lambda x: model.language(x, positions, mask)[0][0, 3].sum())(x)
    per_position = np.abs(np.asarray(grad))[0].max(axis=-1)
    assert (per_position[:4] > 0).all()
    assert (per_position[4:] == 0).all()


def test_segments_equal_separate_sequences():
    """Two questions in one sequence after a shared prefix have the logits of separate sequences."""
    graph, params = sharding.init_params(make, 0, sharding.make_mesh())
    batch = make_batch()
    forward = jax.jit(lambda tokens, segment_ids: bind(graph, params)(tokens, batch["images"], segment_ids)[0])
    packed = forward(batch["tokens"], batch["segment_ids"])
    second = jnp.concatenate([batch["tokens"][:, :4], batch["tokens"][:, 9:]], axis=1)
    separate = forward(second, jnp.zeros_like(second))
    np.testing.assert_allclose(packed[:, 9:], separate[:, 4:], rtol=1e-4, atol=1e-5)


def test_segment_positions():
    segment_ids = jnp.array([[0, 0, 1, 1, 1, 2, 2, 5, 5]])
    np.testing.assert_array_equal(segment_positions(segment_ids), [[0, 1, 2, 3, 4, 2, 3, 2, 3]])


def test_image_embeddings_follow_bos():
    graph, params = sharding.init_params(make, 0, sharding.make_mesh())
    model, batch = bind(graph, params), make_batch()
    image_embeds = model.encode_images(batch["images"])
    x = model.embed(batch["tokens"], image_embeds)
    assert CONFIG.num_image_tokens == 4 * 4 + 1 + 2
    assert image_embeds.shape == (BATCH, 1, 17, CONFIG.language.dim)
    assert x.shape[1] == TEXT + CONFIG.num_image_tokens
    table = params["language"]["embedding"]["table"]
    np.testing.assert_array_equal(x[:, 0], table[batch["tokens"][:, 0]])
    np.testing.assert_array_equal(x[:, 1], jnp.broadcast_to(params["vision"]["start"], x[:, 1].shape))
    np.testing.assert_array_equal(x[:, 2:19], image_embeds[:, 0])
    np.testing.assert_array_equal(x[:, 19], jnp.broadcast_to(params["vision"]["end"], x[:, 1].shape))
    np.testing.assert_array_equal(x[:, 20:], table[batch["tokens"][:, 1:]])


def test_bfloat16_stays_bfloat16():
    """Hidden states and image embeddings have the parameters' dtype; logits and router weights are float32."""
    graph, params = sharding.abstract_params(make, sharding.make_mesh(), dtype=jnp.bfloat16)
    batch = make_batch()
    logits, intermediates = jax.eval_shape(lambda p: bind(graph, p)(batch["tokens"], batch["images"]), params)
    assert {intermediates[name].dtype for name in ("image_embeds", "hidden", "embedded")} == {jnp.dtype("bfloat16")}
    assert intermediates["layers"]["out"].dtype == jnp.bfloat16
    assert logits.dtype == intermediates["layers"]["routing"].weights.dtype == jnp.float32


def test_config_round_trip_and_errors():
    assert SphinxConfig.from_dict(nano().to_dict()) == nano()
    broken = nano().to_dict()
    broken["vision"]["clip"]["widht"] = broken["vision"]["clip"].pop("width")
    with pytest.raises(UserError, match=r"config.vision.clip.*missing \['width'\], unknown \['widht'\]"):
        SphinxConfig.from_dict(broken)
