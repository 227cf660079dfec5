"""Chat completions over real sockets: the shapes that clients rely on, and the answers of the Python interface."""

import base64
import math

import numpy as np
import pytest

from tests.instruments.serving import CONTEXT, data_url, image_part, png, text_part


def content_of(answer):
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]["message"]["content"]


def joined(events, index=0):
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def test_the_smallest_request_gets_an_answer(server):
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}).json
    assert set(answer) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    assert answer["model"] == "nano" and isinstance(answer["created"], int)
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["finish_reason"] in ("stop", "length") and choice["logprobs"] is None
    assert choice["message"]["role"] == "assistant" and isinstance(choice["message"]["content"], str)
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


def test_answers_are_those_of_the_python_interface(server, held_out, model, tmp_path):
    for url, question, truth in held_out:
        completion = server.chat([image_part(url), text_part(question)], max_tokens=8)
        file = tmp_path / "image.png"
        file.write_bytes(base64.b64decode(url.partition(",")[2]))
        (expected,) = model.complete([question], [file], max_new_tokens=8)
        assert content_of(completion) == expected.text == truth
        usage = completion.json["usage"]
        prompt = model.engine.prompt_len(model.request(question, file))
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, len(expected.tokens))
        assert usage["prompt_tokens_details"]["image_tokens"] == model.config.num_image_tokens


def test_an_image_that_was_asked_before_is_not_prefilled_again(server):
    url = data_url(png(np.full((9, 7, 3), 77, np.uint8)))
    cached = []
    for question in ("What is this shape?", "Is it blue?"):
        answer = server.chat([image_part(url), text_part(question)], max_tokens=2).json
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    # BOS and the image at least; the system text of the template too.
    assert cached[0] == 0 and cached[1] > 19


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_joined_is_the_whole_answer(server, held_out, n):
    url, question, _ = held_out[0]
    asked = {"temperature": 1.5, "seed": 5, "top_p": 1, "max_tokens": 24, "n": n, "logprobs": True, "top_logprobs": 3}
    content = [image_part(url), text_part(question)]
    whole = server.chat(content, **asked).json
    stream = server.chat(content, stream=True, stream_options={"include_usage": True}, **asked)
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert stream.headers["cache-control"] == "no-cache"
    *events, last = stream.events
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in stream.events}) == 1
    assert events[0]["object"] == "chat.completion.chunk"
    for i in range(n):
        deltas = [c for e in events for c in e["choices"] if c["index"] == i]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["finish_reason"] for c in deltas if c["finish_reason"]] == [whole["choices"][i]["finish_reason"]]
        assert deltas[-1]["finish_reason"]
        assert joined(events, i) == whole["choices"][i]["message"]["content"]
        logprobs = [entry for c in deltas if c["logprobs"] for entry in c["logprobs"]["content"]]
        expected = whole["choices"][i]["logprobs"]["content"]
        assert [entry["token"] for entry in logprobs] == [entry["token"] for entry in expected]
        np.testing.assert_allclose(
            [entry["logprob"] for entry in logprobs], [entry["logprob"] for entry in expected], atol=1e-4
        )
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == whole["usage"][name]


def test_usage_comes_only_when_asked(server):
    events = server.chat(stream=True, max_tokens=3).events
    assert all("usage" not in event and event["choices"] for event in events)
    events = server.chat(
        stream=True, max_tokens=3, stream_options={"include_usage": True, "continuous_usage_stats": True}
    ).events
    assert all(event["usage"]["prompt_tokens"] > 0 for event in events)


def test_log_probabilities(server):
    answer = server.chat(logprobs=True, top_logprobs=20, max_tokens=5).json["choices"][0]
    assert answer["logprobs"]["refusal"] is None
    entries = answer["logprobs"]["content"]
    text = b"".join(bytes(entry["bytes"]) for entry in entries).decode()
    assert text.startswith(answer["message"]["content"])
    for entry in entries:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(values) == 20 and values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(entry["logprob"], abs=1e-5)
        assert sum(map(math.exp, values)) <= 1 + 1e-4
    alone = server.chat(logprobs=True, max_tokens=2).json["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in alone)


def test_the_same_seed_draws_the_same_answer_and_choices_differ(server):
    asked = {"temperature": 2, "top_p": 1, "max_tokens": 24, "ignore_eos": True}
    one, same = (server.chat(seed=-3, n=3, **asked).json for _ in range(2))
    texts = [choice["message"]["content"] for choice in one["choices"]]
    assert texts == [choice["message"]["content"] for choice in same["choices"]]
    assert len(set(texts)) == 3
    # Choice i is drawn by seed + i; a seed that none was given is reported.
    assert content_of(server.chat(seed=-2, **asked)) == texts[1]
    unseeded = server.chat(**asked).json
    seed = int(unseeded["system_fingerprint"].removeprefix("seed-"))
    assert content_of(server.chat(seed=seed, **asked)) == unseeded["choices"][0]["message"]["content"]
    # Greedy answers are alike.
    greedy = [choice["message"]["content"] for choice in server.chat(n=2, max_tokens=4).json["choices"]]
    assert greedy[0] == greedy[1]


def test_stop_strings_and_lengths(server):
    asked = {"temperature": 2, "top_p": 1, "max_tokens": 40, "seed": 11, "ignore_eos": True}
    whole = content_of(server.chat(**asked))
    stop = whole[len(whole) // 2 :][:3]
    answer = server.chat(stop=[stop], **asked).json["choices"][0]
    assert answer["message"]["content"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"
    assert content_of(server.chat(stop=stop, **asked)) == answer["message"]["content"]
    assert content_of(server.chat(stop=[], **asked)) == content_of(server.chat(stop=None, **asked)) == whole
    cut = server.chat(**asked | {"max_tokens": 7}).json
    assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 7)
    # The newer name wins over the older.
    newer = server.chat(**asked | {"max_completion_tokens": 3}).json
    assert newer["usage"]["completion_tokens"] == 3


def test_without_a_limit_an_answer_takes_what_the_context_leaves(server):
    usage = server.chat(temperature=2, top_p=1, seed=1, ignore_eos=True).json["usage"]
    assert usage["total_tokens"] == CONTEXT


def test_roles(server, model, held_out):
    """System text in place of the template's, turns of one role joined, a last answer that is continued."""
    from sphinx_jax.data.conversation import Conversation

    messages = [
        {"role": "system", "content": "Be terse."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [text_part("Is it"), text_part("red?")]},
        {"role": "user", "content": "Say."},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "What color is it?"},
        {"role": "assistant", "content": " It is "},
    ]
    conversation = Conversation.from_pairs([("Is it\nred?\nSay.", "no"), ("What color is it?", None)])
    text = conversation.prompt(" It is").replace(conversation.template.system, "Be terse.\nBe kind.")
    tokens = model.tokenizer.encode(text, bos=True, eos=False)
    answer = server.chat(messages, max_tokens=6, logprobs=True).json
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    (expected,) = model.complete([text], max_new_tokens=6, raw=True)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == pytest.approx(expected.logprobs[: len(entries)], abs=1e-4)
    # What continues a text keeps the space that it begins with.
    begun = bytes(entries[0]["bytes"])
    assert answer["choices"][0]["message"]["content"].encode().startswith(begun)
    # Without a system message the prompt is the original's, to the byte.
    url, question, _ = held_out[0]
    plain = server.chat([image_part(url), text_part(question)], max_tokens=1).json["usage"]["prompt_tokens"]
    assert plain == len(Conversation.from_pairs([(question, None)]).prompt_tokens(model.tokenizer)) + 19


def test_one_image_a_conversation(server, held_out):
    (url, question, truth), (other, *_) = held_out[:2]
    spaced = url[:60] + "\n " + url[60:].rstrip("=")
    again = [
        {"role": "user", "content": [image_part(url), text_part("Is it red?")]},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": [image_part(spaced), text_part(question)]},
    ]
    assert content_of(server.chat(again, max_tokens=8)) == truth
    error = server.chat([image_part(url), image_part(other), text_part("?")]).error
    assert "one image" in error["message"] and error["param"] == "messages[0].content"
    again[1]["content"] = [image_part(url)]
    assert "belongs to a message of the user" in server.chat(again).error["message"]


def test_unknown_fields_are_passed_over_and_neutral_ones_accepted(server):
    answer = server.chat(
        max_tokens=2,
        user="someone",
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tool_choice="none",
        parallel_tool_calls=True,
        top_k=-1,
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        modalities=["text"],
    )
    assert answer.status == 200
    messages = [{"role": "user", "name": "Ann", "content": [{**text_part("hi"), "cache_control": {}}]}]
    assert server.chat(messages, max_tokens=1).status == 200
