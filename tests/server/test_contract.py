"""Everything but chat: completions, models, tokens, errors, guards; each wrong field names itself."""

import json

import numpy as np
import pytest

from tests.instruments.serving import CONTEXT, data_url, image_part, png, text_part

USER = {"role": "user", "content": "hi"}


# Completions


def test_a_text_is_continued(server, model):
    prompt = "What color is"
    answer = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 5}).json
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    (expected,) = model.complete([prompt], max_new_tokens=5, raw=True)
    assert answer["choices"][0]["text"].strip() == expected.text.strip()
    assert answer["choices"][0]["text"].startswith(" "), "the space before the next word belongs to the text"
    assert answer["usage"]["completion_tokens"] == len(expected.tokens)


def test_prompts_of_every_kind(server, model):
    ids = model.tokenizer.encode("What color is", bos=True, eos=False)
    kinds = ["What color is", ["What color is"], ids, [ids]]
    texts = [server.post("/v1/completions", {"prompt": k, "max_tokens": 4}).json["choices"][0]["text"] for k in kinds]
    assert len(set(texts)) == 1
    several = server.post("/v1/completions", {"prompt": ["Is it", "What color is"], "max_tokens": 4, "n": 2}).json
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in several["choices"][2:]] == texts[:2]
    assert several["usage"]["prompt_tokens"] == len(ids) + len(model.tokenizer.encode("Is it", bos=True, eos=False))


def test_a_completion_streams(server):
    asked = {"prompt": "What color is", "max_tokens": 6, "temperature": 1, "seed": 4, "logprobs": 2}
    whole = server.post("/v1/completions", asked).json["choices"][0]
    events = server.post("/v1/completions", asked | {"stream": True}).events
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
    for name in ("tokens", "text_offset"):
        parts = [event["choices"][0]["logprobs"][name] for event in events if event["choices"][0]["logprobs"]]
        assert [value for part in parts for value in part] == whole["logprobs"][name]


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_scores_a_text(server, model, max_tokens):
    """The way lm-eval asks for log-likelihoods."""
    text = "What color is the shape? It is red"
    ids = model.tokenizer.encode(text, bos=True, eos=False)
    asked = {"prompt": [ids], "max_tokens": max_tokens, "logprobs": 1, "seed": 1234, "echo": True, "temperature": 0}
    choice = server.post("/v1/completions", asked).json["choices"][0]
    lists = choice["logprobs"]
    assert choice["text"].startswith(model.tokenizer.decode(ids))
    logits = np.asarray(model.logits(np.asarray([ids], np.int32)), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprobs -= logits.max(-1, keepdims=True)
    expected = [logprobs[i, token] for i, token in enumerate(ids[1:])]
    assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
    np.testing.assert_allclose(lists["token_logprobs"][1 : len(ids)], expected, atol=2e-4)
    best = [next(iter(top.values())) for top in lists["top_logprobs"][1 : len(ids)]]
    np.testing.assert_allclose(best, logprobs.max(-1)[:-1], atol=2e-4)
    assert len({len(values) for values in lists.values()}) == 1
    assert len(lists["tokens"]) == len(ids) + max_tokens


# The model and its tokens


def test_models(server):
    (card,) = server.get("/v1/models").json["data"]
    assert (card["id"], card["object"], card["owned_by"], card["max_model_len"]) == (
        "nano",
        "model",
        "sphinx-jax",
        CONTEXT,
    )
    assert card["image_size"] == 64 and set(card["defaults"]) == {"temperature", "top_p", "max_tokens", "seed"}
    assert server.get("/v1/models/nano").json == card
    missing = server.get("/v1/models/gpt-4")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


def test_tokens_there_and_back(server, model):
    text = "what color is the shape?"
    tokens = server.post("/tokenize", {"prompt": text}).json
    assert tokens["tokens"] == model.tokenizer.encode(text, bos=True, eos=False)
    assert tokens["count"] == len(tokens["tokens"])
    bare = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json["tokens"]
    assert bare == tokens["tokens"][1:]
    assert server.post("/detokenize", {"tokens": bare}).json == {"prompt": text}
    special = server.get("/tokenizer_info").json
    assert special == {"bos_token": "<s>", "eos_token": "</s>"}
    # lm-eval looks their ids up so. Within a text they are characters, as everywhere.
    named = [server.post("/tokenize", {"prompt": name, "add_special_tokens": False}) for name in special.values()]
    assert [answer.json["tokens"] for answer in named] == [[model.tokenizer.bos_id], [model.tokenizer.eos_id]]
    within = server.post("/tokenize", {"prompt": "a </s>", "add_special_tokens": False}).json["tokens"]
    assert within == model.tokenizer.encode("a </s>", bos=False, eos=False) and 2 not in within


def test_paths_of_the_server(server):
    assert server.get("/health").json == {"status": "ready"}
    assert server.get("/version").json["version"]
    assert server.get("/openapi.json").json["openapi"].startswith("3.1")
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert server.get("/page/../guards.py").status == server.get("/page/guards.py").status == 404
    for method, path, status in [("GET", "/nope", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/", 405)]:
        answer = server.request(method, path)
        assert answer.status == status and answer.error
    assert server.request("HEAD", "/health").status == 200


def test_a_request_has_an_id(server):
    assert server.get("/health", **{"X-Request-Id": "mine-7"}).headers["x-request-id"] == "mine-7"
    assert server.get("/health", **{"X-Request-Id": "no\tgood"}).headers["x-request-id"].startswith("req-")


def test_metrics_count_what_was_served(server):
    names = ("request_success_total", "generation_tokens_total", "prompt_tokens_total", "compilations")
    before = {name: server.metric(f"sphinx_jax_{name}") for name in names}
    usage = server.chat(max_tokens=3).json["usage"]
    server.wait_until_idle()
    after = {name: server.metric(f"sphinx_jax_{name}") - before[name] for name in names}
    assert after == {
        "request_success_total": 1,
        "generation_tokens_total": usage["completion_tokens"],
        "prompt_tokens_total": usage["prompt_tokens"],
        "compilations": 0,
    }


# Errors


WRONG = {
    "temperature": [-0.1, 2.1, "hot", [1], True],
    "top_p": [0, 1.1, -1],
    "top_k": [-2, 1.5],
    "repetition_penalty": [0, -1],
    "n": [0, -1, 1.5, "2"],
    "max_tokens": [0, -5, "many"],
    "max_completion_tokens": [0],
    "seed": ["x", 1.5, 2**63],
    "stop": [["a"] * 5, [""], 5, ["x" * 600]],
    "top_logprobs": [21, -1, "5", 3],
    "stream_options": [{"include_usage": True}, "yes"],
    "frequency_penalty": [0.5],
    "presence_penalty": [-1],
    "logit_bias": [{"5": 1}],
    "response_format": [{"type": "json_object"}, "text"],
    "tools": [[{"type": "function"}]],
    "tool_choice": ["required", {"type": "function"}],
    "stream": ["yes", 1],
    "logprobs": [5],
    "messages": [[], "hi", None, 5, {}],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_field_is_named(server, field, value):
    answer = server.post("/v1/chat/completions", {"messages": [USER], field: value})
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert field in (answer.error["param"] or "") or (field == "stop" and "stop" in answer.error["message"])


MESSAGES = {
    "an unknown role": ({"role": "tool", "content": "x"}, "role"),
    "an unknown part": ({"role": "user", "content": [{"type": "input_audio"}]}, "input_audio"),
    "a bare address": ({"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}, "object"),
    "an address of another host": ({"role": "user", "content": [image_part("https://example.com/a.png")]}, "not read"),
    "a file": ({"role": "user", "content": [image_part("file:///etc/passwd")]}, "data: URL"),
    "no base64": ({"role": "user", "content": [image_part("data:image/png;base64,%2B")]}, "base64"),
    "no data": ({"role": "user", "content": [image_part("data:image/png;base64,")]}, "empty"),
    "an escaped plus": ({"role": "user", "content": [image_part("data:image/png;base64,AA%2BAAAA")]}, "base64"),
    "a PDF": ({"role": "user", "content": [image_part(data_url(b"%PDF-1.4 x", "application/pdf"))]}, "data: URL"),
    "a PDF that says PNG": ({"role": "user", "content": [image_part(data_url(b"%PDF-1.4 x"))]}, "PDF"),
    "PostScript": ({"role": "user", "content": [image_part(data_url(b"%!PS-Adobe\n"))]}, "PostScript"),
    "half a surrogate": ({"role": "user", "content": None}, "JSON"),
    "only an answer": ({"role": "assistant", "content": "x"}, "user"),
    "only a system text": ({"role": "system", "content": "x"}, "user"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_that_cannot_be_read(server, name):
    message, reason = MESSAGES[name]
    body = json.dumps({"messages": [message]}).encode()
    if name == "half a surrogate":
        body = body.replace(b"null", b'"\\ud800"')
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 400
    assert reason in answer.error["message"]


def test_a_truncated_image_and_a_huge_one(server):
    data = png(np.zeros((64, 64, 3), np.uint8))
    cut = server.chat([image_part(data_url(data[:60])), text_part("?")])
    assert cut.status == 400 and "truncated" in cut.error["message"]
    assert cut.error["code"] == "invalid_image" and cut.error["param"] == "messages[0].content"
    # A header that claims 20,000 x 20,000 pixels is refused before anything of that size is made.
    bomb = bytearray(data)
    bomb[16:24] = (20_000).to_bytes(4, "big") * 2
    answer = server.chat([image_part(data_url(bytes(bomb))), text_part("?")])
    assert answer.status == 400


def test_a_prompt_that_is_too_long(server):
    answer = server.chat("word " * CONTEXT)
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert str(CONTEXT) in answer.error["message"]
    # Not even tokenized.
    assert server.chat("word " * 1_000_000).error["code"] == "context_length_exceeded"
    cut = server.chat("word " * 90, max_tokens=100_000).json
    assert cut["usage"]["total_tokens"] <= CONTEXT


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a number": b"5",
    "a list": b"[]",
    "null": b"null",
    "bytes": b"\xff\xfe",
    "deep": b'{"a":' + b"[" * 100_000,
    "a big number": b'{"messages":[{"role":"user","content":"hi"}],"temperature":1e999}',
    "not a number": b'{"messages":[{"role":"user","content":"hi"}],"temperature":NaN}',
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_bodies_that_are_no_request(server, name, path):
    answer = server.post(path, BODIES[name])
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [1, "a"]},
        {"prompt": ["a", [1]]},
        {"prompt": [99999]},
        {"prompt": [-1]},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "suffix": "b"},
        {"prompt": "a", "best_of": 2},
        {"prompt": "a", "echo": True, "stream": True},
        {"prompt": "a", "n": 1000},
        {"prompt": ["a"] * 300},
    ],
)
def test_completions_that_are_not_served(server, body):
    answer = server.post("/v1/completions", body)
    assert answer.status == 400 and answer.error["message"]


def test_content_types_and_models(server):
    form = server.post("/v1/chat/completions", b"a=b", **{"Content-Type": "application/x-www-form-urlencoded"})
    assert (form.status, form.error["code"]) == (415, "unsupported_media_type")
    typed = server.post(
        "/v1/chat/completions",
        {"messages": [USER], "max_tokens": 1},
        **{"Content-Type": "Application/JSON; charset=utf-8"},
    )
    assert typed.status == 200
    wrong = server.post("/v1/chat/completions", {"messages": [USER], "model": "gpt-4"})
    assert (wrong.status, wrong.error["code"], wrong.error["param"]) == (404, "model_not_found", "model")


def test_bodies_that_are_too_large(server):
    answer = server.post("/v1/chat/completions", b'{"messages":"' + b"x" * (33 << 20))
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert "32 MiB" in answer.error["message"]


def test_another_host_is_refused(server):
    """A page of another site that points a name of its own at this address."""
    answer = server.get("/v1/models", Host="evil.example")
    assert (answer.status, answer.error["code"]) == (403, "invalid_host")
    for host in ("localhost:1234", "127.0.0.1", "LOCALHOST", "[::1]:80"):
        assert server.get("/health", Host=host).status == 200
    assert "access-control-allow-origin" not in {name.lower() for name in server.get("/v1/models").headers}
