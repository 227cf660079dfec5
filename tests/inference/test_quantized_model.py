"""Quantized models: bytes, accuracy, and the same numbers on every mesh."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
import sphinx_jax
from sphinx_jax.config import preset
from sphinx_jax.data import easy_vqa
from sphinx_jax.errors import UserError
from sphinx_jax.model import SphinxMoE
from sphinx_jax.quantization import abstract_quantized, abstract_quantized_params


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.55), ("int4", 0.34)])
def test_bytes_of_the_real_model(kind, most):
    """Encoders and embedding included, which stay as they are; on 8 devices each holds its eighth."""
    mesh = sharding.make_mesh(tensor=8)
    _, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(preset("sphinx-moe"), unstacked=True, rngs=rngs), mesh, dtype=jnp.bfloat16
    )
    quantized = abstract_quantized_params(params, kind)

    def total(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    assert total(quantized) <= most * total(params)
    assert sharding.bytes_per_device(quantized) == pytest.approx(total(quantized) / 8, rel=0.01)


@pytest.mark.slow
def test_accuracy_of_nano():
    """Within half a point of float32 on 600 held-out questions in int8; docs/quantization-and-offload.md has int4."""
    records = [(record, question) for record in easy_vqa.load("test") for question in record.questions][:600]
    questions = [question.text for _, question in records]
    images = [easy_vqa.image_file("test", record.id) for record, _ in records]
    mesh = sharding.make_mesh()

    def accuracy(**options):
        model = sphinx_jax.load(sphinx_jax.SHIPPED, mesh, max_model_len=256, **options)
        answers = model.generate(questions, images, max_new_tokens=8)
        return np.mean([given == question.answer for given, (_, question) in zip(answers, records, strict=True)])

    assert accuracy(quantize="int8") >= accuracy() - 0.005
    assert accuracy(quantize="int4") >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("int8", {"tensor": 2, "expert": 2, "fsdp": 2}), ("int4", {"tensor": 2, "expert": 2, "data": 2})],
)
def test_every_mesh_rounds_alike(kind, shape):
    """int4 also where a device has half of a matrix's groups."""
    tokens = np.array([[1, 5, 9, 20, 33, 7]])
    logits = [
        np.asarray(sphinx_jax.load(sphinx_jax.SHIPPED, mesh, quantize=kind).logits(tokens))
        for mesh in (sharding.make_mesh(), sharding.make_mesh(**shape))
    ]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_a_byte_is_not_split():
    mesh = sharding.make_mesh(fsdp=2)
    weights = jax.ShapeDtypeStruct(
        (64, 6), "float32", sharding=sharding.named_sharding(("mlp", "embed"), (64, 6), mesh)
    )
    with pytest.raises(UserError, match="leaves 3 of w_out's 6 outputs to a device: use a smaller mesh, or int8"):
        abstract_quantized(("language", "w_out"), weights, "int4")
    assert abstract_quantized(("language", "w_out"), weights, "int8").shape == (64, 6)


def test_what_cannot_be():
    # As a user has it, without the check of annotations.
    load = inspect.unwrap(sphinx_jax.load)
    with pytest.raises(UserError, match="choose one of int8, int4"):
        load(sphinx_jax.SHIPPED, quantize="int2")
    with pytest.raises(UserError, match=r"rounds 32 of .* 192 values together, .* into 4 shards: use a smaller mesh"):
        sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(tensor=4), quantize="int4")
