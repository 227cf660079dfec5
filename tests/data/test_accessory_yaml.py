"""`data.yaml` against the original's order, pictures and sampler; and every way of getting it wrong."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from sphinx_jax.data import accessory_yaml
from sphinx_jax.data.conversation import Conversation, fit
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


def test_order_pictures_and_groups_are_the_originals(reference, tmp_path):
    annotations = accessory_yaml.read(write(tmp_path, reference["meta"]))
    assert [item.id for item in annotations.items] == reference["order"]
    assert [item.image for item in annotations.items] == reference["image_paths"]
    assert [list(group) for group in annotations.groups.values()] == reference["groups"]
    assert list(annotations.groups) == ["image_text", "text"]


def test_json_lines_are_read_alike(reference, tmp_path):
    entry = dict(reference["meta"][1])
    lines = [json.dumps(record) for record in entry.pop("data")]
    (tmp_path / "lines.jsonl").write_text("\n\n".join(lines) + "\n")
    annotations = accessory_yaml.read(write(tmp_path, [{**entry, "path": str(tmp_path / "lines.jsonl")}]))
    assert [item.id for item in annotations.items] == [name for name in reference["order"] if name.startswith("m2")]
    assert annotations.items[0].where == f"{tmp_path / 'lines.jsonl'}, line 29"


@pytest.mark.parametrize("number", range(12))
def test_epoch_order_is_the_originals(reference, number):
    case = reference["sampler"][number]
    groups = {str(i): range(group[0], group[-1] + 1) for i, group in enumerate(reference["groups"])}
    order = accessory_yaml.epoch_order(
        groups,
        batch_size=case["batch_size"],
        accumulate=case["acc_grad"],
        replicas=case["num_replicas"],
        rank=case["rank"],
        seed=case["seed"],
        epoch=case["epoch"],
        shuffle=case["shuffle"],
    )
    assert order[case.get("start_iter", 0) * case["batch_size"] :].tolist() == case["indices"]
    assert len(order) == case.get("length", len(order))


def test_all_sampler_cases_are_tested(reference):
    assert len(reference["sampler"]) == 12


def conversation(question="What?", answer="That."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def mixed(tmp_path):
    """Six records with pictures of one colour each, and four without."""
    pictures = []
    for i in range(6):
        Image.new("RGB", (40, 20 + i), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        pictures.append({"id": i, "image": f"{i}.png", "conversations": conversation("What?" * (i + 1), str(i))})
    texts = [{"conversations": conversation("Well?", "word " * (i + 1))} for i in range(4)]
    return [{"type": "picture", "root": str(tmp_path), "data": pictures}, {"type": "text", "data": texts}]


def test_batches(mixed, tmp_path, mixtral):
    annotations = accessory_yaml.read(write(tmp_path, mixed))
    options = {"batch_size": 2, "max_length": 80, "image_size": 16, "image_words": 10}
    make = lambda seed, **more: accessory_yaml.train_batches(annotations, mixtral, seed=seed, **options, **more)
    batches = make(0)
    epoch = [next(batches) for _ in range(5)]
    assert sum("images" in batch for batch in epoch) == 3
    seen = []
    for batch in epoch:
        length = 70 if "images" in batch else 80
        assert batch["tokens"].shape == batch["labels"].shape == (2, length)
        for row, (tokens, labels) in enumerate(zip(batch["tokens"], batch["labels"], strict=True)):
            answer = mixtral.decode(labels[labels != 0].tolist()).removesuffix("\n###")
            if "images" in batch:
                assert batch["images"].shape == (2, 16, 16, 3) and batch["images"].dtype == np.uint8
                # The picture that this row's answer names: its red, in the middle.
                assert batch["images"][row, 8, 8].tolist() == [40 * int(answer), 0, 0]
                expected = conversation("What?" * (int(answer) + 1), answer)
            else:
                expected = conversation("Well?", answer)
            example = fit(Conversation.from_record(expected, "").example(mixtral), length, 0, "")
            np.testing.assert_array_equal(tokens, example.tokens)
            np.testing.assert_array_equal(labels, example.labels)
            seen.append(answer)
    assert len(set(seen)) == 10
    state = batches.get_state()
    later = [next(batches) for _ in range(6)]
    resumed = make(0)
    resumed.set_state(state)
    for batch in later:
        again = next(resumed)
        assert batch.keys() == again.keys() and all(np.array_equal(batch[key], again[key]) for key in batch)
    # Two processes share out what one would see.
    parts = [next(make(3, replicas=2, rank=rank)) for rank in range(2)]
    assert parts[0]["tokens"].shape == parts[1]["tokens"].shape
    assert not np.array_equal(parts[0]["tokens"], parts[1]["tokens"])


def test_a_batch_larger_than_every_type_is_said(mixed, tmp_path, mixtral):
    annotations = accessory_yaml.read(write(tmp_path, mixed))
    with pytest.raises(UserError, match="largest type has 6 records, too few for one step of 8"):
        accessory_yaml.train_batches(
            annotations, mixtral, batch_size=4, accumulate=2, seed=0, max_length=80, image_size=16, image_words=10
        )


def test_a_picture_that_does_not_open_is_named(mixed, tmp_path, mixtral):
    (tmp_path / "2.png").write_bytes(b"no picture")
    annotations = accessory_yaml.read(write(tmp_path, mixed[:1]))
    batches = accessory_yaml.train_batches(
        annotations, mixtral, batch_size=6, seed=0, max_length=80, image_size=16, image_words=10
    )
    with pytest.raises(UserError, match=r"2.png: not a picture"):
        next(batches)


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
        accessory_yaml.read(path)
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
        ("a.json", b'[{"image": 3, "conversations": [{"from": "gpt", "value": "x"}]}]', 'record 0: "image" must be'),
        ("a.jsonl", b'{"conversations": [{"from": "gpt", "value": "x"}]}\n{"conv', "a.jsonl, line 2: not valid JSON"),
        ("a.csv", b"a,b", "a.csv: records must be in a .json or .jsonl file"),
    ],
)
def test_malformed_records_are_named(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        accessory_yaml.read(write(tmp_path, [{"type": "t", "path": str(tmp_path / name)}]))
    assert "\n" not in str(error.value)


def test_a_missing_yaml_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml: cannot read the data description: No such file"):
        accessory_yaml.read(tmp_path / "none.yaml")


def test_a_ratio_that_leaves_nothing_is_said(tmp_path):
    with pytest.raises(UserError, match="no records of type 'text' are left"):
        accessory_yaml.read(write(tmp_path, [{**GOOD, "ratio": 0.5}]))


def test_a_type_with_and_without_pictures_is_refused(tmp_path):
    records = [{"conversations": conversation()}, {"image": "a.png", "conversations": conversation()}]
    with pytest.raises(UserError, match=r"records0.json, record 1: type 'text' mixes"):
        accessory_yaml.read(write(tmp_path, [{**GOOD, "data": records}]))
