"""Training sequences of easy-vqa: several conversations about one image in one sequence.

Each conversation is a segment. It attends to the shared prefix (segment 0) and to itself (`kv_cache.segment_mask`), so
it trains exactly as if it were alone, while the image and the prefix are computed once.
"""

from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Int, UInt8

from sphinx_jax.data import easy_vqa_phrasings
from sphinx_jax.data.conversation import IGNORE_INDEX, PADDING, Conversation, Example
from sphinx_jax.data.dataset import Batch, batches
from sphinx_jax.data.easy_vqa import COLOURS, SHAPES, Records, known_attributes
from sphinx_jax.data.easy_vqa_phrasings import KnownAttributes, Question, rephrase
from sphinx_jax.data.packing import Packed
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError

_MAX_SHIFT = 4
_LATER_TURNS_PROBABILITY = 0.25
"""Of a conversation having two or three questions instead of one."""
_REPHRASED_PROBABILITY = 0.4
_SURFACE_PROBABILITY = 0.5
"""Of other case, punctuation or spaces than easy-vqa's."""


class SegmentTokenizer:
    """Tokenises conversations without the prefix that is common to all: BOS and the template's beginning."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.prefix = np.asarray(tokenizer.encode(Conversation(()).text(), bos=True, eos=False), np.int32)

    def segment(self, questions: Sequence[Question]) -> Example:
        """Tokens and labels that follow the prefix, without EOS, which has no loss.

        Raises ValueError if a piece of the tokenizer crosses the end of the prefix.
        """
        example = Conversation.from_pairs(questions).example(self._tokenizer)
        start = len(self.prefix)
        if not np.array_equal(example.tokens[:start], self.prefix):
            raise ValueError("a piece of the tokenizer crosses the border between the prefix and a turn")
        return Example(example.tokens[start:-1], example.labels[start:-1])


def join_segments(
    prefix: Int[np.ndarray, "shared"], segments: Sequence[Example], max_length: int, padding_segment: int
) -> Packed:
    """The prefix and the segments in one sequence, padded to `max_length`.

    labels[i] is tokens[i] where it has loss and IGNORE_INDEX elsewhere, not shifted: the logits at i - 1 predict
    labels[i]. The prefix has segment id 0, the segments 1, 2, ..., padding `padding_segment`, so that none attends to
    another. Segments that no longer fit are left out.
    """
    tokens = np.full(max_length, PADDING, np.int32)
    labels = np.full(max_length, IGNORE_INDEX, np.int32)
    segment_ids = np.full(max_length, padding_segment, np.int32)
    end = len(prefix)
    tokens[:end], segment_ids[:end] = prefix, 0
    for number, segment in enumerate(segments, start=1):
        start, end = end, end + len(segment.tokens)
        if end > max_length:
            break
        tokens[start:end], labels[start:end], segment_ids[start:end] = segment.tokens, segment.labels, number
    return Packed(tokens, labels, segment_ids)


def draw_conversations(
    questions: Sequence[Question], known: KnownAttributes, count: int, random: np.random.Generator
) -> list[list[Question]]:
    """`count` conversations about one image, each of one to three questions with their answers.

    The questions are the image's own, each at most once, or phrasings of `easy_vqa_phrasings`; case, punctuation and
    spaces vary. Fewer conversations if the questions run out. `random` alone decides.
    """
    originals = [questions[i] for i in random.permutation(len(questions))]
    conversations = []
    for _ in range(count):
        num_turns = int(random.integers(2, 4)) if random.random() < _LATER_TURNS_PROBABILITY else 1
        turns = []
        for turn in range(num_turns):
            drawn = rephrase(known, random, later=turn > 0) if random.random() < _REPHRASED_PROBABILITY else None
            drawn = drawn or (originals.pop() if originals else None)
            if drawn is None:
                break
            varied = random.random() < _SURFACE_PROBABILITY
            text = easy_vqa_phrasings.vary_surface(drawn.text, random) if varied else drawn.text
            turns.append(Question(text, drawn.answer))
        if turns:
            conversations.append(turns)
    return conversations


def augment(
    images: UInt8[np.ndarray, "batch height width 3"], random: np.random.Generator
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Each image mirrored or not, and shifted by up to 4 pixels each way; the uncovered border is background."""
    batch, height, width, _ = images.shape
    mirrored = random.random(batch) < 0.5
    offsets = random.integers(0, 2 * _MAX_SHIFT + 1, (batch, 2))
    # A shape may cover one corner, hardly two: of the four, the second smallest value is the background's.
    background = np.sort(images[:, [0, 0, -1, -1], [0, -1, 0, -1]], axis=1)[:, 1]
    canvas = np.empty((batch, height + 2 * _MAX_SHIFT, width + 2 * _MAX_SHIFT, 3), np.uint8)
    # Rows of bytes, because numpy broadcasts the three bytes of a pixel slowly.
    canvas.reshape(batch, canvas.shape[1], -1)[:] = np.tile(background, canvas.shape[2])[:, None]
    canvas[:, _MAX_SHIFT:-_MAX_SHIFT, _MAX_SHIFT:-_MAX_SHIFT] = images
    out = np.empty_like(images)
    for i, (top, left) in enumerate(offsets):
        shifted = canvas[i, top : top + height, left : left + width]
        out[i] = shifted[:, ::-1] if mirrored[i] else shifted
    return out


def sequence_length(records: Records, tokenizer: Tokenizer, conversations_per_image: int) -> int:
    """A `max_length` that holds all conversations of 19 in 20 images: padding costs more than what is left out.

    Measured on 400 images with draws of its own, so the same for every seed.
    """
    segments = SegmentTokenizer(tokenizer)
    random = np.random.default_rng(0)
    lengths = []
    for questions in records.questions[:400]:
        drawn = draw_conversations(questions, known_attributes(questions), conversations_per_image, random)
        lengths.append(sum(len(segments.segment(conversation).tokens) for conversation in drawn))
    longest = max(len(segments.segment([question]).tokens) for _, question in records.pairs())
    return len(segments.prefix) + max(int(np.quantile(lengths, 0.95)), longest)


def train_batches(
    records: Records, tokenizer: Tokenizer, batch_size: int, seed: int, max_length: int, conversations_per_image: int
) -> grain.DatasetIterator[Batch]:
    """An endless, resumable iterator of training batches; the same seed gives the same batches.

    Each batch: "images" uint8[B, 64, 64, 3], augmented; "tokens", "labels" and "segment_ids" int32[B, max_length] as
    `join_segments` makes them, of up to `conversations_per_image` conversations; "shape" and "colour" int32[B], indices
    into SHAPES and COLOURS, or -1 where the questions do not tell; "examples" int[B], indices into `records`.
    Raises UserError if `max_length` has no room for a single question.
    """
    segments = SegmentTokenizer(tokenizer)
    distinct = {question for _, question in records.pairs()}
    needed = len(segments.prefix) + max(len(segments.segment([question]).tokens) for question in distinct)
    if max_length < needed:
        raise UserError(f"maximum length {max_length}: the longest question needs {needed} tokens with its prefix")
    known = [known_attributes(questions) for questions in records.questions]
    shape = np.array([_index(SHAPES, attributes.shape) for attributes in known], np.int32)
    colour = np.array([_index(COLOURS, attributes.colour) for attributes in known], np.int32)

    def make_sequence(index: int, random: np.random.Generator) -> Packed:
        drawn = draw_conversations(records.questions[index], known[index], conversations_per_image, random)
        fitting = [segments.segment(conversation) for conversation in drawn]
        return join_segments(segments.prefix, fitting, max_length, padding_segment=conversations_per_image + 1)

    def make_batch(indices: Int[np.ndarray, "batch"], random: np.random.Generator) -> Batch:
        sequences = [make_sequence(int(index), random) for index in indices]
        arrays = {name: np.stack([getattr(sequence, name) for sequence in sequences]) for name in Packed._fields}
        return {
            "images": augment(records.images[indices], random),
            **arrays,
            "shape": shape[indices],
            "colour": colour[indices],
            "examples": np.asarray(indices),
        }

    return batches(len(records), make_batch, batch_size, seed)


def held_out_sequences(records: Records, tokenizer: Tokenizer) -> list[Packed]:
    """One sequence for each record, with each of its questions in a segment of its own; all of one length."""
    segments = SegmentTokenizer(tokenizer)
    examples = {question: segments.segment([question]) for question in {question for _, question in records.pairs()}}
    of_records = [[examples[question] for question in questions] for questions in records.questions]
    most = max(map(len, of_records))
    longest = max(sum(len(example.tokens) for example in record) for record in of_records)
    length = len(segments.prefix) + longest
    return [join_segments(segments.prefix, record, length, padding_segment=most + 1) for record in of_records]


def _index(values: tuple[str, ...], value: str | None) -> int:
    return -1 if value is None else values.index(value)
