"""The automaton against looking for the strings in the decoded text."""

from pathlib import Path

import numpy as np
import pytest

from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError
from sphinx_jax.inference.stop_strings import EOS_ONLY, FIRST, NEVER, STOPPED, TextStream, check_stops, stop_table

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

    def some():
        return random.choice(pieces, random.integers(0, 9)).tolist()

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
    assert (np.delete(table, [STOPPED, NEVER], axis=0)[:, tokenizer.eos_id] == STOPPED).all()
    others = np.delete(table, tokenizer.eos_id, axis=1)
    assert (others[1:] != STOPPED).all()


def cut(text, stops):
    """`text` up to where the first stop string begins."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@pytest.mark.parametrize("stops", [STOPS, ()], ids=["stops", "no stops"])
def test_a_stream_joined_is_the_text_cut(tokenizer, stops):
    """Whatever the chunking; and it counts the tokens up to the one that completes a stop string."""
    for number, answer in enumerate(random_answers(tokenizer)):
        end = first_stop(tokenizer, answer, stops)
        stream, step = TextStream(tokenizer, stops), 1 + number % 3
        pieces = [stream.push(answer[n : n + step]) for n in range(0, len(answer), step)]
        joined = "".join(pieces) + stream.finish()
        assert joined == cut(tokenizer.decode(answer[:end]), stops)
        assert stream.stopped == (end is not None) and stream.num_tokens == (end or len(answer))
        assert not any(stop in joined for stop in stops)


def test_text_is_certain_as_soon_as_no_stop_string_can_reach_it(tokenizer):
    stream = TextStream(tokenizer, ("END",))
    assert [stream.push([token]) for token in tokenizer.encode_wo_prefix_space("an E, not the ")][-1] != ""
    emoji = tokenizer.encode_wo_prefix_space("\N{CAT FACE}")
    assert len(emoji) > 1 and [stream.push([token]) for token in emoji] == [""] * (len(emoji) - 1) + ["\N{CAT FACE}"]


def test_only_eos_ends_a_raw_prompt_on_the_device(tokenizer):
    table = stop_table(tokenizer, tokenizer.vocab_size, STOPS[:1])
    assert (np.delete(table[EOS_ONLY], tokenizer.eos_id) == EOS_ONLY).all()
    assert table[EOS_ONLY, tokenizer.eos_id] == STOPPED


def test_a_stream_holds_back_what_may_become_a_stop_string(tokenizer):
    stream = TextStream(tokenizer, ("\n###",))
    tokens = tokenizer.encode_wo_prefix_space("yes\n##")
    assert stream.push(tokens) == "yes"
    assert stream.finish() == "\n##"


def test_impossible_stop_strings_are_refused():
    with pytest.raises(UserError, match="one character or more"):
        check_stops(["a", ""])
    with pytest.raises(UserError, match="must be a list"):
        check_stops("abc")
    with pytest.raises(UserError, match="600 bytes"):
        check_stops(["a" * 600])
    assert check_stops(["b", "a", "b"]) == ("b", "a")


def test_nothing_leaves_the_state_of_answers_that_only_their_limit_ends(tokenizer):
    table = stop_table(tokenizer, tokenizer.vocab_size, STOPS)
    assert (table[NEVER] == NEVER).all()
    assert table[EOS_ONLY, tokenizer.eos_id] == STOPPED


def test_an_answer_that_continues_a_text_keeps_the_space_it_begins_with(tokenizer):
    before, after = "there is", " a cat"
    tokens = tokenizer.encode(before + after, bos=False, eos=False)
    rest = tokens[len(tokenizer.encode(before, bos=False, eos=False)) :]
    stream = TextStream(tokenizer, (), continues=True)
    assert stream.push(rest) + stream.finish() == after
    stream = TextStream(tokenizer, ())
    assert stream.push(rest) + stream.finish() == after.strip()
