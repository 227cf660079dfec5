"""The page: whole by itself, nothing in it runs, and the experts' load is that of the model."""

import html.parser
import json

import numpy as np
import pytest

from sphinx_jax.evaluation import expert_load
from sphinx_jax.evaluation.metrics.grounding import in_padded_square
from sphinx_jax.evaluation.report_images import _boxes
from sphinx_jax.evaluation.tasks import TASKS
from tests.evaluation.made_files import FORMATS, write_image, write_json

ATTACK = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\ud800"


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def count(self, tag, **wanted):
        return sum(name == tag and wanted.items() <= found.items() for name, found in self.tags)


def page_of(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_text_of_models_and_files_is_no_markup(run, fake, tmp_path):
    write_image(tmp_path / "data" / "a.png")
    row = {"image_path": "a.png", "question": ATTACK, "question_id": 1, "gt_answers": ATTACK}
    write_json(tmp_path / "data" / "gqa_testdev_balanced.json", [row, row | {"question": "fair?"}])
    fake(lambda prompt: ATTACK if "fair" in prompt else "wrong")
    # The fake model has no experts to count.
    assert run("--data", "data", "--out", "out")[0] == 0
    assert run("--score", "out", "--report")[0] == 0
    page = page_of(tmp_path / "out")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object", "link", "base", "form"})
    assert page.text.count("<script>alert(1)</script>") >= 3
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:image/").startswith("data:image/")
    policy = next(found["content"] for tag, found in page.tags if found.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_boxes_are_drawn_where_answer_and_truth_are(run, fake, tmp_path):
    made = FORMATS["refcoco"][1](tmp_path / "data")
    task = TASKS["refcoco_testA"]
    right = {task.pattern.format(question): answer for question, answer in made.answers.items()}
    fake(lambda prompt: right[prompt])
    assert run("--data", "data", "--out", "out")[0] == 0
    assert run("--score", "out", "--report")[0] == 0
    page = page_of(tmp_path / "out")
    assert page.count("rect", **{"class": "truth"}) == page.count("rect", **{"class": "answer"}) == 3
    lines = [json.loads(line) for line in (tmp_path / "out" / "refcoco_testA.jsonl").read_text().splitlines()]
    for line in lines:
        drawn = dict(_boxes(line, 80, 40))
        # The image is twice as large as the file says, and the true box with it.
        np.testing.assert_allclose(drawn["truth"], np.multiply(line["extra"]["box"], 2))
        np.testing.assert_allclose(drawn["answer"], drawn["truth"], atol=0.5)
        assert in_padded_square(drawn["truth"], 80, 40)[1] == drawn["truth"][1] + 20


@pytest.mark.parametrize("name", ["mmbench", "pope", "vqav2 test", "mmmu", "seed"])
def test_every_format_has_its_images_again(name, run, fake, tmp_path):
    task_name, make = FORMATS[name]
    make(tmp_path / "data")
    fake(lambda _: "maybe")
    assert run("--data", "data", "--tasks", task_name, "--out", "out")[0] == 0
    assert run("--score", "out", "--report")[0] == 0
    page = page_of(tmp_path / "out")
    assert page.count("svg") == page.count("article") > 0 and task_name in page.text
    assert "not there any more" not in page.text
    for file in (tmp_path / "data").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert run("--score", "out", "--report")[0] == 0
    page = page_of(tmp_path / "out")
    assert page.count("svg") == 0 and "not there any more" in page.text


@pytest.mark.slow
def test_experts_that_see_images(run, nano, monkeypatch, tmp_path):
    """On the shipped model: fractions by layer, which sum to 1, of image and of text tokens."""
    monkeypatch.setattr("sphinx_jax.cli.model_options.sphinx_jax.load", lambda *_, **__: nano)
    code, _, err = run("--limit", 12, "--max-num-seqs", 16, "--out", "out", "--report")
    assert code == 0, err
    questions, load = expert_load.read(tmp_path / "out")
    config = nano.config.language
    assert questions == 12 and load.shape == (config.num_layers, 2, config.num_experts)
    np.testing.assert_allclose(load.sum(axis=-1), 1)
    assert np.abs(load[:, 0] - load[:, 1]).max() > 0.05
    counts = np.asarray(json.loads((tmp_path / "out" / "expert_load.json").read_text())["layers"])
    assert (counts[:, 0].sum(-1) == 12 * nano.config.num_image_tokens * config.experts_per_token).all()
    page = page_of(tmp_path / "out")
    assert page.count("table", **{"class": "heat"}) == 3 and "Which experts see images" in page.text
    assert "Hardest" in page.text and page.count("article") == 8
