"""Every example runs, and prints what its docstring states."""

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
    """The tiny model replaces any that would be loaded."""
    monkeypatch.setattr("sphinx_jax.sphinx.load", lambda *_: model)
    return model


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_every_example_is_listed_and_short():
    files = {file.stem: len(file.read_text().splitlines()) for file in EXAMPLES.glob("*.py")}
    assert set(files) == {"caption", "two_turns", "evaluate_easy_vqa", "own_mesh", "own_labels", "upcycle"}
    assert max(files.values()) <= 85


def test_caption(run, tiny, image):
    expected = tiny.generate(["Describe the image briefly."], [image], max_new_tokens=64)[0]
    assert run("caption", "checkpoint", image) == f"{image}: {expected}\n"


def test_two_turns(run, tiny, image):
    chat = tiny.chat(image, max_new_tokens=64)
    questions = ["what shape is present?", "what color is it?"]
    assert run("two_turns", "checkpoint", image) == "".join(f"> {q}\n{chat.ask(q)}\n" for q in questions)


def test_evaluate_easy_vqa(run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run("evaluate_easy_vqa", "checkpoint", 3)
    assert re.fullmatch(
        r"(\d of 3 answered\r)*3 of 3 answered\r\noverall: [\d.]+%\nyes_no: [\d.na]+%?\nopen: [\d.na]+%?\n", out
    ), out
    # With the true answers in the file, the accuracy is 100 %.
    from sphinx_jax.data import easy_vqa

    questions = [question for _, question in easy_vqa.load("test").pairs()]
    truth = [json.dumps({"id": i, "answer": questions[i].answer}) for i in range(3)]
    (tmp_path / "answers.jsonl").write_text("\n".join(truth) + "\n")
    assert "overall: 100.0%" in run("evaluate_easy_vqa", "checkpoint", 3)


def test_own_mesh(run, make_model, image, monkeypatch):
    asked = {"fsdp": 2, "expert": 2, "tensor": 2}

    def load(_, mesh):
        assert {axis: size for axis, size in mesh.shape.items() if size > 1} in ({}, asked)
        return make_model(**asked) if mesh.size > 1 else make_model()

    monkeypatch.setattr("sphinx_jax.sphinx.load", load)
    out = run("own_mesh", "checkpoint", image).splitlines()
    own, one = (float(re.search(r": ([\d.]+) MiB", line)[1]) for line in out[:2])
    assert own < one / 4
    assert "'expert'" in out[2] and "'tensor'" in out[2]
    eight, single = "\n".join(out[3:]).split("1 device(s): ")
    expected = make_model().generate(["what shape is present?"], [image], max_new_tokens=64)[0]
    assert eight.removeprefix("8 device(s): ").rstrip("\n") == single == expected
