"""Rows that devices share out: which of them are filled, and where in a chunk their prompts stand."""

import random

import pytest

from sphinx_jax.inference.data_parallel import deal, round_robin, round_up_to_groups


def test_rows_are_filled_up_to_whole_groups():
    assert [round_up_to_groups(rows, 1) for rows in (1, 3, 8)] == [1, 3, 8]
    assert [round_up_to_groups(rows, 4) for rows in (1, 4, 5, 64)] == [4, 4, 8, 64]


def test_groups_take_turns():
    assert round_robin([1, 2, 3, 5, 6], groups=2, of=8, each=2) == [1, 5, 2, 6]
    assert round_robin([1, 2, 3, 5], groups=2, of=8, each=16) == [1, 5, 2, 3]
    assert round_robin([0, 1, 2], groups=1, of=4, each=2) == [0, 1]


def test_one_group_gets_its_prompts_in_order_and_padding_behind():
    assert deal([5, 0, 7], groups=1, of=8) == [0, 1, 2, None]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_prompt_stands_with_the_group_that_has_its_row(groups):
    draw = random.Random(groups)
    for _ in range(200):
        of = groups * draw.randint(1, 6)
        rows = draw.sample(range(of), draw.randint(1, of))
        places = deal(rows, groups, of)
        each = len(places) // groups
        assert len(places) == groups * each and each & (each - 1) == 0
        assert sorted(i for i in places if i is not None) == list(range(len(rows)))
        for place, i in enumerate(places):
            assert i is None or rows[i] // (of // groups) == place // each
        # No smaller one would do for the group with most of them.
        most = max(sum(row // (of // groups) == group for row in rows) for group in range(groups))
        assert most <= each < 2 * most
