"""The scheduler: whatever arrives, is cancelled or shares the batch, each request gets what it gets alone."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from sphinx_jax.errors import UserError
from sphinx_jax.inference import generate
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.scheduler import Scheduler
from sphinx_jax.inference.sequence import Sequence
from tests.instruments.mixed_requests import PROMPTS, mixed_requests, serve_at_random

CACHE_LEN = 128


def make_scheduler(engine, num_seqs=4, num_prefixes=4, prefix_len=64):
    return Scheduler(engine, StateShape(num_seqs, CACHE_LEN, num_prefixes, prefix_len if num_prefixes else 0))


def finish(scheduler):
    """Steps until nothing is left; how many terminal events each sequence had."""
    ended = {}
    while scheduler.has_work:
        for sequence in scheduler.step():
            if sequence.finish is not None:
                ended[sequence] = ended.get(sequence, 0) + 1
    return ended


@pytest.fixture(scope="module")
def alone(model, images):
    """What each request gives by itself, by its content."""
    known = {}

    def run(request: Request):
        key = (tuple(request.tokens), request.image and request.image.digest, request.params, request.raw)
        if key not in known:
            scheduler = make_scheduler(model.engine, num_seqs=4, num_prefixes=0)
            sequence = scheduler.submit(request)
            finish(scheduler)
            known[key] = sequence.completion
        return known[key]

    return run


def assert_same(completion, expected):
    assert (completion.text, completion.tokens, completion.finish) == (
        expected.text,
        expected.tokens,
        expected.finish,
    )
    np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=1e-4)
    assert [top.tokens[:1] for top in completion.top_logprobs] == [top.tokens[:1] for top in expected.top_logprobs]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 2}], ids=["one", "data2-tensor2"])
def test_mixed_requests_give_what_each_gives_alone(mesh, model, make_model, images, alone):
    """200 of them, arriving at random times, some streaming, some cancelled at random moments."""
    scheduler = make_scheduler(make_model(**mesh).engine)
    requests = list(mixed_requests(model, images, 200))
    sequences, cancelled, events = serve_at_random(scheduler, requests, seed=3)
    assert len(sequences) == 200 and len(cancelled) > 5
    assert all(events[s] == 1 for s in sequences if s not in cancelled)
    assert scheduler.tokens_reused > 0
    for sequence in sequences:
        expected = alone(sequence.request)
        if sequence in cancelled:
            assert sequence.finish == "cancelled" and expected.text.startswith(sequence.text)
        else:
            assert_same(sequence.completion, expected)


def test_what_requests_share_is_prefilled_once(model, images):
    """Four questions each about three images, mixed up: an image's tokens and what questions share are copied."""
    engine, words = model.engine, model.config.num_image_tokens
    requests = [model.request(q, image, SamplingParams(max_new_tokens=2)) for q in PROMPTS for image in images]
    scheduler = make_scheduler(engine, num_seqs=16)
    for request in requests:
        scheduler.submit(request)
    finish(scheduler)
    prompts = sum(len(request.tokens) + words for request in requests)
    assert scheduler.tokens_prefilled + scheduler.tokens_reused == prompts
    # One question of each image is prefilled whole; of the others no image token and nothing of the template before
    # the question.
    template = next(
        i for i, pair in enumerate(zip(requests[0].tokens, requests[3].tokens, strict=False)) if len(set(pair)) > 1
    )
    whole = sum(len(r.tokens) + words for r in requests[:3])
    assert scheduler.tokens_prefilled <= whole + sum(len(r.tokens) - template for r in requests[3:])
    assert engine.images_encoded >= 3


def test_the_least_recently_used_prefix_is_replaced(model, images):
    """Two places for three images in turn: each is prefilled anew; for two images none is."""
    scheduler = make_scheduler(model.engine, num_seqs=1, num_prefixes=2)

    def prefilled(image, prompt):
        """Whether the image's tokens were computed."""
        before, request = scheduler.tokens_reused, model.request(prompt, image, SamplingParams(max_new_tokens=1))
        scheduler.submit(request)
        finish(scheduler)
        return scheduler.tokens_reused - before < model.config.num_image_tokens

    first = [prefilled(image, PROMPTS[0]) for image in images]
    again = [prefilled(image, PROMPTS[1]) for image in images]
    assert first == again == [True] * 3
    assert [prefilled(image, PROMPTS[2]) for image in (images[1], images[2], images[1])] == [False] * 3


def test_several_answers_to_one_prompt_share_it(model, images):
    scheduler = make_scheduler(model.engine)
    request = model.request(PROMPTS[0], images[0], SamplingParams(max_new_tokens=4, temperature=1))
    seeds = [dataclasses.replace(request, params=dataclasses.replace(request.params, seed=i)) for i in range(4)]
    sequences = [scheduler.submit(r) for r in seeds]
    finish(scheduler)
    # All but the last token of the prompt, which is computed for its logits.
    assert scheduler.tokens_reused == 3 * (len(request.tokens) - 1 + model.config.num_image_tokens)
    assert len({sequence.text for sequence in sequences}) > 1


def tokens_prefilled_by_round(model, images, monkeypatch, prefill_tokens, num_streams):
    """While so many stream, three more arrive: the tokens prefilled between decode calls, and the number of chunks."""
    prefilled, chunks = [0], 0
    prefill, decode = Engine.prefill, Engine.decode

    def count_chunk(self, state, chunk, *args):
        nonlocal chunks
        chunks += 1
        return prefill(self, state, chunk, *args)

    def count_round(self, *args):
        prefilled.append(scheduler.tokens_prefilled)
        return decode(self, *args)

    monkeypatch.setattr(Engine, "prefill", count_chunk)
    monkeypatch.setattr(Engine, "decode", count_round)
    monkeypatch.setattr(model.engine, "prefill_tokens", prefill_tokens)
    # One decode step a call, however fast.
    monkeypatch.setattr("sphinx_jax.inference.scheduler.STREAM_SECONDS", 0)
    scheduler = make_scheduler(model.engine, num_seqs=8, num_prefixes=0)
    request = model.request(PROMPTS[0], images[0], SamplingParams(max_new_tokens=60))
    streaming = [scheduler.submit(request, streams=True) for _ in range(num_streams)]
    while not all(sequence.tokens for sequence in streaming):
        scheduler.step()
    prefilled[:], chunks = [scheduler.tokens_prefilled], 0
    for prompt in PROMPTS[:3]:
        scheduler.submit(model.request(prompt, images[0], SamplingParams(max_new_tokens=2)))
    while scheduler.num_running > num_streams or scheduler.num_waiting:
        scheduler.step()
    return np.diff(prefilled), chunks


@pytest.mark.parametrize("budget", [16, 96, 512])
def test_running_sequences_wait_for_one_chunk_at_most(model, images, monkeypatch, budget):
    """While most stream, no more tokens than one chunk's are prefilled between two decode calls."""
    rounds, chunks = tokens_prefilled_by_round(model, images, monkeypatch, budget, num_streams=3)
    assert rounds.sum() > 48
    # A chunk is never split: one that is larger than the budget stands alone.
    assert rounds.max() <= budget + model.config.num_image_tokens
    # Every chunk in a round of its own, some together, or all in one.
    least, most = {16: (chunks, chunks), 96: (2, chunks - 1), 512: (1, 1)}[budget]
    assert least <= (rounds > 0).sum() <= most


def test_a_crowd_that_waits_is_prefilled_at_once(model, images, monkeypatch):
    """One that streams waits for three that have nothing yet."""
    rounds, chunks = tokens_prefilled_by_round(model, images, monkeypatch, 16, num_streams=1)
    assert chunks > 1 and (rounds > 0).sum() < chunks


def test_a_cancelled_sequence_frees_its_slot_within_one_call(model):
    scheduler = make_scheduler(model.engine, num_seqs=1, num_prefixes=0)
    first = scheduler.submit(model.request(PROMPTS[0], None, SamplingParams(max_new_tokens=60)), streams=True)
    second = scheduler.submit(model.request(PROMPTS[1], None, SamplingParams(max_new_tokens=2)), streams=True)
    scheduler.step()
    assert first.tokens and not second.tokens
    scheduler.cancel(first)
    scheduler.cancel(first)
    assert first.finish == "cancelled"
    scheduler.step()
    assert second.tokens
    finish(scheduler)


def test_text_held_back_is_not_shown_when_a_sequence_is_broken_off(model):
    """It may be the beginning of a stop string, which the whole answer would end before."""
    request = model.request("why?", None, SamplingParams(stop=("ab",)), raw=True)
    tokens = model.tokenizer.encode("a", bos=False, eos=False)
    for finish_reason, expected in {"cancelled": "", "error": "", "length": "a"}.items():
        sequence = Sequence(request, model.tokenizer, streams=True)
        sequence.append(tokens, [0.0] * len(tokens), [])
        assert sequence.text == ""
        sequence.end(finish_reason)
        assert sequence.text == expected


def test_a_chat_continues_in_its_slot(model, images):
    """The second turn prefills what is new: the first one's answer is in the KV cache but for its last token."""
    scheduler = make_scheduler(model.engine, num_seqs=1, num_prefixes=0)
    first = model.request(PROMPTS[0], images[0], SamplingParams(max_new_tokens=5))
    sequence = scheduler.submit(first)
    finish(scheduler)
    longer = Request([*first.tokens, *sequence.tokens, 7, 8, 9], first.image, SamplingParams(max_new_tokens=5))
    before = scheduler.tokens_prefilled
    second = scheduler.submit(longer)
    finish(scheduler)
    assert scheduler.tokens_prefilled - before == 4
    (expected,) = generate.run_all(model.engine, [longer])
    assert second.completion.tokens == expected.tokens
    # About another image nothing is the same.
    third = scheduler.submit(dataclasses.replace(longer, image=model.prepare_image(images[1])))
    finish(scheduler)
    assert third.reused == 0


def test_a_device_error_ends_every_sequence_once_and_the_next_request_works(model, monkeypatch):
    scheduler = make_scheduler(model.engine)
    request = model.request(PROMPTS[0], None, SamplingParams(max_new_tokens=3))
    failing = [scheduler.submit(request) for _ in range(6)]
    with monkeypatch.context() as patch:

        def fail(*_):
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone\nmore")

        patch.setattr(Engine, "decode", fail)
        ended = scheduler.step()
    assert [s.finish for s in ended] == ["error"] * 4
    error = ended[0].error or ""
    assert "the device is gone" in error and "\n" not in error
    # Those that had no slot yet are served, by a new state.
    assert all(s.finish == "length" or s.finish == "stop" for s in finish(scheduler)) and failing[5].tokens
    assert len(ended[0].tokens) == 1


def test_a_request_that_cannot_be_served_is_refused_and_harms_no_other(model):
    scheduler = make_scheduler(model.engine)
    fine = scheduler.submit(model.request(PROMPTS[0], None, SamplingParams(max_new_tokens=3)))
    with pytest.raises(UserError, match="cache positions"):
        scheduler.submit(model.request(PROMPTS[0], None, SamplingParams(max_new_tokens=400)))
    assert list(finish(scheduler)) == [fine]


def test_pools_of_other_lengths_have_programs_of_their_own(model, images):
    """Two schedulers of one engine that differ in the length of their prefixes alone."""
    request = model.request(PROMPTS[0], images[0], SamplingParams(max_new_tokens=2))
    texts = []
    for prefix_len in (64, 32):
        scheduler = make_scheduler(model.engine, prefix_len=prefix_len)
        sequences = [scheduler.submit(request) for _ in range(2)]
        finish(scheduler)
        texts += [sequence.text for sequence in sequences]
    assert len(set(texts)) == 1


def test_one_thread_owns_a_scheduler(model):
    scheduler = make_scheduler(model.engine)
    scheduler.step()
    raised = []

    def use():
        try:
            scheduler.step()
        except AssertionError as error:
            raised.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert raised


def test_top_logprobs_are_the_largest_of_the_distribution(model):
    params = SamplingParams(max_new_tokens=3, top_logprobs=5)
    (answer,) = model.complete(PROMPTS[:1], None, params)
    tokens = [*model.request(PROMPTS[0]).tokens, *answer.tokens]
    logits = np.asarray(model.logits(np.array([tokens])), np.float64)[0, -4:-1, : model.tokenizer.vocab_size]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for position, top in enumerate(answer.top_logprobs):
        order = np.argsort(-expected[position])[:5]
        assert top.tokens == order.tolist()
        np.testing.assert_allclose(top.logprobs, expected[position][order], atol=1e-4)


def test_ignoring_eos_an_answer_is_as_long_as_asked(model):
    """The same prompt ends by EOS in some seeds; with ignore_eos it never does."""
    scheduler = make_scheduler(model.engine, num_seqs=4)
    lengths = {False: [], True: []}
    for ignore_eos in lengths:
        for seed in range(24):
            params = SamplingParams(temperature=3, top_p=1, seed=seed, max_new_tokens=80, ignore_eos=ignore_eos)
            sequence = scheduler.submit(model.request(PROMPTS[3], None, params))
            finish(scheduler)
            lengths[ignore_eos].append(len(sequence.completion.tokens))
    assert min(lengths[False]) < 80
    assert lengths[True] == [80] * 24
