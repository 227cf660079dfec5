"""Training sequences of easy-vqa: each conversation trains as if alone, and batches depend on the seed alone."""

import collections
import json

import jax.numpy as jnp
import numpy as np
import pytest

from sphinx_jax.data import easy_vqa, easy_vqa_sequences
from sphinx_jax.data.conversation import Conversation
from sphinx_jax.data.easy_vqa import Question
from sphinx_jax.data.easy_vqa_sequences import SegmentTokenizer, draw_conversations, join_segments
from sphinx_jax.errors import UserError
from sphinx_jax.language.kv_cache import segment_mask, segment_positions

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions.\n\n"
)


def test_a_segment_has_the_tokens_and_labels_of_the_conversation_alone(train, small):
    segments = SegmentTokenizer(small)
    distinct = sorted({question for _, question in train.pairs()})
    assert len(distinct) > 250
    for question in distinct:
        tokens, labels = segments.segment([question])
        prompt = f"{SYSTEM}### Human: {question.text}\n### Assistant:"
        prompt_tokens = small.encode(prompt, bos=True, eos=False)
        all_tokens = small.encode(f"{prompt} {question.answer}\n###", bos=True, eos=False)
        assert [*segments.prefix, *tokens] == all_tokens
        with_loss = all_tokens[len(prompt_tokens) :]
        assert labels.tolist() == [0] * (len(tokens) - len(with_loss)) + with_loss


CONVERSATIONS = [
    [Question("what shape is present?", "circle")],
    [Question("Is it red", "no"), Question("and blue?", "yes")],
    [Question("is there a teal shape?", "no")],
]


def test_conversations_of_one_sequence_train_as_if_alone(small):
    segments = SegmentTokenizer(small)
    examples = [segments.segment(conversation) for conversation in CONVERSATIONS]
    length = len(segments.prefix) + sum(len(example.tokens) for example in examples) + 5
    tokens, labels, ids = join_segments(segments.prefix, examples, length, padding_segment=9)
    on_device = jnp.asarray(ids[None])
    mask, positions = np.array(segment_mask(on_device))[0], np.array(segment_positions(on_device))[0]
    for number, conversation in enumerate(CONVERSATIONS, start=1):
        alone = Conversation.from_pairs(conversation).example(small)
        last = np.flatnonzero(ids == number)[-1]
        assert tokens[mask[last]].tolist() == alone.tokens[:-1].tolist()
        assert positions[mask[last]].tolist() == list(range(len(alone.tokens) - 1))
        # The token before a label, whose logits predict it, is in the same segment.
        assert (ids[np.flatnonzero(labels) - 1] == ids[np.flatnonzero(labels)]).all()
        assert labels[ids == number].tolist() == alone.labels[len(segments.prefix) : -1].tolist()
    padding = ids == 9
    assert padding.sum() == 5 and not labels[padding].any() and not labels[ids == 0].any()
    assert not mask[np.ix_(~padding, padding)].any()


def test_segments_that_do_not_fit_are_left_out(small):
    segments = SegmentTokenizer(small)
    one, two = (segments.segment(conversation) for conversation in CONVERSATIONS[:2])
    length = len(segments.prefix) + len(one.tokens) + len(two.tokens) - 1
    _, labels, ids = join_segments(segments.prefix, [one, two], length, padding_segment=3)
    assert set(ids.tolist()) == {0, 1, 3} and (labels[ids == 3] == 0).all()


def test_drawn_conversations_have_originals_phrasings_and_later_turns(train):
    random = np.random.default_rng(0)
    originals, others, turns = 0, 0, collections.Counter()
    for questions in train.questions[:200]:
        drawn = draw_conversations(questions, easy_vqa.known_attributes(questions), 4, random)
        turns.update(map(len, drawn))
        for question in (question for conversation in drawn for question in conversation):
            plain = question.text.lower().rstrip("?!. ").replace("  ", " ")
            original = next((q for q in questions if q.text.rstrip("?") == plain), None)
            assert original is None or original.answer == question.answer
            originals, others = originals + (original is not None), others + (original is None)
    assert 0.4 < originals / (originals + others) < 0.75
    assert set(turns) == {1, 2, 3} and turns[1] > turns[2] + turns[3] > 100


@pytest.fixture(scope="module")
def make(train, nano_tokenizer):
    some = train.select(range(0, 4000, 40))
    return lambda seed: easy_vqa_sequences.train_batches(
        some, nano_tokenizer, 16, seed, max_length=150, conversations_per_image=4
    )


def test_batches(make, nano_tokenizer):
    batches = make(0)
    for _ in range(3):
        batch = next(batches)
        assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
            "images": ("uint8", (16, 64, 64, 3)),
            **dict.fromkeys(("tokens", "labels", "segment_ids"), ("int32", (16, 150))),
            **dict.fromkeys(("shape", "colour"), ("int32", (16,))),
            "examples": ("int64", (16,)),
        }
        has_loss = batch["labels"] != 0
        assert (batch["labels"][has_loss] == batch["tokens"][has_loss]).all()
        assert set(np.unique(batch["segment_ids"])) <= {0, 1, 2, 3, 4, 5}
        for tokens, ids, shape, colour in zip(
            *(batch[name] for name in ("tokens", "segment_ids", "shape", "colour")), strict=True
        ):
            for number in range(1, 5):
                text = nano_tokenizer.decode(tokens[ids == number].tolist())
                answers = [part.split("\n###")[0].strip() for part in text.split("### assistant:")[1:]]
                # Every answer that is no yes or no is what the image shows.
                shown = {easy_vqa.SHAPES[shape] if shape >= 0 else "", easy_vqa.COLOURS[colour] if colour >= 0 else ""}
                assert "" in shown or set(answers) - {"yes", "no"} <= shown


def test_batches_are_the_same_for_the_same_seed_and_resume(make):
    batches, again, other = make(5), make(5), make(6)
    first = [next(batches) for _ in range(8)]
    assert_equal(first[0], next(again))
    assert not np.array_equal(first[0]["tokens"], next(other)["tokens"])
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(8)]
    again.set_state(state)
    for batch in expected:
        assert_equal(batch, next(again))


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, two[key])


def test_no_room_for_a_question_is_an_error(train, small):
    some = train.select(range(3))
    with pytest.raises(UserError, match="maximum length 40"):
        easy_vqa_sequences.train_batches(some, small, 2, 0, max_length=40, conversations_per_image=2)


def test_held_out_sequences_hold_every_original_question(held_out, nano_tokenizer):
    some = held_out.select(range(5))
    sequences = easy_vqa_sequences.held_out_sequences(some, nano_tokenizer)
    for sequence, questions in zip(sequences, some.questions, strict=True):
        for number, question in enumerate(questions, start=1):
            text = nano_tokenizer.decode(sequence.tokens[sequence.segment_ids == number].tolist())
            assert text == f"human: {question.text}\n### assistant: {question.answer}\n###"


def test_augmentation_only_mirrors_and_shifts():
    random = np.random.default_rng(0)
    image = np.full((20, 24, 3), (200, 210, 220), np.uint8)
    image[8:11, 9:15] = random.integers(0, 100, (3, 6, 3))
    mirrored = collections.Counter()
    shifts = set()
    for _ in range(40):
        for out in easy_vqa_sequences.augment(np.stack([image] * 8), random):
            top, left = (np.flatnonzero((out < 150).all(-1).any(axis)).min() for axis in (1, 0))
            block = out[top : top + 3, left : left + 6]
            assert (out == image[0, 0]).all(-1).sum() == 20 * 24 - 18
            straight = np.array_equal(block, image[8:11, 9:15])
            assert straight or np.array_equal(block, image[8:11, 14:8:-1])
            mirrored[straight] += 1
            shifts.add((int(top) - 8, int(left) - 9))
    assert 120 < mirrored[True] < 200
    assert {abs(step) for shift in shifts for step in shift} == {0, 1, 2, 3, 4}


def test_background_is_found_when_a_shape_covers_a_corner():
    for shade in (0, 255):
        image = np.full((1, 20, 20, 3), 128, np.uint8)
        image[0, :6, :6] = shade
        for _ in range(10):
            out = easy_vqa_sequences.augment(image, np.random.default_rng(0))
            assert set(np.unique(out)) <= {shade, 128} and (out == shade).all(-1).sum() <= 36
