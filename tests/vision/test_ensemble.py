"""Which encoders exist, the order of the image embeddings, and gradients on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sharding
from sphinx_jax.config import ClipConfig, ConvNextConfig, DinoConfig, QFormerConfig, VisionConfig, nano
from sphinx_jax.vision.ensemble import Ensemble

DIM = 16
TINY = VisionConfig(
    image_size=32,
    clip=ClipConfig(width=16, num_layers=1, num_heads=2, patch=16, image_size=32),
    convnext=ConvNextConfig(depths=(1, 2), dims=(8, 16), kernel=3, image_size=16),
    dino=DinoConfig(width=24, num_layers=1, num_heads=3, patch=16, image_size=32, position_grid=5),
    qformer=QFormerConfig(
        vision_width=16, vision_layers=1, vision_heads=2, vision_mlp=24, patch=16, image_size=32,
        width=24, num_layers=2, num_heads=3, mlp=40, num_queries=5,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)


def random_params(config: VisionConfig):
    """Graph definition and random parameters on one device, without the slow compilation of the initialisers."""
    graph, abstract = sharding.abstract_params(lambda rngs: Ensemble(config, DIM, rngs=rngs), sharding.make_mesh())
    rng = np.random.default_rng(2)
    return graph, jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape).astype(p.dtype), abstract)


@pytest.fixture(scope="module")
def tiny():
    return random_params(TINY)


@pytest.mark.parametrize("present", [("clip",), ("convnext",), ("dino",), ("qformer",), ("clip", "dino", "qformer")])
def test_only_the_named_encoders_exist(present):
    others = {name: None for name in ("clip", "convnext", "dino", "qformer") if name not in present}
    config = dataclasses.replace(TINY, **others)
    _, params = sharding.abstract_params(lambda rngs: Ensemble(config, DIM, rngs=rngs), sharding.make_mesh())
    expected = {*present, "start", "end"}
    expected |= {"qformer_proj", "qformer_norm"} if "qformer" in present else set()
    expected |= {"visual_proj", "visual_norm"} if set(present) - {"qformer"} else set()
    assert set(params) == expected
    image_embeds = jax.eval_shape(lambda x: Ensemble(config, DIM, rngs=nnx.Rngs(0))(x), jnp.zeros((2, 32, 32, 3)))
    assert image_embeds.shape == (2, 1, config.tokens_per_crop, DIM)


def test_nano_shape():
    config = nano()
    images = jnp.zeros((3, 64, 64, 3))
    image_embeds = jax.eval_shape(lambda x: Ensemble(config.vision, config.language.dim, rngs=nnx.Rngs(0))(x), images)
    assert image_embeds.shape == (3, 1, 17, config.language.dim)


def test_qformer_tokens_come_first(tiny, images):
    """The Q-Former's last bias changes the first five tokens and no other."""
    graph, params = tiny
    encode = jax.jit(lambda params: nnx.merge(graph, nnx.State(params))(images))
    norm = params["qformer_norm"]
    change = encode(params | {"qformer_norm": norm | {"bias": norm["bias"] + 1}}) - encode(params)
    np.testing.assert_allclose(change[:, :, :5], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(change[:, :, 5:], 0.0)


def test_add_markers(tiny):
    graph, params = tiny
    image_embeds = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 3, DIM)), jnp.float32)
    out = np.asarray(nnx.merge(graph, nnx.State(params)).add_markers(image_embeds)).reshape(2, 5, 5, DIM)
    np.testing.assert_array_equal(out[:, :, 1:-1], image_embeds)
    np.testing.assert_array_equal(out[:, :, 0], np.broadcast_to(params["start"], (2, 5, DIM)))
    np.testing.assert_array_equal(out[:, :, -1], np.broadcast_to(params["end"], (2, 5, DIM)))


def test_wrong_image_size_raises(tiny, images):
    graph, params = tiny
    with pytest.raises(ValueError, match=r"images must be \[batch, 32, 32, 3\], got \[2, 16, 16, 3\]"):
        nnx.merge(graph, nnx.State(params))(images[:, ::2, ::2])


@pytest.mark.slow
def test_gradients_agree_on_a_mesh(images):
    """The gradient of every parameter, with head counts that the mesh divides and that it does not."""
    # CLIP's blocks are DINOv2's without layer scale; one layer of the Q-Former has all of its modules.
    qformer = dataclasses.replace(TINY.qformer, num_layers=1, cross_attention_every=1)
    config = dataclasses.replace(TINY, clip=None, qformer=qformer)
    graph, params = random_params(config)

    def gradients(mesh):
        _, abstract = sharding.abstract_params(lambda rngs: Ensemble(config, DIM, rngs=rngs), mesh)

        def loss(params):
            model = nnx.merge(graph, nnx.State(params))
            return (model.add_markers(model(images)) * np.linspace(-1, 1, DIM, dtype=np.float32)).var()

        with sharding.mesh_context(mesh):
            return jax.device_get(jax.jit(jax.grad(loss))(jax.device_put(params, sharding.shardings_of(abstract))))

    one = gradients(sharding.make_mesh())
    many = gradients(sharding.make_mesh(fsdp=2, expert=2, tensor=2))
    for (path, expected), ours in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True):
        name, scale = jax.tree_util.keystr(path), np.abs(expected).max()
        assert scale > 0, f"no gradient reaches {name}"
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * scale, err_msg=name)


DEEP = {
    "clip": ClipConfig(width=16, num_layers=8, num_heads=2, patch=8, image_size=64),
    "convnext": ConvNextConfig(depths=(8,), dims=(16,), kernel=3, image_size=32),
    "dino": DinoConfig(width=24, num_layers=8, num_heads=3, patch=8, image_size=64, position_grid=5),
    "qformer": QFormerConfig(
        vision_width=16, vision_layers=8, vision_heads=2, vision_mlp=64, patch=8, image_size=64,
        width=24, num_layers=8, num_heads=3, mlp=96, num_queries=32,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_remat_saves_memory_for_the_same_gradient(name):
    """With eight layers, remat stores each layer's input, and the activations of one layer at a time."""
    graph, params = random_params(VisionConfig(image_size=64, **dict.fromkeys(DEEP) | {name: DEEP[name]}))
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 64, 64, 3)), jnp.float32)
    results = {}
    for remat in ("none", "block"):

        def loss(params, remat=remat):
            return jnp.square(nnx.merge(graph, nnx.State(params))(images, remat=remat)).mean()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        results[remat] = compiled(params), compiled.memory_analysis().temp_size_in_bytes
    (expected, bytes_without), (grads, bytes_with) = results["none"], results["block"]
    assert bytes_with < bytes_without / 3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), grads, expected)
