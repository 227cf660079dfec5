"""Scripted routing: which experts are copied, in which order they compute, and how many are on the devices."""

import jax
import numpy as np
import pytest

from sphinx_jax.inference.expert_cache import SPARE, ExpertCache, best_fit, expected_copies, experts_that_fit, quotas

NUM_LAYERS, NUM_EXPERTS = 3, 8
SIZE = 1000


def make_cache() -> ExpertCache:
    """Expert i of a layer is an array of the number 10 layer + i."""
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return ExpertCache(
        [
            [{"w": jax.device_put(np.full(SIZE, 10 * layer + i, np.float32), host)} for i in range(NUM_EXPERTS)]
            for layer in range(NUM_LAYERS)
        ]
    )


def num_on_device() -> int:
    return sum(a.shape == (SIZE,) and a.sharding.memory_kind == "device" for a in jax.live_arrays())


class Recorder:
    """`run` of `ExpertCache.compute`: the sum of what the experts hold, in the order in which they compute."""

    def __init__(self, layer: int):
        self.layer, self.order, self.most = layer, [], 0

    def __call__(self, i, expert, x):
        assert expert["w"].sharding.memory_kind == "device"
        np.testing.assert_array_equal(expert["w"], 10 * self.layer + i)
        self.order.append(i)
        self.most = max(self.most, num_on_device())
        return x + expert["w"][0]


def compute(cache, layer, selected):
    recorder = Recorder(layer)
    total = cache.compute(layer, selected, recorder, jax.numpy.float32(0))
    assert float(total) == sum(10 * layer + i for i in selected)
    return recorder


def test_scripted_routing():
    """Two experts a layer are kept. By hand: the order of computing, hits first, and the misses."""
    cache = make_cache()
    cache.resize(2 * NUM_LAYERS)
    script = [  # selected, order, misses
        ((0, 1), [0, 1], 2),
        ((0, 1), [0, 1], 0),
        ((0, 2), [0, 2], 1),  # 1 is dropped
        ((1, 2), [2, 1], 1),  # 0 is dropped
        ((3, 4), [3, 4], 2),
        ((0, 1, 2, 3, 4, 5), [3, 4, 0, 1, 2, 5], 4),  # 2 and 5 stay
        ((2,), [2], 0),
        ((5, 6), [5, 6], 1),  # 2, used before 5, is dropped
        ((2,), [2], 1),
    ]
    for layer in range(NUM_LAYERS):
        for selected, order, misses in script:
            before = cache.misses
            recorder = compute(cache, layer, selected)
            assert (recorder.order, cache.misses - before) == (order, misses)
    assert cache.misses == NUM_LAYERS * sum(misses for _, _, misses in script)
    assert cache.misses + cache.hits == NUM_LAYERS * sum(len(selected) for selected, _, _ in script)
    assert cache.bytes_copied == cache.misses * 4 * SIZE and cache.expert_bytes == 4 * SIZE


@pytest.mark.parametrize("kept", [0, 1, 4, 6, 13, NUM_LAYERS * NUM_EXPERTS])
def test_random_routing(kept):
    """Against a list of what was used last, written from the definition; and how many are on the devices."""
    cache, random, used, misses = make_cache(), np.random.default_rng(kept), [[] for _ in range(NUM_LAYERS)], 0
    cache.resize(kept)
    for _ in range(12):
        for layer in range(NUM_LAYERS):
            selected = sorted(random.choice(NUM_EXPERTS, random.integers(1, NUM_EXPERTS + 1), replace=False).tolist())
            quota = kept // NUM_LAYERS + (layer < kept % NUM_LAYERS)
            last = used[layer][-quota:] if quota else []
            new = [i for i in selected if i not in last]
            order = [i for i in selected if i in last] + new
            used[layer] = [i for i in used[layer] if i not in order] + order
            misses += len(new)
            recorder = compute(cache, layer, selected)
            assert recorder.order == order
            assert recorder.most <= kept + SPARE
            assert num_on_device() <= kept and cache.device_bytes == num_on_device() * cache.expert_bytes
    assert cache.misses == misses
    cache.resize(min(kept, 2))
    assert num_on_device() <= 2


def test_copies_run_while_experts_that_are_there_compute():
    """Copies are started before a computation, for as many as there are places."""
    cache, started = make_cache(), []
    cache.resize(NUM_LAYERS * 2)
    compute(cache, 0, [0, 1])
    cache.compute(0, [0, 4, 5, 6], lambda i, _, x: started.append((i, num_on_device())) or x, None)
    # 0 computes with 4, 5 and 6 on the way; 1 is not needed and gives its place.
    assert started == [(0, 4), (4, 4), (5, 4), (6, 4)]


def test_expected_copies():
    """The mean over uniform routing, drawn; and the two ends."""
    cache, random, steps = make_cache(), np.random.default_rng(0), 400
    cache.resize(10)
    for tokens in (1, 3):
        before = cache.misses
        for _ in range(steps):
            for layer in range(NUM_LAYERS):
                chosen = [random.choice(NUM_EXPERTS, 2, replace=False) for _ in range(tokens)]
                cache.compute(layer, np.unique(chosen).tolist(), lambda i, _, x: x, None)
        mean = (cache.misses - before) / steps
        assert mean == pytest.approx(expected_copies(tokens, 10, NUM_LAYERS, NUM_EXPERTS, 2), rel=0.05)
    assert expected_copies(1, 0, NUM_LAYERS, NUM_EXPERTS, 2) == 2 * NUM_LAYERS
    assert expected_copies(9, NUM_LAYERS * NUM_EXPERTS, NUM_LAYERS, NUM_EXPERTS, 2) == 0


def test_fit():
    assert [experts_that_fit(size, 100, 8) for size in (-1, 0, 250, 399, 799, 800, 5000)] == [0, 0, 0, 1, 5, 8, 8]
    assert quotas(10, 4) == [3, 3, 2, 2]
    # Encoders stay where they make no room for another expert, or where all experts fit.
    assert best_fit(450, 100, 8, encoder_bytes=40) == (2, False)
    assert best_fit(450, 100, 8, encoder_bytes=50) == (3, True)
    assert best_fit(800, 100, 8, encoder_bytes=500) == (8, False)
