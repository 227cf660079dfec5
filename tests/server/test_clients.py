"""The clients that users have: openai-python of three major versions, lm-eval, and what two other suites send.

The server has a key, as one that others reach would. What it answers is compared with the Python interface.
"""

import base64
import io
import json
import math
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sphinx_jax.cli import evaluate
from sphinx_jax.data import easy_vqa
from sphinx_jax.data.conversation import Conversation
from sphinx_jax.evaluation.tasks import SHORT_ANSWER
from sphinx_jax.inference.generate import run_all
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from tests.instruments import client_packages
from tests.instruments.serving import CONTEXT, NANO, ROOT, data_url, image_part, serving, text_part

pytestmark = pytest.mark.slow

KEY = "s3cret"
CLIENT = ROOT / "tests/server/openai_client.py"
OPENAI = ("1.109.1", "2.54.0", "3.57.0")
LM_EVAL = ("lm-eval[api]==0.4.13", "pillow")
PROMPT = "What color is"
TASKS = ROOT / "tests/server/lm_eval_tasks"
NUM_QUESTIONS = 40
CHOICES = ("yes", "no", "circle", "triangle", "rectangle")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = ("--api-key", KEY, "--public-metrics", "--drain-seconds", 0)
    with serving(tmp_path_factory.mktemp("server"), *NANO, *options) as server:
        yield server


@pytest.fixture(scope="module")
def openai_packages(tmp_path_factory):
    """The folder of each version."""
    folder = tmp_path_factory.mktemp("openai")
    return {version: client_packages.install(folder / version, f"openai=={version}") for version in OPENAI}


@pytest.fixture(scope="module")
def lm_eval_packages(tmp_path_factory):
    return client_packages.install(tmp_path_factory.mktemp("lm-eval") / "packages", *LM_EVAL)


def failures(server) -> list[str]:
    """Requests that ended with a status of 500 or above: clients retry these and say nothing."""
    lines = (line.split() for line in server.log.read_text().splitlines() if "GET /" in line or "POST /" in line)
    return [" ".join(words) for words in lines if words[3] >= "500"]


# openai-python


@pytest.fixture(scope="module", params=OPENAI)
def got(request, server, openai_packages, held_out):
    """What openai_client.py got with one version."""
    url, question, _ = held_out[0]
    given = json.dumps({"image": url, "question": question, "prompt": PROMPT})
    packages = openai_packages[request.param]
    got = json.loads(client_packages.run(packages, [CLIENT, server.url, KEY, "contract"], given))
    assert got["version"] == request.param
    return got


def test_openai_python_gets_the_answers_of_the_python_interface(got, held_out, model, tmp_path):
    url, question, truth = held_out[0]
    image = tmp_path / "image.png"
    image.write_bytes(base64.b64decode(url.partition(",")[2]))
    (expected,) = model.complete([question], [image], max_new_tokens=8)
    assert got["models"] == [got["model"]] == ["nano"]
    chat, stream = got["chat"], got["stream"]
    assert (chat["text"], chat["finish_reason"], chat["request_id"]) == (expected.text, "stop", "mine-7")
    assert (stream["text"], stream["role"], stream["finish_reasons"]) == (expected.text, "assistant", ["stop"])
    assert got["async"] == [expected.text] * 8
    assert expected.text == truth

    prompt_len = model.engine.prompt_len(model.request(question, image))
    numbers = {"prompt_tokens": prompt_len, "completion_tokens": len(expected.tokens)}
    assert numbers.items() <= chat["usage"].items() and numbers.items() <= stream["usage"].items()
    assert chat["usage"]["prompt_tokens_details"]["image_tokens"] == model.config.num_image_tokens

    assert got["logprobs"]["text"].startswith(truth)
    for values in (got["logprobs"]["logprobs"], got["logprobs"]["best"]):
        assert values == pytest.approx(expected.logprobs, abs=1e-4)
    drawn = {"max_new_tokens": 8, "temperature": 2.0, "top_p": 0.95, "ignore_eos": True}
    assert got["sampled"] == [model.complete([question], [image], seed=seed, **drawn)[0].text for seed in (7, 8)]


def test_openai_python_continues_texts(got, model):
    (expected,) = model.complete([PROMPT], max_new_tokens=5, raw=True)
    completion = got["completion"]
    assert completion["text"] == completion["streamed"] and completion["text"].strip() == expected.text.strip()
    assert completion["echo"] == PROMPT + completion["text"]
    prompt = model.tokenizer.encode(PROMPT, bos=True, eos=False)
    first, *others = completion["token_logprobs"]
    assert first is None
    assert others == pytest.approx([*logprobs_of(model, prompt), *expected.logprobs], abs=2e-4)


def test_openai_python_raises_what_it_documents(got, server):
    assert got["errors"] == {
        "temperature": ["BadRequestError", 400, None, "temperature"],
        "tools": ["BadRequestError", 400, "unsupported", "tools"],
        "remote image": ["BadRequestError", 400, "invalid_image", "messages[0].content"],
        "long": ["BadRequestError", 400, "context_length_exceeded", "messages"],
        "stream": ["BadRequestError", 400, None, "temperature"],
        "model": ["NotFoundError", 404, "model_not_found", "model"],
        "unknown model": ["NotFoundError", 404, "model_not_found", "model"],
        "path": ["NotFoundError", 404, None, None],
        "key": ["AuthenticationError", 401, "invalid_api_key", None],
    }
    # It gave up two answers: neither goes on.
    assert got["left"] == "APITimeoutError"
    server.wait_until_idle(5)
    assert not failures(server)


def logprobs_of(model, tokens: list[int]) -> list[float]:
    """The log-probability of each token but the first."""
    logits = np.asarray(model.logits(np.asarray([tokens], np.int32)), np.float64)[0, :-1]
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs[np.arange(len(tokens) - 1), tokens[1:]].tolist()


# lm-eval


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A folder with questions.jsonl, and the questions, as evaluate.py asks those of GQA. The truth of some is wrong,
    so that no score is 0 or 1.
    """
    folder = tmp_path_factory.mktemp("questions")
    test = easy_vqa.load("test")
    found = []
    for i, question in test.pairs():
        if question.answer in CHOICES and len(found) < NUM_QUESTIONS:
            truth = "nothing" if len(found) % 5 == 0 else question.answer
            image = str(easy_vqa.image_file("test", test.ids[i]))
            choice = CHOICES.index(question.answer)
            text = SHORT_ANSWER.format(question.text)
            row = {"question": text, "plain": question.text, "answer": truth, "choice": choice, "image": image}
            found.append(row)
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, found)))
    return folder, found


def lm_eval(packages, questions, kind: str, tasks: str, model_args: str, *argv: str) -> tuple[dict, dict]:
    """The values by task, and what it recorded of each question."""
    folder, _ = questions
    out = Path(tempfile.mkdtemp(dir=folder))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": KEY}
    program = ["-m", "lm_eval", "run", "--model", kind, "--model_args", f"model=nano,{model_args}", "--tasks", tasks]
    program += ["--include_path", TASKS, "--output_path", out, "--log_samples", *argv]
    client_packages.run(packages, program, folder=folder, **offline)
    (results,) = out.rglob("results_*.json")
    samples = {}
    for task in tasks.split(","):
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(lines, key=lambda line: line["doc_id"])
    return json.loads(results.read_text())["results"], samples


def test_lm_eval_asks_about_images(server, lm_eval_packages, questions, model):
    """Its greedy score and every answer are those of the Python interface."""
    url = f"base_url={server.url}/v1/chat/completions,num_concurrent=4"
    values, samples = lm_eval(
        lm_eval_packages, questions, "local-chat-completions", "asked", url, "--apply_chat_template"
    )
    asked = questions[1]
    texts, images = [question["question"] for question in asked], [question["image"] for question in asked]
    expected = [completion.text for completion in model.complete(texts, images, max_new_tokens=10)]
    assert [sample["resps"] for sample in samples["asked"]] == [[[text]] for text in expected]
    right = [text == question["answer"] for text, question in zip(expected, asked, strict=True)]
    assert values["asked"]["exact_match,none"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1
    assert not failures(server)
    assert 100 * values["asked"]["exact_match,none"] == pytest.approx(evaluated(questions))


def evaluated(questions) -> float:
    """What evaluate.py gives for the same questions in a file of GQA."""
    folder, asked = questions
    rows = [
        {
            "image_path": question["image"],
            "question": question["plain"],
            "question_id": i,
            "dataset_name": "gqa",
            "gt_answers": question["answer"],
        }
        for i, question in enumerate(asked)
    ]
    (folder / "gqa_testdev_balanced.json").write_text(json.dumps(rows))
    argv = ["--tasks", "gqa_testdev", "--data", folder, "--out", folder / "evaluated"]
    argv += ["--max-num-seqs", 4, "--max-model-len", CONTEXT]
    assert evaluate.main([*map(str, argv)]) == 0
    return json.loads((folder / "evaluated" / "results.json").read_text())["tasks"]["gqa_testdev"]["value"]


def test_lm_eval_compares_choices(server, lm_eval_packages, questions, model):
    """Log-likelihoods by token lists; the tokens come from /tokenize, which `auto` finds."""
    url = f"base_url={server.url}/v1/completions,tokenizer_backend=auto,auth_token={KEY}"
    values, samples = lm_eval(
        lm_eval_packages, questions, "local-completions", "chosen,continued", url, "--batch_size", "4"
    )
    right = []
    for sample, question in zip(samples["chosen"], questions[1], strict=True):
        scores = [score_of(model, question["question"], f" {choice}") for choice in CHOICES]
        reported = [float(response[0][0]) for response in sample["resps"]]
        assert reported == pytest.approx(scores, abs=5e-4)
        right.append(np.argmax(scores) == question["choice"])
    assert values["chosen"]["acc,none"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1
    asked = [model.tokenizer.encode(question["question"], bos=False, eos=False) for question in questions[1]]
    greedy = SamplingParams(max_new_tokens=6, stop=("###", "</s>"))
    requests = [Request(tokens, params=greedy, raw=True, continues=True) for tokens in asked]
    expected = [completion.text for completion in run_all(model.engine, requests)]
    assert [sample["resps"] for sample in samples["continued"]] == [[[text]] for text in expected]
    assert not failures(server)


def score_of(model, context: str, continuation: str) -> float:
    """The log-probability of a continuation, without BOS: lm-eval adds none to what a remote tokenizer returns."""
    begun = len(model.tokenizer.encode(context, bos=False, eos=False))
    tokens = model.tokenizer.encode(context + continuation, bos=False, eos=False)
    return math.fsum(logprobs_of(model, tokens)[begun - 1 :])


# What other suites send


def test_lmms_eval_gets_an_answer(server, held_out):
    """Its model "openai": the image as PNG, then the text; a limit and a temperature, through openai-python."""
    for url, question, truth in held_out:
        content = [image_part(url), text_part(question)]
        body = {"messages": [{"role": "user", "content": content}], "model": "nano", "max_tokens": 16, "temperature": 0}
        assert authorized(server, body) == truth


def test_vlmevalkit_gets_an_answer(server, held_out):
    """Its OpenAIWrapper: the image as JPEG of at most 512 pixels with a detail, n 1, its default of 2,048 tokens; it
    strips the answer."""
    for url, question, truth in held_out:
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB").resize((512, 512))
        file = io.BytesIO()
        image.save(file, "JPEG")
        part = {"type": "image_url", "image_url": {"url": data_url(file.getvalue(), "image/jpeg"), "detail": "low"}}
        messages = [
            {"role": "system", "content": [text_part(Conversation.from_pairs([(question, None)]).template.system)]},
            {"role": "user", "content": [part, text_part(question)]},
        ]
        body = {"model": "nano", "messages": messages, "n": 1, "temperature": 0, "max_tokens": 2048}
        assert authorized(server, body).strip() == truth


def authorized(server, body: dict) -> str:
    """The text of the answer to a chat."""
    answer = server.post("/v1/chat/completions", body, Authorization=f"Bearer {KEY}")
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]["message"]["content"]


# The last of this file: it ends the server


def test_openai_python_raises_in_the_middle_of_a_stream(server, openai_packages):
    """The server is told to stop, and gives what runs no time."""
    started = [
        client_packages.start(packages, [CLIENT, server.url, KEY, "stream"]) for packages in openai_packages.values()
    ]
    try:
        # All of them at once: a stream takes a second or two.
        wait_for_line(started, "ready")
        for process in started:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        wait_for_line(started, "begun")
        server.process.send_signal(signal.SIGTERM)
        for process in started:
            name, message = json.loads(process.communicate(timeout=60)[0])
            assert (name, message) == ("APIError", "the server shuts down")
    finally:
        for process in started:
            process.kill()
    assert server.process.wait(30) == 0


def wait_for_line(processes, line: str) -> None:
    for process in processes:
        assert process.stdout.readline() == f"{line}\n"
