"""Batches of a `data.yaml`: the original's order, their contents, and skipped records."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from sphinx_jax.data import accessory_yaml
from sphinx_jax.data.batching import ItemReader, epoch_order, held_out_batches, train_batches
from sphinx_jax.data.conversation import Conversation, fit
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.errors import UserError


@pytest.fixture(scope="module")
def reference(golden):
    return golden("dataset.json")


@pytest.mark.parametrize("number", range(12))
def test_epoch_order_is_the_originals(reference, number):
    case = reference["sampler"][number]
    groups = {str(i): range(group[0], group[-1] + 1) for i, group in enumerate(reference["groups"])}
    order = epoch_order(
        groups,
        batch_size=case["batch_size"],
        grad_accum_steps=case["acc_grad"],
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
    """Six records with images of one colour each, and four without: the path of their data.yaml."""
    with_images = []
    for i in range(6):
        Image.new("RGB", (40, 20 + i), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        with_images.append({"id": i, "image": f"{i}.png", "conversations": conversation("What?" * (i + 1), str(i))})
    texts = [{"conversations": conversation("Well?", "word " * (i + 1))} for i in range(4)]
    meta = []
    for kind, records in (("image", with_images), ("text", texts)):
        (tmp_path / f"{kind}.json").write_text(json.dumps(records))
        meta.append({"type": kind, "root": str(tmp_path), "path": str(tmp_path / f"{kind}.json")})
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"META": meta}))
    return tmp_path / "data.yaml"


def read(config, tokenizer, max_skipped=0.0, max_length=80):
    skipped = SkippedRecords(max_skipped)
    annotations = accessory_yaml.read(config, skipped)
    return annotations, ItemReader(tokenizer, max_length, image_size=16, num_image_tokens=10, skipped=skipped)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_batches(mixed, mixtral):
    annotations, reader = read(mixed, mixtral)

    def make(seed, **more):
        return train_batches(annotations, reader, batch_size=2, seed=seed, **more)

    batches = make(0)
    epoch = [next(batches) for _ in range(5)]
    assert sum("images" in batch for batch in epoch) == 3
    seen = []
    for batch in epoch:
        length = 70 if "images" in batch else 80
        assert batch["tokens"].shape == batch["labels"].shape == (2, length)
        for row, (tokens, labels) in enumerate(zip(batch["tokens"], batch["labels"], strict=True)):
            answer = mixtral.decode(labels[labels != 0].tolist()).removesuffix("\n###")
            item = annotations.items[batch["examples"][row]]
            assert item.conversation.turns[1].text == answer
            if "images" in batch:
                assert batch["images"].shape == (2, 16, 16, 3) and batch["images"].dtype == np.uint8
                # The image that this answer names: its red, in the middle.
                assert batch["images"][row, 8, 8].tolist() == [40 * int(answer), 0, 0]
                expected = conversation("What?" * (int(answer) + 1), answer)
            else:
                expected = conversation("Well?", answer)
            example = fit(Conversation.from_record(expected, "").example(mixtral), length, 0, "")
            np.testing.assert_array_equal(tokens, example.tokens)
            np.testing.assert_array_equal(labels, example.labels)
            seen.append(answer)
    assert len(set(seen)) == 10
    # Two processes take different batches.
    parts = [next(make(3, replicas=2, rank=rank)) for rank in range(2)]
    assert parts[0]["tokens"].shape == parts[1]["tokens"].shape
    assert not np.array_equal(parts[0]["tokens"], parts[1]["tokens"])


@pytest.mark.parametrize("transform", ["pad", "crop"])
def test_workers_and_resuming_change_nothing(mixed, mixtral, transform):
    annotations, reader = read(mixed, mixtral)

    def make(workers, seed=5):
        return train_batches(annotations, reader, batch_size=2, seed=seed, image_transform=transform, workers=workers)

    one, three = make(1), make(3)
    assert all(same(next(one), next(three)) for _ in range(7))
    position = one.get_state()
    later = [next(one) for _ in range(6)]
    resumed = make(4)
    resumed.set_state(position)
    assert all(same(batch, next(resumed)) for batch in later)
    assert not all(same(next(three), batch) for batch in make(1, seed=6))


def test_mixed_lengths_are_redrawn_each_epoch(mixed, mixtral):
    annotations, reader = read(mixed, mixtral)
    batches = train_batches(annotations, reader, batch_size=2, seed=0, no_group_by_length=True)
    epochs = [[next(batches)["examples"].tolist() for _ in range(5)] for _ in range(4)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(10))
        # Still of one type each: the first six have images.
        assert all((one < 6) == (other < 6) for one, other in epoch)
    assert len({tuple(sorted(map(tuple, map(sorted, epoch)))) for epoch in epochs}) == 4


def test_crops_are_redrawn_each_epoch(tmp_path, mixtral):
    """Each pixel of the image holds its own column."""
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
    Image.fromarray(np.ascontiguousarray(columns)).save(tmp_path / "columns.png")
    (tmp_path / "records.json").write_text(json.dumps([{"image": "columns.png", "conversations": conversation()}]))
    meta = {"type": "t", "root": str(tmp_path), "path": str(tmp_path / "records.json")}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"META": [meta]}))
    annotations, reader = read(tmp_path / "data.yaml", mixtral)
    batches = train_batches(annotations, reader, batch_size=1, seed=0, image_transform="crop")
    assert len({next(batches)["images"][0, 8, 8, 0] for _ in range(20)}) > 3


def test_a_batch_larger_than_every_type_is_an_error(mixed, mixtral):
    with pytest.raises(UserError, match="largest type has 6 records, too few for one step of 8"):
        train_batches(*read(mixed, mixtral), batch_size=4, grad_accum_steps=2, seed=0)


def test_an_image_that_cannot_be_loaded_is_skipped(mixed, mixtral, tmp_path):
    """Of ten records one is bad: named, and replaced by the next; with one more than allowed the run stops."""
    (tmp_path / "2.png").write_bytes(b"no image")
    annotations, reader = read(mixed, mixtral, max_skipped=0.1)
    reader.skipped.log_to(tmp_path / "skipped.jsonl")
    batches = train_batches(annotations, reader, batch_size=3, seed=0)
    epoch = [next(batches) for _ in range(6)]
    reds = sorted(red for batch in epoch[:3] if "images" in batch for red in batch["images"][:, 8, 8, 0].tolist())
    assert reds == [0, 40, 120, 120, 160, 200]
    assert len(reader.skipped) == 1
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["where"].endswith("image.json, record 2") and "not an image" in line
    held_out = list(held_out_batches(annotations, reader, batch_size=4))
    assert [len(batch["tokens"]) for batch in held_out] == [3, 2, 4]

    (tmp_path / "3.png").unlink()
    with pytest.raises(UserError, match=r"2 of 10 .*--max-skipped 0.1; .*the first is .*record 2: .*2.png: not an im"):
        [next(batches) for _ in range(6)]
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2
    # A resumed run counts them, each once.
    again = SkippedRecords(0.1)
    again.log_to(tmp_path / "skipped.jsonl")
    assert len(again) == 2


def test_records_without_loss_after_truncation_are_skipped(mixed, mixtral):
    """The longer the question, the later its answer begins: the six with images have 1 to 6 times "What?"."""
    annotations, reader = read(mixed, mixtral, max_skipped=0.5, max_length=57)
    kept = reader.select_with_loss(annotations)
    expected = []
    for item in annotations.items:
        labels = item.conversation.example(mixtral).labels
        if (labels != 0).argmax() < (47 if item.image else 57):
            expected.append(item)
    assert list(kept.items) == expected
    assert 0 < len(expected) < 10 and len(reader.skipped) == 10 - len(expected)
    assert [len(group) for group in kept.groups.values()] == [len(expected) - 4, 4]
