"""Batch slots that data-parallel groups split: where in a chunk each request goes."""

import random

import pytest

from sphinx_jax.inference.bucketing import BATCHES
from sphinx_jax.inference.data_parallel import assign, group_of, round_up_to_groups


def test_slots_are_rounded_up_to_whole_groups():
    assert [round_up_to_groups(count, 1) for count in (1, 3, 8)] == [1, 3, 8]
    assert [round_up_to_groups(count, 4) for count in (1, 4, 5, 64)] == [4, 4, 8, 64]


def test_one_group_gets_its_prompts_in_order_and_padding_after_them():
    assert assign([5, 0, 7], groups=1, num_slots=8, sizes=BATCHES) == [0, 1, 2, None]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_prompt_goes_to_the_group_that_holds_its_slot(groups):
    draw = random.Random(groups)
    for _ in range(200):
        num_slots = groups * draw.randint(1, 6)
        slots = draw.sample(range(num_slots), draw.randint(1, num_slots))
        places = assign(slots, groups, num_slots, BATCHES)
        each = len(places) // groups
        assert len(places) == groups * each and each in BATCHES
        assert sorted(i for i in places if i is not None) == list(range(len(slots)))
        for place, i in enumerate(places):
            assert i is None or group_of(slots[i], groups, num_slots) == place // each
        # No smaller size would do for the group with most of them.
        most = max(sum(group_of(slot, groups, num_slots) == group for slot in slots) for group in range(groups))
        assert most <= each and all(size < most for size in BATCHES if size < each)
