"""The automaton against looking for the strings in the decoded text."""

from pathlib import Path

import numpy as np
import pytest

from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError
from sphinx_jax.inference.stop_strings import FIRST, STOPPED, TextStream, check_stops, cut, stop_table

STOPS = ("\n###", " a cat", "aab", "ab", "日本", "###!")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(Path(__file__).parents[1] / "golden" / "tokenizer" / "tokenizer.model")


def random_answers(tokenizer, count=400):
    """Token sequences that often come near a stop string, bytes of broken characters among them."""
    texts = ["\n", "#", "##", "###", "a", " a", " cat", "c", "aa", "b", "日", "本", "日本", "!", "\n#", "at", "x", "🐱"]
    pieces = sorted({token for text in texts for token in tokenizer.encode_wo_prefix_space(text)})
    pieces += [tokenizer.bos_id, tokenizer.unk_id, 3 + 0xE6, 3 + 0x97, 3 + 0xA5]
    random = np.random.default_rng(0)
    some = lambda: random.choice(pieces, random.integers(0, 9)).tolist()

    def stop_in_parts():
        stop = STOPS[random.integers(len(STOPS))]
        cut = random.integers(len(stop) + 1)
        return [token for part in (stop[:cut], stop[cut:]) for token in tokenizer.encode_wo_prefix_space(part)]

    return [[*some(), *(stop_in_parts() if random.random() < 0.6 else []), *some(), 5] for _ in range(count)]


def first_stop(tokenizer, answer, stops):
    """How many tokens it takes until the text holds a stop string, or None."""
    for n in range(1, len(answer) + 1):
        if any(stop in tokenizer.decode(answer[:n]) for stop in stops):
            return n
    return None


def test_the_automaton_stops_at_the_token_that_completes_a_stop_string(tokenizer):
    table = stop_table(tokenizer, tokenizer.vocab_size + 7, STOPS)
    assert table.shape == (32, tokenizer.vocab_size + 7)
    found = 0
    for answer in random_answers(tokenizer):
        state, stopped = FIRST, None
        for n, token in enumerate(answer, start=1):
            state = table[state, token]
            if state == STOPPED:
                stopped = n
                break
        expected = first_stop(tokenizer, answer, STOPS)
        assert stopped == expected, (answer, tokenizer.decode(answer))
        found += expected is not None
    assert 150 < found < 350, "the random answers should stop often, and often not"


def test_end_of_sequence_stops_and_without_stop_strings_nothing_else_does(tokenizer):
    table = stop_table(tokenizer, tokenizer.vocab_size, ())
    assert (table[1:, tokenizer.eos_id] == STOPPED).all()
    others = np.delete(table, tokenizer.eos_id, axis=1)
    assert (others[1:] != STOPPED).all()


def test_a_stream_joined_is_the_text_cut(tokenizer):
    for number, answer in enumerate(random_answers(tokenizer)):
        end = first_stop(tokenizer, answer, STOPS)
        answer = answer[:end]
        stream, step = TextStream(tokenizer, STOPS), 1 + number % 3
        pieces = [stream.push(answer[: n + step]) for n in range(0, len(answer), step)]
        joined = "".join(pieces) + stream.finish()
        assert joined == cut(tokenizer.decode(answer), STOPS)
        assert not any(stop in joined for stop in STOPS)


def test_a_stream_holds_back_what_may_become_a_stop_string(tokenizer):
    stream = TextStream(tokenizer, ("\n###",))
    tokens = tokenizer.encode_wo_prefix_space("yes\n##")
    assert stream.push(tokens) == "yes"
    assert stream.finish() == "\n##"


def test_the_first_of_several_stop_strings_cuts():
    assert cut("one two three", ("three", "two")) == "one "
    assert cut("one", ("two",)) == "one"


def test_impossible_stop_strings_are_refused():
    with pytest.raises(UserError, match="one character or more"):
        check_stops(["a", ""])
    with pytest.raises(UserError, match="must be a list"):
        check_stops("abc")
    with pytest.raises(UserError, match="600 bytes"):
        check_stops(["a" * 600])
    assert check_stops(["b", "a", "b"]) == ("b", "a")
