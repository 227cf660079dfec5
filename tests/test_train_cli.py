"""train.py as users call it: a short run, resuming, and every kind of invalid input."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import pytest

import sphinx_jax
from sphinx_jax import checkpoints
from sphinx_jax.cli import common, convert, train
from sphinx_jax.data import easy_vqa

QUICK = ["--validation-split", "--batch-size", "8", "--log-every", "1", "--save-every", "2", "--steps", "4"]
EIGHT_DEVICES = ["--simulate-devices", "8", "--mesh.tensor", "2", "--mesh.expert", "2", "--mesh.fsdp", "2"]


def call(*argv):
    return common.run(train.main, list(map(str, argv)))


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def few_held_out():
    """Three batches instead of fifty: every run here evaluates at its end, and no accuracy is looked at."""
    load = easy_vqa.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(easy_vqa, "load", lambda s: load(s).select(range(20)) if s == "validation" else load(s))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert call("--out", out, *QUICK) == 0
    return out


def test_run_outputs(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert set(summary["held_out"]) == set(summary["blind"]) == {"overall", "yes_no", "open"}
    assert sum(summary["expert_share"]) == pytest.approx(1, abs=1e-3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "balance_loss", "grad_norm", "lr", "tokens_per_second", "accuracy"} <= set(lines[0])
    assert checkpoints.load(run).config.vision.image_size == 64


@pytest.mark.parametrize(
    ("mesh", "tolerance"),
    [
        pytest.param([], 0, id="same mesh"),
        pytest.param(EIGHT_DEVICES, 1e-3, id="eight devices", marks=pytest.mark.slow),
    ],
)
def test_resume_equals_the_uninterrupted_run(run, tmp_path, mesh, tolerance):
    """Killed after the save at step 2: the losses of steps 3 and 4 are the uninterrupted run's."""
    out = tmp_path / "killed"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "4")
    (out / "summary.json").unlink()
    assert call("--out", out, *QUICK, "--resume", *mesh) == 0
    assert losses(out) == pytest.approx(losses(run), rel=tolerance)
    assert json.loads((out / "summary.json").read_text())["steps"] == 4


def test_run_is_not_overwritten_by_default(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert call("--out", run, *QUICK) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "--resume" in last and "--overwrite" in last
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "micro"], "unknown preset 'micro'; choose one of nano"),
        (["--preset", "mixtral-8x7b"], "choose --preset nano"),
        (["--data", "cats"], "--data cats: unknown"),
        (["--data", "missing.yaml"], "missing.yaml: cannot read"),
        (["--batch-size", "10", "--mesh.data", "4"], "try --batch-size 8"),
        (["--batch-size", "0"], "--batch-size"),
        (["--mesh.tensor", "16"], "needs 16 devices and there are 8"),
        (["--mesh.tensor", "7"], "is not divisible by mesh axis 'tensor' of size 7"),
        (["--mesh.tensor", "0"], "'tensor' must be 1 or more"),
        (["--steps", "3", "--epochs", "1"], "--steps and --epochs exclude each other"),
        (["--steps", "0"], "--steps"),
        (["--resume"], "holds no run"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--init", "nowhere"], "nowhere is not a directory"),
        (["--seed", "-1"], "--seed"),
        (["--coordinator", "node1:29500"], "--num-processes and --process-id is missing"),
        (["--workers", "0"], "--workers must be 1 or more"),
        (["--max-skipped", "1.5"], "--max-skipped must be a fraction"),
        (["--save-minutes", "0"], "--save-minutes must be above 0"),
        (["--profile", "5"], "--profile 5: must be FIRST:LAST"),
        (["--profile", "5:4"], "--profile 5:4: must be FIRST:LAST"),
        (["--keep-best", "-1"], "--keep-best must be 0 or more"),
        (["--lr", "fast"], "lr"),
        (["--no-such-flag"], "no-such-flag"),
    ],
)
def test_invalid_input_is_one_sentence_and_writes_nothing(argv, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert call("--out", out, *argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not out.exists()


def test_directory_that_is_no_run_is_not_touched(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert call("--out", tmp_path, "--overwrite") == 2
    assert "is not a run directory; choose another directory" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
def test_convert_writes_any_checkpoint_of_a_run(run, tmp_path, capsys):
    """The newest equals the final weights, an older one differs, and a missing step is an error."""

    def run_convert(*argv) -> int:
        return common.run(convert.main, list(map(str, argv)))

    assert run_convert(run, tmp_path / "newest") == 0
    assert run_convert(run, tmp_path / "second", "--step", 2) == 0
    newest, second, final = (
        checkpoints.load(path, unstacked=False).params for path in (tmp_path / "newest", tmp_path / "second", run)
    )

    def same(a, b):
        return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))

    assert same(newest, final) and not same(second, final)
    assert (tmp_path / "newest" / "tokenizer.model").read_bytes() == (run / "tokenizer.model").read_bytes()
    assert run_convert(run, tmp_path / "third", "--step", 3) == 2
    assert "--step 3 is not among the checkpoints" in capsys.readouterr().err
    assert run_convert(tmp_path, tmp_path / "third") == 2
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_only_the_stage_is_trained(run, tmp_path):
    """From a checkpoint, the projection alone: everything else is unchanged bit for bit, also after a resume."""
    out = tmp_path / "stage1"
    argv = ["--out", out, *QUICK, "--init", run, "--stage", "mm_stage1"]
    assert call(*argv) == 0
    shutil.rmtree(out / "checkpoints" / "4")
    assert call(*argv, "--resume") == 0
    before, after = (checkpoints.load(path, unstacked=False).params for path in (run, out))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    changed = {path[:2] for path, flag in jax.tree_util.tree_leaves_with_path(same) if not flag}
    assert {tuple(key.key for key in path) for path in changed} == {
        ("vision", "visual_proj"),
        ("vision", "visual_norm"),
        ("vision", "start"),
        ("vision", "end"),
    }


@pytest.mark.parametrize(
    ("image", "argv", "message"),
    [
        ("gone.png", [], "of type 'picture', none of 30 images exists"),
        (None, ["--batch-size", "64"], "the largest type has 27 records, too few for one step of 64"),
        (None, ["--max-length", "20"], "at least 1 of 30 records cannot be used"),
    ],
)
def test_invalid_data_is_one_sentence_and_overwrites_nothing(run, tmp_path, capsys, image, argv, message):
    turns = [[{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "This."}] for i in range(30)]
    records = [{"conversations": pair} for pair in turns]
    if image is not None:
        records = [record | {"image": f"{i}-{image}"} for i, record in enumerate(records)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    entry = {"path": str(tmp_path / "records.json"), "type": "picture"}
    (tmp_path / "data.yaml").write_text(json.dumps({"META": [entry]}))
    before = sorted(path.name for path in run.iterdir())
    assert call("--out", run, "--overwrite", "--data", tmp_path / "data.yaml", "--batch-size", 8, *argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.slow
@pytest.mark.optimized
def test_own_labels(tmp_path, capsys):
    """The example: a labelled image set learned to 90 %, one unreadable image skipped."""
    file = Path(__file__).parents[1] / "examples" / "own_labels.py"
    spec = importlib.util.spec_from_file_location("own_labels", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.draw(tmp_path / "signs")
    (tmp_path / "signs" / "stop" / "17.png").write_bytes(b"no image")
    assert example.main(str(tmp_path / "signs")) == 0
    out = tmp_path / "signs" / "run"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out"]["accuracy"] > 0.9
    assert "blind" not in summary
    assert "1 of 1200 records were skipped" in capsys.readouterr().out
    (line,) = (out / "skipped.jsonl").read_text().splitlines()
    assert "stop/17.png: not an image" in json.loads(line)["reason"]
    # On training images, through the public interface.
    model = sphinx_jax.load(out)
    images = [tmp_path / "signs" / label / "0.png" for label in ("stop", "turn")]
    assert model.generate([example.QUESTION] * 2, images, max_new_tokens=8) == ["stop", "turn"]
