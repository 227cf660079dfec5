"""`infer.py`: what it prints for each way of asking, and that mistakes end in one line and exit code 2."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sphinx_jax.cli import common, infer

ROOT = Path(__file__).parents[2]
QUESTION = "what is the colour of the shape?"


@pytest.fixture
def run(model, monkeypatch, capsys, tmp_path):
    """run(*argv) -> exit code, stdout and stderr, with the tiny model in place of any that would be loaded."""
    monkeypatch.chdir(tmp_path)
    loaded = []
    monkeypatch.setattr(
        "sphinx_jax.cli.model_options.sphinx_jax.load", lambda path, *_, **__: loaded.append(path) or model
    )

    def call(*argv):
        code = common.run(infer.main, [str(arg) for arg in argv])
        out = capsys.readouterr()
        return code, out.out, out.err

    call.loaded = loaded
    return call


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_a_question_about_a_image(run, model, image):
    expected = model.generate([QUESTION], [image], max_new_tokens=60)[0]
    code, out, err = run("--checkpoint", "x", "--image", image, "--prompt", QUESTION, "--max-new-tokens", 60)
    assert (code, out) == (0, expected + "\n")
    assert "first token after" in err.splitlines()[-1] and "compiling took" in err.splitlines()[-1]


def test_nothing_asked_shows_three_held_out_images_from_the_newest_run(run, model, tmp_path):
    easy_vqa = pytest.importorskip("sphinx_jax.data.easy_vqa")
    for age, name in enumerate(["new", "old"]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        summary = tmp_path / "runs" / name / "summary.json"
        summary.write_text("{}")
        os.utime(summary, (10**9 - age, 10**9 - age))
    code, out, _ = run("--max-new-tokens", 60)
    assert code == 0 and run.loaded == [Path("runs/new")]
    records, lines = easy_vqa.load("test"), out.splitlines()
    assert len(lines) == 12
    for block, number in zip((lines[:4], lines[4:8], lines[8:]), infer.HELD_OUT, strict=True):
        image, question, answer, truth = block
        asked = records[number].questions[0]
        assert Image.open(image).size == (64, 64)
        assert question == f"  question: {asked.text}" and truth == f"  truth:    {asked.answer}"
        assert answer == "  answer:   " + model.generate([asked.text], [image], max_new_tokens=60)[0]


def test_without_a_run_the_shipped_checkpoint_is_shown(run, monkeypatch, tmp_path):
    shipped = tmp_path / "nano"
    monkeypatch.setattr("sphinx_jax.cli.model_options.sphinx_jax.SHIPPED", shipped)
    code, _, err = run()
    assert code == 2 and "no run under ./runs" in err
    shipped.mkdir()
    assert run("--max-new-tokens", 60)[0] == 0
    assert run.loaded == [shipped]


def test_easy_vqa_missing_is_one_line_before_anything_is_loaded(run, monkeypatch, tmp_path):
    from sphinx_jax.data import easy_vqa

    monkeypatch.setattr("sphinx_jax.cli.model_options.sphinx_jax.SHIPPED", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    easy_vqa._read.cache_clear()
    code, _, err = run()
    easy_vqa._read.cache_clear()
    assert code == 2 and err.startswith("error: ") and "pip install" in err and err.count("\n") == 1
    assert run.loaded == []


def test_a_pipe_asks_line_by_line(run, model, image, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nwhy?\n"))
    chat = model.chat(image, max_new_tokens=8)
    expected = [chat.ask(QUESTION), chat.ask("why?")]
    code, out, _ = run("--checkpoint", "x", "--image", image, "--max-new-tokens", 8)
    assert (code, out) == (0, "".join(f"{text}\n" for text in expected))


def test_a_file_of_questions_can_be_resumed(run, image, tmp_path):
    lines = [{"id": i, "image": str(image), "prompt": QUESTION} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    argv = (
        "--checkpoint",
        "x",
        "--batch",
        "in.jsonl",
        "--out",
        "out.jsonl",
        "--max-new-tokens",
        60,
        "--max-num-seqs",
        4,
    )
    code, out, err = run(*argv)
    assert code == 0 and out == "" and "3 answered, 0 answered before, 1 failed" in err
    first = (tmp_path / "out.jsonl").read_text()
    assert run(*argv)[0] == 0
    assert sorted(first.splitlines()) == sorted((tmp_path / "out.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--image", "missing.png", "--prompt", "x"], "missing.png"),
        (["--image", "text.txt", "--prompt", "x"], "text.txt"),
        (["--prompt", "x", "--top-p", "0"], "top-p"),
        (["--prompt", "x", "--top-p", "1.5"], "top-p"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--temperature", "hot"], "--temperature"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens"),
        (["--prompt", "x", "--seed", "-1"], "seed"),
        (["--prompt", "x", "--stop", ""], "stop string"),
        (["--prompt", " "], "--prompt"),
        (["--prompt", "x", "--chat"], "--chat"),
        (["--batch", "in.jsonl"], "--out"),
        (["--batch", "in.jsonl", "--out", "o", "--prompt", "x"], "--batch stands alone"),
        (["--batch", "in.jsonl", "--out", "o"], "in.jsonl"),
        (["--batch", "empty.jsonl", "--out", "o"], "no questions"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--simulate-devices", "0"], "--simulate-devices"),
        (["--simulate-devices", "9"], "cannot simulate 9 devices"),
        (["--mesh.tensor", "3", "--mesh.data", "5"], "needs 15 devices and there are 8"),
        (["--mesh.tensor", "0"], "'tensor' must be 1 or more"),
        (["--mesh.tensor"], "--mesh.tensor"),
        (["--nonsense"], "--nonsense"),
        (["--dtype", "int4"], "--dtype"),
        (["image.png"], "image.png"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_loaded(run, tmp_path, argv, message):
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "empty.jsonl").write_text("\n")
    code, out, err = run(*argv, *([] if "--checkpoint" in argv else ["--checkpoint", "x"]))
    assert code == 2 and out == "" and run.loaded == []
    assert err.splitlines()[-1].startswith("error: ") and message in err.splitlines()[-1], err


def test_mistakes_that_show_later_too(run, model, image, tmp_path, monkeypatch):
    code, _, err = run("--checkpoint", "x", "--prompt", "word " * 2000)
    assert code == 2 and "--max-model-len 512" in err.splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for directory in (tmp_path, tmp_path / "missing"):
        assert common.run(infer.main, ["--checkpoint", str(directory), "--prompt", "x"]) == 2


def test_a_file_without_one_answer_has_exit_code_1(run, tmp_path):
    (tmp_path / "in.jsonl").write_text("{broken\n")
    assert run("--checkpoint", "x", "--batch", "in.jsonl", "--out", "out.jsonl")[0] == 1


@pytest.mark.parametrize("out", ["no/such/directory.jsonl", "in.jsonl", "notes.txt", "."])
def test_a_file_for_answers_that_cannot_be_is_said_before_anything_is_loaded(run, tmp_path, out):
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "prompt": QUESTION}) + "\n")
    (tmp_path / "notes.txt").write_text("mine\n")
    code, _, err = run("--checkpoint", "x", "--batch", "in.jsonl", "--out", out)
    assert code == 2 and run.loaded == [] and "--out" in err.splitlines()[-1]
    assert (tmp_path / "notes.txt").read_text() == "mine\n"


def test_help_has_examples_and_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        common.run(infer.main, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "python infer.py --image cat.jpg --prompt" in shown
    for flag in ("--checkpoint", "--batch", "--out", "--stop", "--mesh.fsdp", "--simulate-devices", "--top-k"):
        assert flag in shown


@pytest.mark.slow
def test_as_a_command_from_a_checkpoint_on_a_mesh(model, image, tmp_path):
    """The one test that starts the real program: everything from the files on, on eight simulated devices."""
    model.save(tmp_path / "checkpoint")
    command = [sys.executable, ROOT / "infer.py", "--checkpoint", tmp_path / "checkpoint", "--image", image]
    command += ["--prompt", QUESTION, "--max-new-tokens", "60"]
    command += ["--simulate-devices", "8", "--mesh.tensor", "2", "--mesh.expert", "2", "--mesh.fsdp", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == model.generate([QUESTION], [image], max_new_tokens=60)[0] + "\n"
    assert "on 8 devices" in done.stderr
