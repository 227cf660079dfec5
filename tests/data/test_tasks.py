"""Tasks of one's own data: what is held out, and runs without anything to evaluate."""

import collections
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from sphinx_jax import config
from sphinx_jax.cli import main as cli
from sphinx_jax.data import accessory_yaml
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.data.tasks import YamlData, primary_accuracy, split_held_out
from sphinx_jax.errors import UserError


def record(text, image=None, answer="yes"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({"image": image} if image else {})


def write(folder, *entries):
    """A data.yaml of (type, records) entries; equal records are listed as the same file."""
    meta, files = [], {}
    for kind, records in entries:
        text = json.dumps(records)
        path = files.setdefault(text, folder / f"{len(files)}.json")
        path.write_text(text)
        meta.append({"type": kind, "path": str(path), "root": str(folder)})
    (folder / "data.yaml").write_text(yaml.safe_dump({"META": meta}))
    return folder / "data.yaml"


def split(file):
    return split_held_out(accessory_yaml.read(file, SkippedRecords(0.0)), file)


def keys(annotations):
    return {item.image or item.conversation.turns[0].text for item in annotations.items}


def test_records_about_one_image_are_held_out_together(tmp_path):
    records = [record(f"question {i} about {n}?" + "!" * i, f"{n}.png") for n in range(40) for i in range(5)]
    train, held_out = split(write(tmp_path, ("image", records)))
    assert not keys(train) & keys(held_out)
    assert len(train.items) + len(held_out.items) == 200 and len(keys(held_out)) == 4


def test_one_image_by_several_paths_is_one_image(tmp_path):
    (tmp_path / "sub").mkdir()
    records = [record(f"{i} {path}", path) for i in range(30) for path in (f"{i}.png", f"sub/../{i}.png", f"./{i}.png")]
    train, held_out = split(write(tmp_path, ("image", records)))
    names = [{image.rsplit("/", 1)[1] for image in keys(part)} for part in (train, held_out)]
    assert not names[0] & names[1] and len(held_out.items) == 9


@pytest.mark.parametrize("with_image", [True, False])
def test_a_file_listed_twice_is_held_out_as_one(tmp_path, with_image):
    records = [record(f"question {i}?", f"{i}.png" if with_image else None) for i in range(60)]
    train, held_out = split(write(tmp_path, ("one", records), ("one", records), ("two", records)))
    assert not keys(train) & keys(held_out)
    assert len(held_out.items) == 3 * 6


def test_the_held_out_items_span_all_lengths(tmp_path):
    records = [record("x" * (i + 1)) for i in range(100)]
    _, held_out = split(write(tmp_path, ("text", records)))
    lengths = [item.characters for item in held_out.items]
    assert len(lengths) == 10 and min(lengths) < 20 and max(lengths) > 90
    assert lengths == sorted(lengths)


def test_texts_with_one_question_are_split_by_their_answers(tmp_path):
    records = [record("Tell me a joke.", answer=f"joke {i % 50}") for i in range(100)]
    train, held_out = split(write(tmp_path, ("text", records)))
    answers = [{item.conversation.turns[1].text for item in part.items} for part in (train, held_out)]
    assert len(held_out.items) == 10 and not answers[0] & answers[1]


def test_too_few_images_are_an_error(tmp_path):
    records = [record(f"{i} {n}", f"{n}.png") for n in range(9) for i in range(10)]
    with pytest.raises(UserError, match="at least ten different images or texts of one type"):
        split(write(tmp_path, ("image", records)))


def images(folder, count, unreadable=()):
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    for i in unreadable:
        (folder / f"{i}.png").write_bytes(b"no image")
    return [record("what?" + "!" * i, f"{i}.png") for i in range(count)]


def test_a_held_out_part_that_cannot_be_loaded_is_reported_at_the_start(tmp_path, caplog):
    file = write(tmp_path, ("image", images(tmp_path, 20, unreadable=(9, 19))))
    task = YamlData(file, config.nano(), None, SkippedRecords(0.5))
    assert "no held-out record can be used" in caplog.text
    assert list(task.held_out(4)) == []
    results = task.evaluate([], [])
    assert results == {"held_out": {"accuracy": None}} and primary_accuracy(results) is None


def test_a_held_out_part_that_loads_is_not_reported(tmp_path, caplog):
    file = write(tmp_path, ("image", images(tmp_path, 20, unreadable=(9,))))
    task = YamlData(file, config.nano(), None, SkippedRecords(0.5))
    assert "held-out" not in caplog.text
    assert collections.Counter(len(batch["tokens"]) for batch in task.held_out(4)) == {1: 1}
    right = [np.array([True, False])]
    assert task.evaluate(right, [np.array([True, True])])["held_out"]["accuracy"] == 0.5


@pytest.mark.slow
def test_a_run_without_a_held_out_record_ends_with_accuracy_null(tmp_path, capfd, caplog):
    file = write(tmp_path, ("image", images(tmp_path, 20, unreadable=(9, 19))))
    out = tmp_path / "run"
    argv = ["--data", str(file), "--out", str(out), "--steps", "2", "--batch-size", "2", "--max-length", "96"]
    assert cli.run_command("train", [*argv, "--max-skipped", "0.5", "--eval-every", "1"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out"] == {"accuracy": None} and summary["steps"] == 2
    assert "no held-out record can be used" in caplog.text
    assert "unknown: none held out could be used" in capfd.readouterr().out
