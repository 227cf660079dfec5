"""What the first round runs is known before it runs; threads that want the same program share its compilation."""

import threading
import time

import numpy as np
import pytest

from sharding import Program
from sphinx_jax.inference import generate
from sphinx_jax.inference.program_specs import Decode, Encode, Prefill, compile_specs
from sphinx_jax.inference.rehearsal import rehearse
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.scheduler import MIN_REUSED, Scheduler


def requests_about_images(model, num_images: int) -> list[Request]:
    """Three questions about each image, and one without."""
    random = np.random.default_rng(0)
    images = [model.prepare_image(pixels) for pixels in random.integers(0, 256, (num_images, 32, 32, 3), np.uint8)]
    params = SamplingParams(max_new_tokens=4)
    questions = [[1] * 10 + question for question in random.integers(3, 200, (3, 10)).tolist()]
    return [Request(question, image, params) for image in images for question in questions] + [
        Request(random.integers(3, 200, 70).tolist(), None, params)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", [{}, {"data": 2, "tensor": 2}], ids=str)
def test_a_rehearsal_names_what_the_first_round_runs(make_model, mesh_shape, monkeypatch):
    model = make_model(256, **mesh_shape)
    engine, requests = model.engine, requests_about_images(model, 3)
    shape = generate.state_shape(engine, 16, 128)
    specs = rehearse(engine, shape, requests)
    assert engine.compilations == engine.images_encoded == 0
    assert [type(spec) for spec in specs] == [Encode, Prefill, Prefill, Prefill, Decode]
    kinds = [(spec.has_image, spec.start) for spec in specs if isinstance(spec, Prefill)]
    assert sorted(kinds) == [(False, 0), (False, MIN_REUSED), (True, 0)]

    compile_specs(engine, shape, specs)
    compiled = engine.compilations
    used, original = set(), engine._run
    monkeypatch.setattr(engine, "_run", lambda key, *args: used.add(key) or original(key, *args))
    scheduler = Scheduler(engine, shape)
    for request in requests:
        scheduler.submit(request)
    scheduler.step()
    assert engine.compilations == compiled == len(used) == len(specs) + 1


def test_threads_wait_for_one_compilation(make_model, monkeypatch):
    """A failed one fails for all that wait, and is tried again."""
    engine, calls, original = make_model(252).engine, [], Program.compile

    def slow(self, args, mesh):
        calls.append(self)
        time.sleep(0.2)
        if len(calls) == 1:
            raise RuntimeError("no memory to compile")
        return original(self, args, mesh)

    monkeypatch.setattr(Program, "compile", slow)
    failures = []

    def compile_one():
        try:
            engine.compile_encoders(1)
        except RuntimeError as error:
            failures.append(str(error))

    for _ in range(2):
        threads = [threading.Thread(target=compile_one) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == ["no memory to compile"] * 3
    assert len(calls) == 2 and engine.compilations == 1
