"""Every example runs, and prints what it promises."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(capsys):
    """run(name, *arguments) -> what the example prints."""

    def call(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(*map(str, arguments))
        return capsys.readouterr().out

    return call


@pytest.fixture
def tiny(model, monkeypatch):
    """The tiny model in place of any that would be loaded."""
    monkeypatch.setattr("sphinx_jax.sphinx.load", lambda *_: model)
    return model


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_there_are_no_others_and_all_are_short():
    files = {file.stem: len(file.read_text().splitlines()) for file in EXAMPLES.glob("*.py")}
    assert set(files) == {"caption", "two_turns", "score_vqa", "own_mesh", "own_labels"}
    assert max(files.values()) < 60


def test_caption(run, tiny, picture):
    expected = tiny.generate(["Describe the image briefly."], [picture], max_new_tokens=64)[0]
    assert run("caption", "checkpoint", picture) == f"{picture}: {expected}\n"


def test_two_turns(run, tiny, picture):
    chat = tiny.chat(picture, max_new_tokens=64)
    questions = ["what shape is present?", "what color is it?"]
    assert run("two_turns", "checkpoint", picture) == "".join(f"> {q}\n{chat.ask(q)}\n" for q in questions)


def test_score_vqa(run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run("score_vqa", "checkpoint", 3)
    assert re.fullmatch(r"3 of 3 answered\noverall: [\d.]+%\nyes_no: [\d.na]+%?\nopen: [\d.na]+%?\n", out), out
    # With the truth in place of the answers, it counts them all as right.
    from sphinx_jax.data import easy_vqa

    questions = [question for _, question in easy_vqa.load("test").pairs()]
    truth = [json.dumps({"id": i, "answer": questions[i].answer}) for i in range(3)]
    (tmp_path / "answers.jsonl").write_text("\n".join(truth) + "\n")
    assert "overall: 100.0%" in run("score_vqa", "checkpoint", 3)


def test_own_mesh(run, make_model, picture, monkeypatch):
    asked = {"fsdp": 2, "expert": 2, "tensor": 2}

    def load(_, mesh):
        assert {axis: size for axis, size in mesh.shape.items() if size > 1} in ({}, asked)
        return make_model(**asked) if mesh.size > 1 else make_model()

    monkeypatch.setattr("sphinx_jax.sphinx.load", load)
    out = run("own_mesh", "checkpoint", picture).splitlines()
    own, one = (float(re.search(r": ([\d.]+) MiB", line)[1]) for line in out[:2])
    assert own < one / 4
    assert "'expert'" in out[2] and "'tensor'" in out[2]
    eight, single = "\n".join(out[3:]).split("1 device(s): ")
    expected = make_model().generate(["what shape is present?"], [picture], max_new_tokens=64)[0]
    assert eight.removeprefix("8 device(s): ").rstrip("\n") == single == expected
