"""The picture of runs, read back as XML."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from sphinx_jax.cli import common
from sphinx_jax.training import plot

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def runs(tmp_path):
    for name, factor in (("a & b", 1.0), ("c", 2.0)):
        lines = [{"step": 10 * n, "loss": factor * 8.0 / 2**n, "lr": 0.1} for n in range(1, 9)]
        lines[3]["held_out"] = {"accuracy": 0.25}
        lines[7]["held_out"] = {"accuracy": 0.75}
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [tmp_path / "a & b", tmp_path / "c"]


def call(*argv):
    return common.run(plot.main, list(map(str, argv)))


def points(line):
    return np.array([point.split(",") for point in line.get("points").split()], float)


def test_curves_are_where_the_numbers_say(runs, tmp_path):
    assert call(*runs, "--out", tmp_path / "runs.svg") == 0
    root = ET.parse(tmp_path / "runs.svg").getroot()
    first, second, accuracy, _ = map(points, root.iter(f"{SVG}polyline"))
    # Halving at every step is a straight line on a logarithmic axis, and twice the loss the same line higher up.
    for curve in (first, second):
        assert np.ptp(np.diff(curve, axis=0), axis=0).max() < 0.3
    np.testing.assert_allclose(second[1:, 1], first[:-1, 1], atol=0.2)
    assert first[-1, 1] == plot.TOP + plot.HEIGHT and second[0, 1] == plot.TOP
    assert len(accuracy) == 2 and accuracy[0, 1] - accuracy[1, 1] == plot.HEIGHT
    said = [text.text for text in root.iter(f"{SVG}text")]
    assert {"loss, logarithmic", "held_out/accuracy", "40", "0.5", str(runs[0])} <= set(said)


def test_a_flat_curve_has_a_place(runs, tmp_path):
    assert call(runs[0], "--out", tmp_path / "lr.svg", "--metrics", "lr") == 0
    (line,) = ET.parse(tmp_path / "lr.svg").getroot().iter(f"{SVG}polyline")
    assert np.ptp(points(line)[:, 1]) == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere", "--out", "a.svg"], "metrics.jsonl: cannot be read"),
        (["RUN", "--out", "a.png"], "must end in .svg"),
        (
            ["RUN", "--out", "a.svg", "--metrics", "joy"],
            "--metrics joy: no run has it; there are held_out/accuracy, lo",
        ),
        (["--out", "a.svg"], "no run was named"),
    ],
)
def test_bad_input_is_one_sentence(runs, tmp_path, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert call(*[str(runs[0]) if word == "RUN" else word for word in argv]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and said in last
    assert not list(tmp_path.glob("a.*"))
