"""`infer.py --adapters`: a batch file whose questions name their adapter, one question, and what is refused."""

import json

import pytest

import sharding
import sphinx_jax
from sphinx_jax.cli import common, infer, serve
from tests.instruments.adapters import save_adapters, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def directories(base):
    return save_adapters(base)


@pytest.fixture(scope="module")
def answers(base, directories):
    """Of each adapter and of the base to one question."""
    model = sphinx_jax.load(base, sharding.make_mesh(), adapters=directories)
    return dict(
        zip(
            ("mine", "theirs", "base"),
            model.generate(["3 plus 4?"] * 3, adapter=["mine", "theirs", None], max_new_tokens=6),
            strict=True,
        )
    )


def run(main, base, directories, *argv):
    named = [f"{name}={path}" for name, path in directories.items()]
    return common.run(main, ["--checkpoint", str(base), "--adapters", *named, *map(str, argv)])


@pytest.mark.slow
def test_questions_name_their_adapter(base, directories, answers, tmp_path):
    lines = [
        {"id": i, "prompt": "3 plus 4?"} | fields
        for i, fields in enumerate(
            [{"model": "mine"}, {"model": "theirs"}, {"model": "base"}, {}, {"model": None}, {"model": "nobody"}]
        )
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ("--batch", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--max-new-tokens", 6)
    assert run(infer.main, base, directories, *files, "--adapter", "theirs") == 0
    found = {line["id"]: line for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    expected = [answers[name] for name in ("mine", "theirs", "base", "theirs", "theirs")]
    assert [found[i]["answer"] for i in range(5)] == expected and len(set(expected)) == 3
    assert found[5]["error"] == "line 6: unknown adapter 'nobody'; choose one of mine, theirs"


def test_answers_of_other_adapters_are_not_mixed(base, directories, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "3 plus 4?"}\n')
    files = ("--batch", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--max-new-tokens", 6)
    assert run(infer.main, base, directories, *files, "--adapter", "mine") == 0
    assert run(infer.main, base, directories, *files) == 2
    assert "its answers were made with adapter mine, not None" in capsys.readouterr().err


def test_one_question(base, directories, answers, capsys):
    for name in ("mine", "base"):
        chosen = () if name == "base" else ("--adapter", name)
        assert run(infer.main, base, directories, "--prompt", "3 plus 4?", "--max-new-tokens", 6, *chosen) == 0
        assert capsys.readouterr().out == answers[name] + "\n"


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (infer.main, ["--adapters", "mine"], "--adapters mine: give NAME=DIR"),
        (serve.main, ["--adapters", "a={run}", "--adapters", "a={run}"], "the name is given twice"),
        (infer.main, ["--adapters", "a=/absent"], "/absent is not a directory"),
        (serve.main, ["--adapters", "a={run}", "--offload"], "--adapters do not go with --offload"),
        (serve.main, ["--adapters", "base={run}", "--port", "0"], "this is the name of the model itself"),
        (infer.main, ["--adapters", "a={run}", "--adapter", "b", "--prompt", "3?"], "--adapter b: none has this name"),
        (infer.main, ["--adapter", "b", "--prompt", "3?"], "give --adapters b=DIR"),
    ],
)
def test_refusals(base, directories, main, argv, message, capsys):
    argv = [argument.format(run=directories["mine"]) for argument in argv]
    assert common.run(main, ["--checkpoint", str(base), *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_plan_counts_the_factors(base, directories, capsys):
    """Of 3 ranks on attention and experts and 2 more, which attention alone uses, in float32."""
    argv = ["--plan", "--json", "--gpu", "rtx4090", "--max-model-len", "64", "--max-num-seqs", "2"]
    assert common.run(infer.main, ["--checkpoint", str(base), *argv]) == 0
    plain = json.loads(capsys.readouterr().out)["per_device"]
    assert run(infer.main, base, directories, *argv) == 0
    planned = json.loads(capsys.readouterr().out)["per_device"]
    attention = 16 + 2 * 4 * 4 + 2 * 2 * 4 + 16
    experts = 4 * (16 + 2 * 32 + 32 + 16)
    assert planned["parameters_bytes"] - plain["parameters_bytes"] == 4 * 2 * 5 * (attention + experts)
