"""Against the original's recorded probabilities, and plain numpy."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphinx_jax.errors import UserError
from sphinx_jax.inference.sampling import SamplingArrays, SamplingParams, nucleus, penalize, sample

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "sampling.npz")


@pytest.mark.parametrize("case", range(7))
def test_nucleus_is_the_originals(case):
    def take(name):
        return GOLDEN[f"case{case}_{name}"]

    # The cases made from probabilities have logits that are their logarithms.
    with np.errstate(divide="ignore"):
        logits = take("logits") if f"case{case}_logits" in GOLDEN else np.log(take("probs"))
    rows = len(logits)
    temperature, top_p = (jnp.full(rows, take(name), jnp.float32) for name in ("temperature", "top_p"))
    kept, order = nucleus(jnp.asarray(logits), temperature, top_p, jnp.zeros(rows, jnp.int32))
    expected = take("masked_sorted_probs")
    np.testing.assert_array_equal(np.asarray(kept) > 0, expected > 0)
    np.testing.assert_allclose(kept, expected, atol=2e-7)
    # Equal probabilities may come in any order; each rank must have that rank's probability.
    probabilities = take("probs")
    np.testing.assert_array_equal(
        np.take_along_axis(probabilities, np.asarray(order), -1),
        np.take_along_axis(probabilities, take("sorted_idx"), -1),
    )


def test_top_k_leaves_the_best_k_and_then_top_p_counts_among_them():
    logits = jnp.log(jnp.array([[0.4, 0.05, 0.3, 0.25]]))
    kept, order = nucleus(logits, jnp.ones(1), jnp.full(1, 0.5), jnp.array([2]))
    # Of 0.4 and 0.3, scaled to 4/7 and 3/7, the first alone passes one half.
    np.testing.assert_allclose(kept, [[1, 0, 0, 0]])
    kept, order = nucleus(logits, jnp.ones(1), jnp.ones(1), jnp.array([2]))
    np.testing.assert_allclose(kept, [[4 / 7, 3 / 7, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(order[:, :2], [[0, 2]])


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(penalize(logits, seen, jnp.full(1, 4.0)), [[0.5, -8, 2, -2]])


@jax.jit
def _sample(logits, seeds, count, sampling):
    return sample(logits, jnp.zeros(logits.shape, bool), seeds, count, sampling)


def drawn(logits, seeds, count, *params):
    """The next tokens of sequences with one setting each, or the same for all."""
    every = params if len(params) > 1 else params * len(logits)
    return _sample(logits, seeds, count, SamplingArrays.of(every))


def test_draws_follow_the_distribution_and_greedy_takes_the_best():
    probabilities = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    rows = 4000
    logits = np.tile(np.log(probabilities).astype(np.float32), (rows, 1))
    seeds = np.stack([np.full(rows, 3), np.arange(rows)], 1).astype(np.uint32)
    sampling = SamplingParams(temperature=0.5, top_p=0.99)
    counts = np.bincount(drawn(logits, seeds, np.zeros(rows, np.int32), sampling), minlength=5)
    # Temperature 1/2 squares the probabilities; the last then lies past 99 %.
    expected = probabilities**2 / (probabilities**2).sum()
    expected[-1] = 0
    expected *= rows / expected.sum()
    assert counts[-1] == 0
    chi_square = ((counts - expected)[:-1] ** 2 / expected[:-1]).sum()
    assert chi_square < 16.3, counts  # 99.9 % of three degrees of freedom
    greedy = drawn(logits, seeds, np.zeros(rows, np.int32), SamplingParams(temperature=0))
    assert not np.asarray(greedy).any()


def test_a_draw_depends_on_seed_request_and_step_and_not_on_the_slot():
    logits = np.zeros((4, 1000), np.float32)
    seeds = np.array([[1, 7], [2, 7], [1, 8], [1, 7]], np.uint32)
    sampling = SamplingParams(temperature=1, top_p=1)
    first = np.asarray(drawn(logits, seeds, np.array([0, 0, 0, 0], np.int32), sampling))
    later = np.asarray(drawn(logits, seeds, np.array([1, 0, 0, 2], np.int32), sampling))
    assert first[0] == first[3] and len(set(first[:3].tolist())) == 3
    np.testing.assert_array_equal(later[1:3], first[1:3])
    assert len({first[0], later[0], later[3]}) == 3


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("nan")},
    ],
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad)).replace("_", "[- ]")):
        SamplingParams(**bad)


def test_every_sequence_has_its_own_setting():
    """A mixed batch gives what each setting gives alone, greedy sequences included."""
    logits = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32) * 3
    seeds = np.stack([np.arange(5), np.arange(5)], 1).astype(np.uint32)
    count = np.arange(5, dtype=np.int32)
    params = [
        SamplingParams(),
        SamplingParams(temperature=1, top_p=1),
        SamplingParams(temperature=2, top_k=3, top_p=1),
        SamplingParams(temperature=0.7, top_p=0.5),
        SamplingParams(repetition_penalty=2),
    ]
    mixed = np.asarray(drawn(logits, seeds, count, *params))
    for i, own in enumerate(params):
        assert mixed[i] == np.asarray(drawn(logits, seeds, count, own))[i]
    assert mixed[0] == logits[0].argmax()


def test_a_tiny_temperature_is_greedy():
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    seeds = np.zeros((3, 2), np.uint32)
    tokens = drawn(logits, seeds, np.zeros(3, np.int32), SamplingParams(temperature=1e-30, top_p=1))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
