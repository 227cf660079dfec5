"""Files of questions: every line is answered or says why not, and a second start does only what is left."""

import base64
import json
import os
import shutil
import stat

import jax
import numpy as np
import pytest
from PIL import Image

from sphinx_jax import checkpoints
from sphinx_jax.errors import UserError


@pytest.fixture
def folder(tmp_path, images):
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


GOOD = [
    {"id": "a", "image": "0.png", "prompt": "what is it?"},
    {"id": 2, "image": None, "prompt": "why?", "truth": "ignored"},
    {"id": "2", "prompt": "is there a circle?"},
    {"id": "c", "image": "1.png", "prompt": "what is it?"},
    {"id": "d", "image": "0.png", "prompt": "is it red?"},
]
BAD = [
    b'{"id": "half", "prompt": "w',
    b"[1, 2]",
    b'{"id": "x", "image": "missing.png", "prompt": "what is it?"}',
    b'{"id": "y", "image": "broken.png", "prompt": "what is it?"}',
    b'{"id": "z", "prompt": "  "}',
    b'{"id": "long", "prompt": "' + b"word " * 600 + b'"}',
    b'{"id": "a", "prompt": "the same id again"}',
    b'{"id": null, "prompt": "what?"}',
    b'{"id": "i", "image": 7, "prompt": "what?"}',
    b'{"id": "u", "prompt": "\xff\xfe"}',
    b'{"id": "long path", "image": "' + b"x" * 5000 + b'", "prompt": "what?"}',
    b'{"id": "nul", "image": "a\\u0000b.png", "prompt": "what?"}',
    b'{"id": "surrogate", "image": "\\ud800.png", "prompt": "what?"}',
    b'{"id": "\\ud800", "image": "missing.png", "prompt": "what?"}',
    b"[" * 100_000,
    b'{"id": "uri", "image": "data:image/png;base64,????", "prompt": "what?"}',
    b'{"id": "url", "image": "https://example.com/cat.png", "prompt": "what?"}',
]
COMPLAINTS = [
    "not JSON",
    "not a JSON object",
    "missing.png",
    "broken.png",
    '"prompt"',
    "tokens long",
    "used on line",
    '"id"',
    '"image"',
    "not JSON",
    "xxx",
    "a\\0b.png",
    ".png",
    "missing.png",
    "not JSON",
    "data: URL",
    "URL",
]


def write(folder, lines):
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "in.jsonl").write_bytes(b"\n".join(encoded) + b"\n\n")


NEW = 60
"""Enough that prompt and answer take the cache length for which other tests have compiled programs."""


def run(model, folder, **options):
    *_, last = model.answer_file(
        folder / "in.jsonl", folder / "out.jsonl", max_new_tokens=NEW, max_num_seqs=4, **options
    )
    return last, [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def expected(model, folder):
    images = [folder / entry["image"] if entry.get("image") else None for entry in GOOD]
    return model.complete([entry["prompt"] for entry in GOOD], images, max_new_tokens=NEW, max_num_seqs=4)


def test_good_lines_are_answered_and_bad_ones_say_why(model, folder):
    lines = [*GOOD]
    for i, bad in enumerate(BAD):
        lines.insert(1 + 2 * i if 2 * i < len(lines) else len(lines), bad)
    write(folder, lines)
    progress, records = run(model, folder)
    assert (progress.total, progress.answered, progress.failed, progress.skipped) == (22, 5, 17, 0)
    answers = {json.dumps(r["id"]): r["answer"] for r in records if "answer" in r}
    truth = expected(model, folder)
    assert answers == {json.dumps(e["id"]): a.text for e, a in zip(GOOD, truth, strict=True)}
    assert progress.tokens == sum(len(a.tokens) for a in truth)
    for bad, complaint in zip(BAD, COMPLAINTS, strict=True):
        line = lines.index(bad) + 1
        (record,) = [r for r in records if r.get("line") == line]
        assert set(record) == {"id", "line", "error"}
        assert f"line {line}: " in record["error"] and complaint in record["error"]


def test_a_second_start_keeps_answers_and_tries_the_rest_again(model, folder):
    write(folder, [*GOOD, BAD[2]])
    _, whole = run(model, folder)
    kept = [record for record in whole if "answer" in record][:2]
    cut_short = '{"id": "c", "ans'
    error = {"id": "x", "line": 6, "error": "line 6: missing.png"}
    (folder / "out.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*kept, error]) + cut_short)
    Image.new("RGB", (9, 9)).save(folder / "missing.png")
    progress, records = run(model, folder)
    assert (progress.skipped, progress.answered, progress.failed) == (2, 4, 0)
    assert records[:2] == kept
    assert sorted(json.dumps(r["id"]) for r in records) == sorted(json.dumps(e["id"]) for e in [*GOOD, {"id": "x"}])
    assert all("answer" in r for r in records)
    progress, again = run(model, folder)
    assert (progress.skipped, progress.answered) == (6, 0)
    assert again == records


def test_logprobs_on_request(model, folder):
    write(folder, GOOD)
    _, records = run(model, folder, logprobs=True)
    by_id = {json.dumps(r["id"]): r for r in records}
    for entry, answer in zip(GOOD, expected(model, folder), strict=True):
        np.testing.assert_allclose(by_id[json.dumps(entry["id"])]["logprobs"], answer.logprobs, atol=1e-5)


def test_images_open_a_little_ahead_in_order():
    from sphinx_jax.inference.complete_each import AHEAD, _ahead

    started = []
    results = _ahead(lambda n: started.append(n) or n * n, range(3 * AHEAD))
    assert next(results) == 0
    assert len(started) <= AHEAD + 1
    assert list(results) == [n * n for n in range(1, 3 * AHEAD)]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: None, "in.jsonl: cannot read"),
        (lambda f: (f / "in.jsonl").write_text("\n \n"), "no questions"),
        (lambda f: (write(f, GOOD), (f / "out.jsonl").write_text("notes\nof mine\n")), "out.jsonl: line 1"),
        (lambda f: (write(f, GOOD), (f / "out.jsonl").write_text('{"id": 1}\n')), "out.jsonl: line 1"),
        (lambda f: (write(f, GOOD), (f / "out.jsonl").mkdir()), "out.jsonl: is a directory"),
    ],
)
def test_files_that_are_not_what_they_should_be(model, folder, prepare, message):
    prepare(folder)
    before = (folder / "out.jsonl").read_bytes() if (folder / "out.jsonl").is_file() else None
    with pytest.raises(UserError, match=message):
        list(model.answer_file(folder / "in.jsonl", folder / "out.jsonl"))
    if before is not None:
        assert (folder / "out.jsonl").read_bytes() == before


def test_the_answers_may_not_go_into_the_questions(model, folder):
    write(folder, GOOD)
    with pytest.raises(UserError, match="itself"):
        list(model.answer_file(folder / "in.jsonl", folder / "in.jsonl"))
    with pytest.raises(UserError, match="does not exist"):
        list(model.answer_file(folder / "in.jsonl", folder / "no" / "out.jsonl"))


def test_a_data_uri_is_an_image(model, folder):
    uri = "data:image/png;base64," + base64.b64encode((folder / "0.png").read_bytes()).decode()
    write(folder, [GOOD[0], GOOD[0] | {"id": "uri", "image": uri}])
    _, records = run(model, folder)
    assert records[0]["answer"] == records[1]["answer"]


def test_a_byte_order_mark_belongs_to_no_line(model, folder):
    write(folder, GOOD[:1])
    (folder / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "in.jsonl").read_bytes())
    assert run(model, folder)[0].answered == 1


def test_a_json_array_is_one_error(model, folder):
    (folder / "in.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match="JSON array"):
        run(model, folder)


def test_a_link_is_followed_and_stays_a_link(model, folder):
    write(folder, GOOD)
    (folder / "real.jsonl").touch()
    (folder / "out.jsonl").symlink_to("real.jsonl")
    run(model, folder)
    assert (folder / "out.jsonl").is_symlink() and len((folder / "real.jsonl").read_text().splitlines()) == len(GOOD)


def test_devices_and_pipes_are_written_to_and_stay_what_they_are(model, folder):
    write(folder, GOOD[:2])
    arguments = {"max_new_tokens": NEW, "max_num_seqs": 4}
    *_, last = model.answer_file(folder / "in.jsonl", "/dev/null", **arguments)
    assert last.answered == 2 and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    fifo = folder / "pipe"
    os.mkfifo(fifo)
    with pytest.raises(UserError, match="pipe: cannot be written"):
        list(model.answer_file(folder / "in.jsonl", fifo, **arguments))
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    list(model.answer_file(folder / "in.jsonl", fifo, **arguments))
    assert len(os.read(reader, 1 << 16).splitlines()) == 2
    os.close(reader)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.5}, "temperature 0.0, not 0.5"),
        ({"stop": ["x"]}, "stop"),
        ({"prompt": "is it green?"}, 'the question with id "a"'),
        ({"image": "1.png"}, 'the question with id "a"'),
    ],
)
def test_answers_of_another_run_are_refused_and_stay(model, folder, change, message):
    write(folder, GOOD)
    run(model, folder)
    before = (folder / "out.jsonl").read_bytes()
    options = {name: change[name] for name in ("temperature", "stop") if name in change}
    write(folder, [GOOD[0] | {name: change[name] for name in ("prompt", "image") if name in change}, *GOOD[1:]])
    with pytest.raises(UserError, match=message):
        run(model, folder, **options)
    assert (folder / "out.jsonl").read_bytes() == before
    # More questions are no other run.
    write(folder, [*GOOD, {"id": "more", "prompt": "why?"}])
    assert run(model, folder)[0].answered == 1


def test_another_checkpoint_at_the_same_path_is_refused(model, folder, monkeypatch):
    write(folder, GOOD)
    path = folder / "checkpoint"
    model.save(path)
    monkeypatch.setattr(model, "path", path)
    run(model, folder)
    before = (folder / "out.jsonl").read_bytes()
    path.rename(folder / "moved")
    shutil.copytree(folder / "moved", path)
    assert run(model, folder)[0].answered == 0
    shutil.rmtree(path)
    checkpoints.save(path, model.config, jax.tree.map(lambda x: x * 2, model._params), model._assets)
    with pytest.raises(UserError, match="its answers were made with checkpoint_digest"):
        run(model, folder)
    assert (folder / "out.jsonl").read_bytes() == before


def test_half_of_a_surrogate_pair_in_an_id_comes_back_as_it_was(model, folder):
    write(folder, [b'{"id": "\\ud800", "prompt": "why?"}'])
    assert run(model, folder)[1][0]["id"] == "\ud800"
