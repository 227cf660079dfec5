"""`data.yaml` against the original's order, images and groups; and every malformed input."""

import json
import os

import pytest
import yaml

from sphinx_jax.data import accessory_yaml
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.errors import UserError


@pytest.fixture(scope="module")
def reference(golden):
    return golden("dataset.json")


def write(folder, entries):
    """A data.yaml and the record files that its entries hold as "data"."""
    meta = []
    for number, entry in enumerate(entries):
        entry = dict(entry)
        if "data" in entry:
            path = folder / f"records{number}.json"
            path.write_text(json.dumps(entry.pop("data")))
            entry["path"] = str(path)
        meta.append(entry)
    (folder / "data.yaml").write_text(yaml.safe_dump({"META": meta}))
    return folder / "data.yaml"


def read(config, max_skipped=0.0):
    return accessory_yaml.read(config, SkippedRecords(max_skipped))


def test_order_images_and_groups_are_the_originals(reference, tmp_path):
    annotations = read(write(tmp_path, reference["meta"]))
    assert [item.id for item in annotations.items] == reference["order"]
    assert [item.image for item in annotations.items] == reference["image_paths"]
    assert [list(group) for group in annotations.groups.values()] == reference["groups"]
    assert list(annotations.groups) == ["image_text", "text"]


def test_json_lines_equal_json(reference, tmp_path):
    entry = dict(reference["meta"][1])
    lines = [json.dumps(record) for record in entry.pop("data")]
    (tmp_path / "lines.jsonl").write_text("\n\n".join(lines) + "\n")
    annotations = read(write(tmp_path, [{**entry, "path": str(tmp_path / "lines.jsonl")}]))
    assert [item.id for item in annotations.items] == [name for name in reference["order"] if name.startswith("m2")]
    assert annotations.items[0].where == f"{tmp_path / 'lines.jsonl'}, line 29"


def raw(folder, text):
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    return folder / "data.yaml"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name):
    records = [{"id": i, "conversations": conversation(f"What {i}?")} for i in range(3)]
    lines = [json.dumps(record) for record in records]
    text = json.dumps(records) if name == "a.json" else "\n".join(lines[:2]) + "\n\ufeff" + lines[2]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    (tmp_path / "data.yaml").write_text(f"META: [{{path: {tmp_path / name}, type: t}}]", encoding="utf-8-sig")
    skipped = SkippedRecords(0.0)
    assert [item.id for item in accessory_yaml.read(tmp_path / "data.yaml", skipped).items] == ["0", "1", "2"]
    assert len(skipped) == 0


@pytest.mark.parametrize(
    ("ratio", "count"), [("1e-1", 2), ("1E-1", 2), ("'0.25'", 5), ("5.e-1", 10), ("1", 20), ("1e0", 20)]
)
def test_a_ratio_in_any_notation_is_a_number(tmp_path, ratio, count):
    records = [{"id": i, "conversations": conversation()} for i in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    config = raw(tmp_path, f"META: [{{path: {tmp_path / 'a.json'}, type: t, ratio: {ratio}}}]")
    assert len(read(config).items) == count


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.json").write_text(json.dumps([{"image": "x.png", "conversations": conversation()}]))
    config = raw(tmp_path, "META: [{path: ~/a.json, type: t, root: ~/images}]")
    assert read(config).items[0].image == str(tmp_path / "images" / "x.png")
    (tmp_path / "a.json").write_text(json.dumps([{"image": "~/x.png", "conversations": conversation()}]))
    config = raw(tmp_path, "META: [{path: ~/a.json, type: t}]")
    assert read(config).items[0].image == str(tmp_path / "x.png")


@pytest.mark.parametrize("image", ["a\\ud83d.png", "\\ud83d", "a\\u0000.png"])
def test_an_image_path_that_no_file_can_have_is_skipped(tmp_path, image):
    bad = f'{{"image": "{image}", "conversations": [{{"from": "gpt", "value": "x"}}]}}'
    good = '{"image": "a.png", "conversations": [{"from": "gpt", "value": "x"}]}'
    (tmp_path / "a.jsonl").write_text(f"{bad}\n{good}")
    skipped = SkippedRecords(0.5)
    config = raw(tmp_path, f"META: [{{path: {tmp_path / 'a.jsonl'}, type: t, root: {tmp_path}}}]")
    (item,) = accessory_yaml.read(config, skipped).items
    assert item.image == str(tmp_path / "a.png") and len(skipped) == 1
    with pytest.raises(UserError, match='line 1: "image" must be the path of an image') as error:
        accessory_yaml.read(config, SkippedRecords(0.0))
    str(error.value).encode()


def test_half_a_surrogate_pair_in_an_id_can_be_printed(tmp_path):
    record = '[{"id": "x\\ud83d", "conversations": [{"from": "gpt", "value": "x"}]}]'
    (tmp_path / "a.json").write_text(record)
    (item,) = read(raw(tmp_path, f"META: [{{path: {tmp_path / 'a.json'}, type: t}}]")).items
    assert item.id is not None and item.id.encode() == b"x\\ud83d"


@pytest.mark.parametrize("key", ["path", "root"])
@pytest.mark.parametrize("value", ["a\\uD83D", "a\\0b"])
def test_paths_of_an_entry_that_no_file_can_have_are_named(tmp_path, key, value):
    (tmp_path / "a.json").write_text("[]")
    entry = {"path": json.dumps(str(tmp_path / "a.json")), key: f'"{value}"'}
    keys = ", ".join(f"{name}: {text}" for name, text in entry.items())
    config = raw(tmp_path, f"META: [{{type: t, {keys}}}]")
    with pytest.raises(UserError, match=r"data\.yaml") as error:
        read(config)
    str(error.value).encode()


def conversation(question="What?", answer="That."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


GOOD = {"type": "text", "data": [{"conversations": conversation()}]}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "one key, META"),
        ("META:", "META must be a list"),
        ("META: []", "META must be a list"),
        ("- path: a", "one key, META"),
        ("META: [a]\nmeta: 1", "one key, META"),
        ("META: [a]", "META entry 0: must have the keys"),
        ("META:\n  - path: [", "not valid YAML"),
        ("META: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("[" * 100_000, "not valid YAML"),
        ("META: [{type: t}]", "META entry 0: 'path' must be given"),
        ("META: [{path: 3, type: t}]", "META entry 0: 'path' must be given as text, got 3"),
        ("META: [{path: a.json}]", "META entry 0: 'type' must be given"),
        ("META: [{path: a.json, type: t, roots: b}]", "META entry 0: unknown key 'roots'"),
        ("META: [{path: a.json, type: t, root: 1}]", "META entry 0: 'root' must be given as text"),
        ("META: [{path: a.json, type: t, ratio: 0}]", "META entry 0: 'ratio' must be above 0"),
        ("META: [{path: a.json, type: t, ratio: .nan}]", "META entry 0: 'ratio' must be above 0"),
        ("META: [{path: a.json, type: t, ratio: 1.5}]", "META entry 0: 'ratio' must be above 0"),
        ("META: [{path: a.json, type: t, ratio: yes}]", "META entry 0: 'ratio' must be above 0"),
    ],
)
def test_a_malformed_yaml_is_named(tmp_path, text, complaint):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"data.yaml: .*{complaint}") as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", None, "a.json: cannot read the records of .*data.yaml: META entry 0: No such file"),
        ("a.json", b"\xff\xfe", "a.json: cannot read .*UTF-8"),
        ("a.json", b"", "a.json: not valid JSON"),
        ("a.json", b"[" * 100_000, "a.json: not valid JSON"),
        ("a.json", b"{}", "a.json: must be a list"),
        ("a.json", b"[1]", "a.json, record 0: must be an object"),
        ("a.json", b"[]", "data.yaml: no records of type 't'"),
        ("a.json", b'[{"conversations": []}]', "a.json, record 0: .*at least one turn"),
        ("a.json", b'[{"conversations": [{"from": "who", "value": "x"}]}]', "record 0, turn 0: is from 'who'"),
        (
            "a.json",
            b'[{"conversations": [{"from": "human", "value": "x"}]}]',
            "record 0: no token has loss: there is no answer",
        ),
        ("a.json", b'[{"image": 3, "conversations": [{"from": "gpt", "value": "x"}]}]', 'record 0: "image" must be'),
        ("a.jsonl", b'{"conversations": [{"from": "gpt", "value": "x"}]}\n{"conv', "a.jsonl, line 2: not valid JSON"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\n", "a.json: .*git-lfs pointer; run git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "a.jsonl, line 1: not valid JSON"),
        ("a.csv", b"a,b", "a.csv: records must be in a .json or .jsonl file"),
    ],
)
def test_malformed_records_are_named(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        read(write(tmp_path, [{"type": "t", "path": str(tmp_path / name)}]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["data.yaml", "a.json"])
def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path, name):
    (tmp_path / "data.yaml").write_text(f"META: [{{path: {tmp_path / 'a.json'}, type: t}}]")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: cannot read .*: it is not a regular file"):
        read(tmp_path / "data.yaml")


def test_a_missing_yaml_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml: cannot read the data description: No such file"):
        read(tmp_path / "none.yaml")


def test_a_ratio_that_leaves_nothing_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no records of type 'text' are left"):
        read(write(tmp_path, [{**GOOD, "ratio": 0.5}]))


def test_a_type_with_and_without_images_is_refused(tmp_path):
    records = [{"conversations": conversation()}, {"image": "a.png", "conversations": conversation()}]
    with pytest.raises(UserError, match=r"records0.json, record 1: type 'text' mixes"):
        read(write(tmp_path, [{**GOOD, "data": records}]))


def test_malformed_records_are_skipped(tmp_path):
    """Of a hundred records two are bad: both are named and the others kept, unless fewer may be skipped."""
    records = [{"id": i, "conversations": conversation()} for i in range(98)]
    lines = [json.dumps(record) for record in records]
    lines[10:10] = ['{"conv', json.dumps({"conversations": [{"from": "human"}]})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = write(tmp_path, [{"type": "t", "path": str(tmp_path / "a.jsonl")}])
    skipped = SkippedRecords(0.02)
    assert sorted(int(item.id) for item in accessory_yaml.read(config, skipped).items) == list(range(98))
    assert (len(skipped), skipped.total) == (2, 100)
    with pytest.raises(UserError, match=r"2 of 100 .*--max-skipped 0.01.*the first is .*a.jsonl, line 11: not valid"):
        read(config, 0.01)


def test_an_unknown_role_is_never_skipped(tmp_path):
    records = [{"conversations": [{"from": "who", "value": "x"}]}, {"conversations": conversation()}]
    with pytest.raises(UserError, match="record 0, turn 0: is from 'who'"):
        read(write(tmp_path, [{**GOOD, "data": records}]), max_skipped=1.0)
