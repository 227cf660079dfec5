"""Two processes of two devices each, started as a user would, answer as one process of one device does."""

import collections
import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import sharding
import sphinx_jax
from sphinx_jax.data import easy_vqa
from sphinx_jax.inference.scheduler import Scheduler
from tests.instruments.mixed_requests import COUNT as COUNT_MIXED
from tests.instruments.mixed_requests import SHAPE, mixed_requests, some_images
from tests.instruments.two_processes import in_two

INFER = Path(__file__).parents[2] / "infer.py"
COUNT = 12


@pytest.mark.parametrize(("closed", "said"), [("", "answer\n"), (">&-", ""), ("2>&-", "library\nanswer\n")])
def test_only_answers_on_standard_output(closed, said):
    """What a library prints past Python goes to standard error, if there is one; nothing waits until the end."""
    code = "import os; from sphinx_jax.cli import common; common.divert_native_stdout(); "
    code += "os.write(1, b'library\\n') if os.sys.stdout else 0; print('answer') if os.sys.stdout else 0; os._exit(0)"
    program = f'"{sys.executable}" -u -c "{code}" {closed}'
    done = subprocess.run(["sh", "-c", program], cwd=INFER.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    assert ("library" in done.stderr) == (closed == "")


@pytest.mark.slow
def test_mixed_requests_in_two_processes(tmp_path):
    """200 that arrive and are cancelled at random moments: each gives what it gives alone in one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = [sys.executable, "-m", "tests.instruments.mixed_requests", address]
    started = [
        subprocess.Popen(
            [*program, str(i), str(tmp_path / "said.json")],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            cwd=INFER.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=400)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    found = json.loads((tmp_path / "said.json").read_text())
    assert len(found["said"]) == COUNT_MIXED and found["reused"] > 0

    model = sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), "float32", max_model_len=128)
    scheduler = Scheduler(model.engine, dataclasses.replace(SHAPE, num_prefixes=0, prefix_len=0))
    requests = list(mixed_requests(model, some_images(), COUNT_MIXED))
    finishes = collections.Counter()
    # They arrive from the last to the first.
    for request, (text, tokens, finish) in zip(reversed(requests), found["said"], strict=True):
        alone = scheduler.submit(request)
        while scheduler.has_work:
            scheduler.step()
        finishes[finish] += 1
        if finish == "cancelled":
            assert alone.text.startswith(text) and alone.tokens[: len(tokens)] == tokens
        else:
            assert (alone.text, alone.tokens, alone.finish) == (text, tokens, finish)
    assert finishes["cancelled"] > 2 and finishes["stop"] > 2


@pytest.mark.slow
def test_a_file_and_a_question_in_two_processes(tmp_path):
    test = easy_vqa.load("test")
    records = [test[i] for i in range(COUNT)]
    questions = [record.questions[0].text for record in records]
    images = [easy_vqa.image_file("test", record.id) for record in records]
    rows = zip(range(COUNT), questions, images, strict=True)
    lines = [json.dumps({"id": i, "prompt": question, "image": str(image)}) for i, question, image in rows]
    lines[5] = lines[5].replace(str(images[5]), "gone.png")
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    model = sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), "float32", max_model_len=256)
    expected = model.generate(questions, images, max_new_tokens=8)

    out = tmp_path / "answers.jsonl"
    said, codes = in_two(
        INFER, "--batch", tmp_path / "questions.jsonl", "--out", out, "--max-new-tokens", 8, "--max-num-seqs", 4
    )
    assert codes == [0, 0], said
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["id"]: line["answer"] for line in found if "answer" in line} == {
        i: answer for i, answer in enumerate(expected) if i != 5
    }
    assert len(found) == COUNT
    (failed,) = (line for line in found if "error" in line)
    assert failed["id"] == 5 and "gone.png" in failed["error"]
    assert "11 answered, 0 answered before, 1 failed" in said[0][1] and "answered" not in said[1][1]

    said, codes = in_two(INFER, "--image", images[0], "--prompt", questions[0])
    assert codes == [0, 0], said
    assert [out for out, _ in said] == [f"{expected[0]}\n", ""]

    # Read by the first alone, and told by both.
    said, codes = in_two(INFER, "--batch", tmp_path / "none.jsonl", "--out", out)
    assert codes == [2, 2], said
    assert all("none.jsonl: cannot read the file" in error.splitlines()[-1] for _, error in said)
