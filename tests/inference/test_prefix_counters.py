"""Questions about easy-vqa's images: how many positions are computed and how many are copied, by the counters."""

import collections
import json
import random

import pytest

import sharding
import sphinx_jax
from sphinx_jax.data import easy_vqa
from sphinx_jax.inference import scheduler as scheduler_module
from sphinx_jax.inference.scheduler import Scheduler

NUM_IMAGES = 100


@pytest.fixture(scope="module")
def model():
    return sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), "float32", max_model_len=256)


@pytest.fixture(scope="module")
def lines():
    """(number of the image, line of the file), questions about an image next to each other."""
    test = easy_vqa.load("test")
    rows = [(i, question.text) for i in range(NUM_IMAGES) for question in test[i].questions]
    names = [str(easy_vqa.image_file("test", test[i].id)) for i in range(NUM_IMAGES)]
    return [(i, {"id": number, "image": names[i], "prompt": question}) for number, (i, question) in enumerate(rows)]


@pytest.fixture
def counted(model, monkeypatch, tmp_path):
    """counted(rows, prefixes): (positions computed, copied, of all prompts; positions of a prefix)."""
    made = []
    original = Scheduler.__init__
    monkeypatch.setattr(
        scheduler_module.Scheduler, "__init__", lambda self, *args: made.append(self) or original(self, *args)
    )

    def run(rows, prefixes):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for _, row in rows))
        engine = model.engine
        prefix_bytes = prefixes * engine.cache_bytes(engine.prefix_len(96))
        out = tmp_path / f"{prefixes}.jsonl"
        list(model.answer_file(tmp_path / "in.jsonl", out, max_new_tokens=2, prefix_bytes=prefix_bytes))
        (scheduler,) = made
        made.clear()
        prompts = [model.request(row["prompt"]).tokens for _, row in rows]
        template = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
        prefix = template + model.config.num_image_tokens
        total = sum(len(tokens) + model.config.num_image_tokens for tokens in prompts)
        assert scheduler.shape.num_prefixes == prefixes
        return scheduler.tokens_prefilled, scheduler.tokens_reused, total, prefix

    return run


def test_an_image_is_computed_once(counted, lines):
    computed, copied, total, prefix = counted(lines, 64)
    assert computed + copied == total
    rest = total - len(lines) * prefix
    # Questions may share more than the image and the template: their first tokens.
    assert copied >= (len(lines) - NUM_IMAGES) * prefix
    assert computed <= NUM_IMAGES * prefix + rest


@pytest.mark.slow
def test_shuffled_with_a_pool_of_a_tenth_of_the_images(counted, lines):
    """No fewer are found than a pool that forgets the least recently used of so many images finds."""
    shuffled = random.Random(0).sample(lines, len(lines))
    computed, copied, total, prefix = counted(shuffled, NUM_IMAGES // 10)
    assert computed + copied == total
    pool, hits = collections.OrderedDict(), 0
    for image, _ in shuffled:
        hits += image in pool
        pool[image] = None
        pool.move_to_end(image)
        if len(pool) > NUM_IMAGES // 10:
            pool.popitem(last=False)
    assert copied >= hits * prefix > 0
