"""What a question takes is compiled while the weights are read."""

import threading
import time

import numpy as np
import pytest

import sharding
import sphinx_jax
from sphinx_jax import SHIPPED, UserError
from sphinx_jax.checkpoints import reader

QUESTION = "what shape is in the image?"


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, {"tensor": 2, "expert": 2, "fsdp": 2}], ids=str)
@pytest.mark.parametrize("has_image", [True, False])
def test_a_question_compiles_nothing_more_once_the_weights_are_there(image, shape, has_image):
    mesh = sharding.make_mesh(**shape) if shape else None
    own_image = image if has_image else None
    compiled = []

    def prepare(model):
        model.compile_for(QUESTION, has_image, max_new_tokens=4)
        compiled.append(model.engine.compilations)

    model = sphinx_jax.load(SHIPPED, mesh, compile_for=prepare)
    assert compiled == [model.engine.compilations] == [4 if has_image else 3]
    answer = list(model.stream(QUESTION, own_image, max_new_tokens=4))
    assert [model.engine.compilations] == compiled
    assert model.engine.images_encoded == has_image
    assert answer == list(sphinx_jax.load(SHIPPED, mesh).stream(QUESTION, own_image, max_new_tokens=4))


def test_what_is_wrong_with_the_question_is_said_before_the_weights_are_read(monkeypatch):
    wrong, read, count = threading.Event(), reader.CheckpointReader.read, []

    def prepare(model):
        try:
            model.compile_for(QUESTION * 20, False)
        finally:
            wrong.set()

    def slow(reader, path):
        assert wrong.wait(60)
        count.append(path)
        # The thread ends a moment after its last line.
        time.sleep(0.1)
        return read(reader, path)

    monkeypatch.setattr(reader.CheckpointReader, "read", slow)
    with pytest.raises(UserError, match="--max-model-len"):
        sphinx_jax.load(SHIPPED, max_model_len=20, compile_for=prepare)
    assert len(count) == 1
