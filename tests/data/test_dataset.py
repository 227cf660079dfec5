"""The order and the position of endless batches."""

import numpy as np

from sphinx_jax.data.dataset import batches


def test_every_index_comes_once_an_epoch_in_an_order_of_its_own():
    iterator = batches(12, lambda indices, random: {"indices": np.array(indices)}, batch_size=4, seed=3)
    epochs = [np.concatenate([next(iterator)["indices"] for _ in range(3)]) for _ in range(4)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(12))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_randomness_depends_on_seed_and_position_alone():
    def make(seed):
        return batches(10, lambda indices, random: {"x": random.random(len(indices))}, 5, seed)

    one, two, other = make(1), make(1), make(2)
    drawn = [next(one)["x"] for _ in range(6)]
    assert len({tuple(x.tolist()) for x in drawn}) == 6
    assert not np.array_equal(drawn[0], next(other)["x"])
    two.set_state(one.get_state())
    np.testing.assert_array_equal(next(one)["x"], next(two)["x"])


def test_fewer_examples_than_a_batch_repeat():
    iterator = batches(3, lambda indices, random: {"indices": np.array(indices)}, batch_size=6, seed=0)
    assert np.bincount(next(iterator)["indices"]).tolist() == [2, 2, 2]
