"""Tokens per expert, counted on the device, against numpy's count of what each router gave."""

import jax.numpy as jnp
import numpy as np
import pytest

from sphinx_jax.inference.expert_load import KINDS
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.model import bind

TEXTS = [[1, 20, 31], [1, 9, 9, 40, 50, 60, 77], [1, 5]]


def counted(model, text, image):
    """[layers, kinds, experts] of one text, from the router's logits."""
    k, graph = model.config.language.experts_per_token, model.engine._programs.graph
    module = bind(graph, model._params)
    images = None if image is None else jnp.asarray(image.normalised())[None]
    x = module.embed(jnp.asarray([text]), None if images is None else module.encode_images(images))
    _, _, layers = module.language(x, jnp.arange(x.shape[1])[None], Causal())
    is_image = np.zeros(x.shape[1], bool)
    is_image[1 : 1 + x.shape[1] - len(text)] = True
    result = np.zeros((len(layers), 2, model.config.language.num_experts), int)
    for i, layer in enumerate(layers):
        chosen = np.argsort(-np.asarray(layer["routing"].logits[0]), axis=-1)[:, :k]
        for kind, mask in enumerate((is_image, ~is_image)):
            result[i, kind] = np.bincount(chosen[mask].ravel(), minlength=result.shape[2])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, {"data": 2, "tensor": 4}])
def test_every_assignment_is_counted_once(make_model, images, shape):
    model, whole = make_model(**shape), make_model()
    prepared = [whole.prepare_image(image) for image in images]
    with_images = model.engine.expert_load(TEXTS, prepared)
    without = model.engine.expert_load(TEXTS, None)
    np.testing.assert_array_equal(
        with_images, sum(counted(whole, text, image) for text, image in zip(TEXTS, prepared, strict=True))
    )
    np.testing.assert_array_equal(without, sum(counted(whole, text, None) for text in TEXTS))
    k, tokens = model.config.language.experts_per_token, sum(map(len, TEXTS))
    assert KINDS == ("image", "text") and not without[:, 0].any()
    assert (with_images[:, 0].sum(-1) == k * 3 * model.config.num_image_tokens).all()
    assert (with_images[:, 1].sum(-1) == k * tokens).all()
